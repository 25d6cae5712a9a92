"""Where a config has its prepared data, and how they are written and read."""

import os
from pathlib import Path
from typing import Any

from ccl_jax.config import ConfigDict
from ccl_jax.data import layouts, manifest, remote, shards
from ccl_jax.data.layouts import Split
from ccl_jax.settings import parts_of

Progress = remote.Progress


def location_of(config: ConfigDict) -> str:
    """The folder or URL of the prepared data."""
    if remote.is_url(config.data.prepared):
        return config.data.prepared
    return os.path.abspath(config.data.prepared or f"{os.path.abspath(config.data.root)}-prepared")


def image_folders(config: ConfigDict) -> list[str]:
    """The root of every data set, "" where none is given."""
    data = config.data
    return [part.root for part in (data.parts.values() if data.layout == "joint" else [data])]


def write_prepared(config: ConfigDict, split: Split, progress: Progress | None) -> str:
    """Prepares the records of a split where the config says, and returns what was done.

    At a URL that is done in the local copy first.

    Raises:
        ValueError: As `builders.prepare` and `remote.publish`, or where the shards would lie among
            the images.
    """
    from ccl_jax.data import builders  # tensorflow_datasets, which only this needs

    where = location_of(config)
    image_size = config.data.image_size if config.data.prepared_images == "resized" else None
    folder = Path(where)
    if remote.is_url(where):
        folder = remote.copy_folder(where, config.data.cache_dir)
        wanted = builders.describe(split, settings_of(config), image_size, builders.SHARD_BYTES)
        published = remote.manifest_at(where)
        if published is not None:
            manifest.check_same(published, wanted, where)
    _check_apart(folder, config)
    unreadable: list[str] = []
    summary = builders.prepare(
        split,
        folder,
        settings=settings_of(config),
        image_size=image_size,
        about=about(config),
        threads=config.run.threads,
        progress=progress,
        unreadable=unreadable.append if config.data.bad_files == "skip" else None,
    )
    text = f"{folder}: {summary.written} shards written, {summary.kept} were there and are whole"
    if remote.is_url(where):
        text += f"\n{where}: {remote.publish(folder, where)} shards written"
    if unreadable:
        text += (
            f"\n{len(unreadable)} training images cannot be read, so they are stored as they are, "
            "to be skipped (config.data.bad_files=skip):"
        )
    return "\n  ".join([text, *sorted(unreadable)])


def _check_apart(folder: Path, config: ConfigDict) -> None:
    """Raises ValueError where the shards would lie in a folder of images, as one of its classes."""
    for root in map(os.path.realpath, image_folders(config)):
        if Path(root) in (real := Path(os.path.realpath(folder)), *real.parents):
            key = "cache_dir" if remote.is_url(config.data.prepared) else "prepared"
            raise ValueError(
                f"config.data.{key} would put the shards into {folder}, which lies within the "
                f"images of {root}; choose a folder outside, e.g. --config.data.{key}={root}-{key}."
            )


def about(config: ConfigDict) -> dict[str, str]:
    """Description, homepage and license for the metadata of tensorflow-datasets."""
    parts = parts_of(config)
    texts = [layouts.describe_source(part.layout, name) for name, part in parts.items()]
    known = {
        name: source
        for name, part in parts.items()
        if (source := layouts.source_of(part.layout, name)) is not None
    }
    found = {"description": "\n".join(texts)}
    if known:
        found["homepage"] = " ".join(source.home for source in known.values())
        licences = [known[name].licence if name in known else "unknown" for name in parts]
        named = [f"{name}: {licence}" for name, licence in zip(parts, licences, strict=True)]
        found["license"] = "; ".join(named if len(parts) > 1 else licences)
    return found


def read_prepared(config: ConfigDict, progress: Progress | None, *, full: bool = False) -> Split:
    """The prepared records of a config, fetched first where they lie at a URL.

    With `full` the checksums of all shards are compared.
    """
    where = location_of(config)
    folder = Path(where)
    if remote.is_url(where):
        folder = remote.copy_folder(where, config.data.cache_dir)
        remote.fetch(where, folder, full=full, progress=progress)
    return shards.read_prepared(
        folder,
        image_size=config.data.image_size,
        settings=settings_of(config),
        dataset="" if config.data.layout == "joint" else config.data.name,
        classes=config.data.classes,
        full=full,
    )


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """The settings, beside the names of set and classes, that chose the prepared images."""
    data = config.data
    settings = {f"data.{key}": data[key] for key in ("layout", "views", "validation", "splits")}
    for name, part in data.parts.items() if data.layout == "joint" else ():
        for key in ("layout", "classes", "splits"):
            settings[f"data.parts.{name}.{key}"] = part[key]
    if data.layout == "synthetic":
        settings |= {f"synthetic.{key}": value for key, value in config.synthetic.items()}
    return settings
