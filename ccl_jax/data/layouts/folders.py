"""What lies below a data root: every folder listed once, in order, and nothing from outside."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, NoReturn

from ccl_jax.data.records import Record

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# What macOS, network disks, Linux and Windows leave among the folders of a user.
JUNK = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"})


class Split(NamedTuple):
    """What to train on, what to test on, and the class that each label stands for."""

    train: list[Record]
    test: list[Record]
    class_names: list[str]  # "<dataset>/<class>", by label


class Tree:
    """The folders and images below a data root, sorted by name, each folder listed only once.

    Passed over are hidden files, `JUNK`, and files that do not end like an image (in any case: png
    jpg jpeg bmp tif tiff webp). A symbolic link may lead anywhere within the root. One that leads
    out of it is refused, in a folder as in metadata, unless `follow_links`. The root itself may be
    a link, and files of metadata may lie anywhere. Refused as well are links to nothing, and names
    that are not UTF-8.

    `for_census` asks the readers for what a census judges and a training does not see: masks of
    normal images are kept, and masks that are missing, or bad, are no error.

    Raises:
        ValueError: From every method, for any of these, or a folder that cannot be read; here
            where the root is not a folder.
    """

    def __init__(self, root: Path, *, follow_links: bool = False, for_census: bool = False) -> None:
        self.for_census = for_census
        self.root = Path(os.path.abspath(root))  # resolve() would name the target of a link
        if not self.root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise ValueError(
                f"The data folder {root} {what}; name the folder that holds one folder per class: "
                "--config.data.root=/path/to/photos."
            )
        self._target = os.path.realpath(self.root)
        self._follow_links = follow_links
        self._listed: dict[Path, dict[str, os.DirEntry[str]]] = {}
        self._entered: dict[tuple[Path, str], Path | None] = {}  # once for all files of a folder

    def folders(self, folder: Path) -> list[Path]:
        """Folders directly in a folder; none where there is no folder."""
        return [folder / entry.name for entry in self._visible(folder) if _is_folder(entry)]

    def images(self, folder: Path) -> list[Path]:
        """Image files directly in a folder; none where there is no folder."""
        found = []
        for entry in self._visible(folder):
            if entry.name.lower().endswith(EXTENSIONS):
                self._check_link(entry)
                if entry.is_file():
                    found.append(folder / entry.name)
        return found

    def find(self, base: Path, relative: str, where: str) -> Path | None:
        """The file that metadata name, relative to the folder `base`; None where there is none.

        `where` says in errors which entry of which file it was.
        """
        above, _, name = relative.rpartition("/")
        if (base, above) not in self._entered:
            if _leads_out(above):
                _refuse(base, relative, where)
            self._entered[base, above] = self._enter(base, PurePosixPath(above).parts)
        if relative.startswith("/") or _leads_out(name):
            _refuse(base, relative, where)
        folder = self._entered[base, above]
        entry = self._entry(folder, name) if folder is not None else None
        if folder is None or entry is None:
            return None
        self._check_link(entry)
        return folder / entry.name if entry.is_file() else None

    def _enter(self, base: Path, names: tuple[str, ...]) -> Path | None:
        folder = base
        for name in names:
            entry = self._entry(folder, name)
            if entry is None or not _is_folder(entry):
                return None
            folder = folder / entry.name
        return folder

    def _entry(self, folder: Path, name: str) -> os.DirEntry[str] | None:
        entries = self._listing(folder)
        if name in entries or name.isascii():
            return entries.get(name)
        # An accent may be stored as one character or as two, and archives change it.
        return next((e for e in entries.values() if composed(e.name) == composed(name)), None)

    def _visible(self, folder: Path) -> list[os.DirEntry[str]]:
        """Entries of a folder, sorted, without hidden ones and junk."""
        found = []
        for name, entry in self._listing(folder).items():
            if name.startswith(".") or name in JUNK:
                continue
            if not name.isascii():
                _check_name(folder, name)
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise ValueError(
                    f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist; "
                    "bring that back, or delete the link."
                )
            found.append(entry)
        return sorted(found, key=lambda entry: (composed(entry.name), entry.name))

    def _listing(self, folder: Path) -> dict[str, os.DirEntry[str]]:
        """All entries of a folder by name; none where there is no folder."""
        if folder not in self._listed:
            if folder != self.root:
                self._listing(folder.parent)  # a link on the way there is checked as well
                if folder.is_symlink():
                    self._check_target(str(folder))
            try:
                with os.scandir(folder) as entries:
                    self._listed[folder] = {entry.name: entry for entry in entries}
            except (FileNotFoundError, NotADirectoryError):
                self._listed[folder] = {}
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise ValueError(
                    f"{folder} cannot be listed: {reason}; make it readable, or take it out."
                ) from error
        return self._listed[folder]

    def _check_link(self, entry: os.DirEntry[str]) -> None:
        if entry.is_symlink():
            self._check_target(entry.path)

    def _check_target(self, path: str) -> None:
        target = os.path.realpath(path)
        if not self._follow_links and not Path(target).is_relative_to(self._target):
            raise ValueError(
                f"{path} is a link to {target}, outside of the data folder {self.root}; copy the "
                "files there, or permit such links: --config.data.follow_links=True."
            )


def composed(name: str) -> str:
    """The name with every accented letter as one character, the same on every machine."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def key_of(dataset: str, base: Path, image: Path) -> str:
    """The key of the record of an image: the data set, then the path below `base`."""
    below = str(image).removeprefix(str(base)).lstrip(os.sep)  # relative_to is slow by thousands
    return composed(f"{dataset}/{below.replace(os.sep, '/')}")


def choose_classes(found: Collection[str], wanted: Sequence[str], holder: str) -> list[str]:
    """The wanted ones of the found classes, or all of them, sorted.

    Raises:
        ValueError: One is not there; `holder` says where it was looked for ("... has no such ...").
    """
    wanted = [composed(name) for name in wanted]
    names = sorted(found)
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(
                f"config.data.classes names '{name}', but {holder}; {hint}"
                f"there are: {', '.join(names)}."
            )
    return [name for name in names if not wanted or name in wanted]


def plain_images(path: Path) -> list[Path]:
    """The image itself, or all images in the folder and below, sorted.

    Raises:
        ValueError: Nothing there, or a folder without an image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; name an image or a folder of images, "
            "e.g. --config.predict.input=photos."
        )
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.name.lower().endswith(EXTENSIONS)
        and file.is_file()
        and not any(part.startswith(".") or part in JUNK for part in file.relative_to(path).parts)
    ]
    if not found:
        raise ValueError(
            f"{path} and the folders in it hold no image; names must end in "
            f"{', '.join(EXTENSIONS)}."
        )
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Of a link in a circle, the entry's own is_dir raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _leads_out(path: str) -> bool:
    return path.startswith("/") or ".." in path.split("/") or bool(PureWindowsPath(path).drive)


def _refuse(base: Path, relative: str, where: str) -> NoReturn:
    raise ValueError(
        f"{where} names the file {relative!r}, which is absolute or leads out of the data folder; "
        f"write it relative to {base}, without '..'."
    )


def _check_name(folder: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{folder} holds a name that is not UTF-8, {name!r}; rename it, "
            "e.g. with convmv -f latin1 -t utf8."
        ) from error
