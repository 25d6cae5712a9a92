"""Prepared data on an object store: fetched to a local folder first, checked, and written there."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from ccl_jax.data import manifest
from ccl_jax.data.manifest import Manifest, Shard

SETTING = "config.data.prepared"
TFDS_FILES = ("dataset_info.json", "features.json", "LICENSE")
Progress = Callable[[int, int], None]


def is_url(location: str) -> bool:
    """Whether a location is a URL that fsspec opens, such as gs://bucket/mvtec, and no folder."""
    return "://" in location


def copy_folder(url: str, cache_dir: str) -> Path:
    """The local folder for the copy of a URL, one for each, below `cache_dir`.

    "" is the user's cache folder, $XDG_CACHE_HOME/ccl_jax or ~/.cache/ccl_jax.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ccl_jax"
    name = url.rstrip("/").rsplit("/", 1)[-1]
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    return Path(os.path.abspath(cache_dir or cache)) / f"{name}-{digest}"


def manifest_at(url: str) -> Manifest | None:
    """The manifest of the data at a URL; None where there is none.

    Raises:
        ValueError: The store cannot be reached, or the manifest is damaged.
    """
    store, root = _store(url)
    name = f"{root}/{manifest.NAME}"
    try:
        if not store.exists(name):
            return None
        text = store.cat_file(name).decode("utf-8")
    except Exception as error:  # every kind of store raises its own
        raise ValueError(
            f"{SETTING}={url} cannot be read ({_reason(error)}); see to the network and to the "
            "rights to read there, or copy the data yourself and name the folder."
        ) from error
    return manifest.from_json(text, f"{url}/{manifest.NAME}")


def fetch(url: str, folder: Path, *, full: bool = False, progress: Progress | None = None) -> int:
    """Brings a local folder to the state of a URL and returns how many shards had to be fetched.

    A file appears complete and with the right checksum or not at all; what is there already stays,
    `full` only where its checksum is right. One process fetches, others that start meanwhile wait.
    `progress(done, total)` counts shards.

    Raises:
        ValueError: Nothing complete is prepared there, a shard is missing there or has another
            checksum than the manifest says, or the cache cannot be written.
    """
    with manifest.locked(folder, "config.data.cache_dir"):
        found = manifest_at(url)
        if found is None or found.shards is None:
            what = "no prepared data" if found is None else "data that are not prepared to the end"
            raise ValueError(
                f"{SETTING}={url} holds {what}; write them with {manifest.command_for(url)}."
            )
        known = _shards_of(manifest.read(folder))
        missing = [
            shard
            for shard in found.shards
            if manifest.damage(folder, shard, full=full or shard not in known)
        ]
        store, root = _store(url)
        for done, shard in enumerate(missing, start=1):
            for name, digest in _files(shard):
                _fetch_file(store, f"{root}/{name}", folder / name, digest, url)
            if progress is not None:
                progress(done, len(missing))
        text = found.to_json()
        if _shards_of(manifest.read(folder)) != set(found.shards):
            manifest.write_text(folder / manifest.NAME, text)
        return len(missing)


def publish(folder: Path, url: str, *, progress: Progress | None = None) -> int:
    """Brings a URL to the state of a complete local folder, the manifest last; see `fetch`.

    Returns how many shards had to be written there. A shard with the same records is left there as
    another machine published it, with its listing, which knows when its files last changed there.

    Raises:
        ValueError: The store cannot be written, or holds other data.
    """
    with manifest.locked(folder, "config.data.cache_dir"):
        complete = manifest.read(folder)
        if complete is None or complete.shards is None:
            raise ValueError(f"{folder} is not prepared to the end, so it cannot go to {url}.")
        return _publish(folder, complete, complete.shards, url, progress)


def _publish(
    folder: Path, complete: Manifest, shards: list[Shard], url: str, progress: Progress | None
) -> int:
    found = manifest_at(url)
    if found is not None:
        manifest.check_same(found, complete, url)
    store, root = _store(url)
    there = {(shard.file, shard.sha256): shard for shard in _shards_of(found)}
    kept = [there.get((shard.file, shard.sha256)) for shard in shards]
    try:
        kept = [shard if shard and _is_there(store, root, shard) else None for shard in kept]
        missing = [shard for shard, old in zip(shards, kept, strict=True) if old is None]
        for done, shard in enumerate(missing, start=1):
            for name, _ in _files(shard):
                _put_file(store, folder / name, f"{root}/{name}")
            if progress is not None:
                progress(done, len(missing))
        if missing or len(there) != len(shards):
            for name in filter(lambda name: (folder / name).exists(), TFDS_FILES):
                _put_file(store, folder / name, f"{root}/{name}")
            merged = [old or shard for shard, old in zip(shards, kept, strict=True)]
            text = dataclasses.replace(complete, shards=merged).to_json()
            store.pipe_file(f"{root}/{manifest.NAME}", text.encode())
    except Exception as error:  # every kind of store raises its own
        raise ValueError(
            f"{SETTING}={url} cannot be written ({_reason(error)}); see to the network and to the "
            f"rights to write there. The shards are complete in {folder}: run the same command "
            "again, or copy that folder."
        ) from error
    return len(missing)


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        store, root = fsspec.core.url_to_fs(url.rstrip("/"))
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{SETTING}={url} is of a kind of store that cannot be opened ({error}); install "
            "what fsspec needs for it, e.g. pip install gcsfs for gs://, s3fs for s3://."
        ) from error
    return store, root


def _shards_of(found: Manifest | None) -> set[Shard]:
    return set(found.shards or ()) if found is not None else set()


def _files(shard: Shard) -> Iterator[tuple[str, str]]:
    """Name and checksum of the two files of a shard."""
    yield shard.file, shard.sha256
    yield shard.listing, shard.listing_sha256


def _fetch_file(store: Any, name: str, path: Path, digest: str, url: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    again = f"write it there again: {manifest.command_for(url)}"
    try:
        store.get_file(name, str(partial))
    except FileNotFoundError as error:
        raise ValueError(
            f"{name} is missing in {SETTING}={url}, but its manifest names it; {again}."
        ) from error
    except Exception as error:  # every kind of store raises its own
        raise ValueError(
            f"{name} cannot be fetched ({_reason(error)}); run the same command again: what was "
            "fetched is kept."
        ) from error
    if manifest.file_sha256(partial) != digest:
        partial.unlink()
        raise ValueError(
            f"{name} in {SETTING}={url} has another checksum than its manifest says; delete it "
            f"there and {again}."
        )
    os.replace(partial, path)


def _is_there(store: Any, root: str, shard: Shard) -> bool:
    names = [f"{root}/{name}" for name, _ in _files(shard)]
    return all(store.exists(name) for name in names) and store.size(names[0]) == shard.bytes


def _put_file(store: Any, path: Path, name: str) -> None:
    store.makedirs(name.rpartition("/")[0], exist_ok=True)
    store.put_file(str(path), name)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
