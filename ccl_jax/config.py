"""Configs: reading them, writing them, and telling two of them apart."""

import difflib
import importlib.util
import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

# What may differ when a workdir is continued: these settings say how to run, not what is computed.
HOW_TO_RUN = (
    "name",
    "data.root",
    "data.splits",
    "data.parts.*.root",
    "data.parts.*.splits",
    "data.follow_links",
    "data.check",
    "data.source",  # prepared images give the same batches
    "data.prepared",
    "data.prepared_images",
    "data.cache_dir",
    "data.cache_gib",
    "data.bad_files",  # images are as they would be; a run goes on where another had stopped
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.keep_every",
    "eval",
    "predict",
    "published",
    "pretrain",
    "benchmark",
    "run",
)


def read_config_file(path: str | Path, argument: str | None = None) -> ConfigDict:
    """Returns `get_config()` of a Python file, locked. `argument` goes to get_config, if given."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.exists() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"--config {path} does not exist.")
    make_importable(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if argument is None else module.get_config(argument)
    return config.lock()


def make_importable(path: Path) -> None:
    """Lets `from configs import default` work for a config file, whatever folder one starts in."""
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)


def from_json(text: str) -> ConfigDict:
    """Returns the config that `to_json` wrote."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text))).lock()


def read_json(path: Path) -> ConfigDict:
    """Returns the config of a workdir; ValueError where the file is missing or damaged."""
    try:
        return from_json(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist; name the folder that a training was started with (--workdir)."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); write it again by starting the training with its "
            f"--config in a new folder, and copy it from there."
        ) from error


def to_json(config: ConfigDict) -> str:
    """The resolved config as it stands in a workdir."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def flatten(config: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("section.key", value) for every setting."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tuple(value) if isinstance(value, list) else value


def differences(old: ConfigDict, new: ConfigDict) -> tuple[list[str], list[str]]:
    """Lines "key: old -> new" for what differs: (what is computed, only how to run)."""
    before, after = dict(flatten(old)), dict(flatten(new))
    what: list[str] = []
    how: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        values = before.get(key, "(not there)"), after.get(key, "(not there)")
        if values[0] != values[1]:
            free = any(fnmatch(key, name) or key.startswith(f"{name}.") for name in HOW_TO_RUN)
            (how if free else what).append(f"{key}: {values[0]!r} -> {values[1]!r}")
    return what, how


def did_you_mean(name: str, known: list[str]) -> str:
    """Returns the question "Did you mean ...?" for the closest known name, or ""."""
    last = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(name, known, n=1) or [
        last[key] for key in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=1)
    ]
    return f' Did you mean "{close[0]}"?' if close else ""
