"""Where a config has its prepared data, and how they are written and read."""

import os
from pathlib import Path
from typing import Any

from ccl_jax.config import ConfigDict
from ccl_jax.data import builders, manifest, remote, shards
from ccl_jax.data.layouts import Split

Progress = builders.Progress


def location_of(config: ConfigDict) -> str:
    """The folder or URL of the prepared data."""
    if remote.is_url(config.data.prepared):
        return config.data.prepared
    return os.path.abspath(config.data.prepared or f"{config.data.root.rstrip('/')}-prepared")


def write_prepared(config: ConfigDict, split: Split, progress: Progress | None) -> str:
    """Prepares the records of a split where the config says, and returns what was done.

    At a URL that is done in the local copy first.
    """
    where = location_of(config)
    image_size = config.data.image_size if config.data.prepared_images == "resized" else None
    folder = Path(where)
    if remote.is_url(where):
        folder = remote.copy_folder(where, config.data.cache_dir)
        wanted = builders.describe(split, settings_of(config), image_size, builders.SHARD_BYTES)
        published = remote.manifest_at(where)
        if published is not None:
            manifest.check_same(published, wanted, where)
    summary = builders.prepare(
        split,
        folder,
        settings=settings_of(config),
        image_size=image_size,
        threads=config.run.threads,
        progress=progress,
    )
    text = f"{folder}: {summary.written} shards written, {summary.kept} were there and are whole"
    if remote.is_url(where):
        text += f"\n{where}: {remote.publish(folder, where)} shards written"
    return text


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
