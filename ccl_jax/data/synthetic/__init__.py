"""The generated benchmark: ten products with defects and masks, written once in MVTec layout.

Pairs of products share their local texture, and some defects of one product are what is normal on
another, so that one detector for all of them can take one for another; `products.PRODUCTS` says
which. Pose, colour, light and sensor noise vary from picture to picture.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import numpy as np
from PIL import Image

from ccl_jax.data.synthetic.products import PRODUCTS, anomalous_picture, normal_picture

GENERATOR = 1  # goes up with every change of the pictures, so that old ones are not taken for new
_MANIFEST = "synthetic.json"
_GOLDEN_RATIO = 0.5 * (5**0.5 - 1)
_SUBTLEST = 0.3  # strength of the faintest defects


def class_names() -> tuple[str, ...]:
    """The names of the products, sorted: one folder each."""
    return tuple(sorted(PRODUCTS))


def defect_names(class_name: str) -> tuple[str, ...]:
    """The kinds of defect of a product: one test folder each."""
    return PRODUCTS[class_name].defects


def strength_of(index: int) -> float:
    """How gross the i-th picture's defect is, in [0.3, 1): any few in a row spread over the range.

    Below that a person hardly sees it at 128 pixels.
    """
    return _SUBTLEST + (1 - _SUBTLEST) * ((0.5 + index * _GOLDEN_RATIO) % 1)


def write_benchmark(
    root: Path,
    *,
    image_size: int,
    train_per_class: int,
    test_normal_per_class: int,
    test_per_defect: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Returns the folder with the benchmark, written first unless it is there already.

    A folder appears complete or not at all, also where several processes ask at once: the others
    wait. Equal arguments give equal pictures; asking for more pictures changes none of the first.
    `progress(done, total)` is called after every picture.

    Raises:
        ValueError: An argument is out of range, or the folder holds something else, such as a
            benchmark written with other arguments; the text says what differs.
    """
    wanted = {
        "generator": GENERATOR,
        "image_size": image_size,
        "train_per_class": train_per_class,
        "test_normal_per_class": test_normal_per_class,
        "test_per_defect": test_per_defect,
        "seed": seed,
    }
    _check(wanted)
    root = Path(root).absolute()
    if _is_there(root, wanted):  # before the lock: a finished benchmark may lie where none can be
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root.parent / f".{root.name}.lock"):
        if _is_there(root, wanted):
            return root
        partial = root.parent / f".{root.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while writing
        try:
            _write(partial, wanted, progress)
            if root.exists():
                root.rmdir()  # empty, or _is_there would have raised
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return root


def _check(wanted: dict[str, int]) -> None:
    least = {"image_size": 32, "seed": 0, "generator": 1}
    for name, value in wanted.items():
        if value < least.get(name, 1):
            raise ValueError(
                f"config.synthetic.{name}={value} is too small; use {least.get(name, 1)} or more, "
                f"e.g. --config.synthetic.{name}={max(5, least.get(name, 1))}."
            )


def _is_there(root: Path, wanted: dict[str, int]) -> bool:
    """Whether the folder holds this benchmark; raises ValueError where it holds anything else."""
    elsewhere = f"choose another folder, e.g. --config.data.root={root}-2"
    if not root.is_dir():
        if root.exists():
            raise ValueError(f"{root} is a file, but the benchmark needs a folder; {elsewhere}.")
        return False
    manifest = root / _MANIFEST
    if not manifest.exists():
        if any(root.iterdir()):
            raise ValueError(
                f"{root} holds files, but no benchmark ({_MANIFEST} is missing); {elsewhere}, or "
                f"use the images that are there: --config.data.layout=mvtec."
            )
        return False
    try:
        found = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{manifest} cannot be read ({error}); delete the benchmark to have it written "
            f"again: rm -r {root}"
        ) from error
    differing = [
        f"{name}={found.get(name)} instead of {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{root} holds a benchmark generated with {', '.join(differing)}; {elsewhere}, or "
            f"delete it to have it written again: rm -r {root}"
        )
    return True


def _write(root: Path, wanted: dict[str, int], progress: Callable[[int, int], None] | None) -> None:
    pictures = list(_pictures(wanted))
    for done, (class_name, split, index) in enumerate(pictures, start=1):
        _write_picture(root / class_name, class_name, split, index, wanted)
        if progress is not None:
            progress(done, len(pictures))
    (root / _MANIFEST).write_text(json.dumps(wanted, indent=2) + "\n")


def _pictures(wanted: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    """Class, split (as its folder) and number of every picture."""
    for class_name in class_names():
        counts = {
            "train/good": wanted["train_per_class"],
            "test/good": wanted["test_normal_per_class"],
        }
        counts |= {f"test/{d}": wanted["test_per_defect"] for d in defect_names(class_name)}
        for split, count in counts.items():
            for index in range(count):
                yield class_name, split, index


def _write_picture(
    folder: Path, class_name: str, split: str, index: int, wanted: dict[str, int]
) -> None:
    size, defect = wanted["image_size"], split.split("/")[1]
    seed = (wanted["seed"], zlib.crc32(class_name.encode()), zlib.crc32(split.encode()), index)
    if defect == "good":
        picture = normal_picture(class_name, size, seed)
    else:
        picture, mask = anomalous_picture(class_name, defect, strength_of(index), size, seed)
        _save(folder / "ground_truth" / defect / f"{index:03d}_mask.png", mask)
    _save(folder / split / f"{index:03d}.png", picture)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)  # noise hardly shrinks at higher levels
