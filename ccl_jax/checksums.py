"""Checksums of the files of a folder, in the form that `sha256sum -c SHA256SUMS` reads."""

import hashlib
import os
from pathlib import Path

NAME = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Writes SHA256SUMS into a folder: a line "<sha256>  <relative path>" for every file below it.

    It is there complete or not at all, also after a loss of power. Raises OSError where a file
    cannot be read, or the disk refuses.
    """
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    partial = folder / f".{NAME}.partial"
    with partial.open("w") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / NAME)


def check_checksums(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing or not as it was written.

    A folder without SHA256SUMS passes (one that an earlier version wrote); files that are not
    listed are not looked at. Reads every byte of the others.
    """
    try:
        lines = (folder / NAME).read_text().splitlines()
    except FileNotFoundError:
        return
    if not lines:
        raise ValueError(f"{NAME} is empty")
    for line in lines:
        wanted, separator, name = line.partition("  ")
        if len(wanted) != 64 or not separator or not name:
            raise ValueError(f"{NAME} has the line {line[:80]!r}, so it is cut off or was changed")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _digest(folder / name) != wanted:
            raise ValueError(f"{name} is not what was written, by its sha256: cut off or changed")


def _files(folder: Path) -> list[Path]:
    skipped = {NAME, f".{NAME}.partial"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in skipped)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
