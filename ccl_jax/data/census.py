"""Every file of a data set opened once: what each class holds, and what is wrong with it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageStat

from ccl_jax.data.records import Record, as_rgb, class_of, read_mask, read_stored

# Grey levels of 255, of the channel that varies most: about the noise of a camera whose lens is
# covered. The flattest photographs of asphalt that were tried have 6.
NEAR_CONSTANT = 2.0
FAR_FROM_SQUARE = 2.0  # longer by shorter side; resizing to a square does not keep it


class Kind(NamedTuple):
    """Something that can be wrong."""

    spoils: bool  # a training or its evaluation; False: look at it, it may be as it should
    words: str  # {size}: that of the config
    detail: str  # what is known of each picture beside its file


KINDS = {
    "unreadable_images": Kind(True, "images that cannot be read", "reason"),
    "unreadable_masks": Kind(True, "masks that cannot be read or fit no image", "reason"),
    "train_and_test": Kind(True, "pictures that are both trained on and tested", "same_as"),
    "normal_and_anomalous": Kind(True, "pictures tested as normal and as anomalous", "same_as"),
    "empty_masks": Kind(True, "masks of anomalous images that mark nothing", ""),
    "marked_normal": Kind(True, "masks of normal images that mark something", "share"),
    "missing_masks": Kind(True, "anomalous images without a mask in a class with masks", ""),
    "several_classes": Kind(False, "pictures that are in several classes", "same_as"),
    "twice_in_training": Kind(False, "pictures that a class trains on more than once", "same_as"),
    "twice_in_test": Kind(False, "pictures that a class tests more than once", "same_as"),
    "vanishing_masks": Kind(False, "masks that resizing to {size} pixels leaves empty", "share"),
    "near_constant": Kind(
        False, f"images of one colour (deviation below {NEAR_CONSTANT:g} of 255)", "deviation"
    ),
    "far_from_square": Kind(
        False, f"images that resizing squeezes, being over {FAR_FROM_SQUARE:g} : 1", "size"
    ),
    "enlarged": Kind(False, "images that resizing enlarges, having a side below {size}", "size"),
}


class Look(NamedTuple):
    """What one record is like; its pixels are forgotten."""

    problem: str = ""  # why the image cannot be read; then nothing else is known of it
    size: tuple[int, int] = (0, 0)  # width, height, of the crop where there is one
    mode: str = ""  # Pillow's, as stored
    digest: bytes = b""
    deviation: float = 0.0  # in grey levels, of the channel that varies most
    mask_problem: str = ""
    share: float = 0.0  # of the pixels that are defective
    vanishes: bool = False  # nothing of the mask is left at the size of the config


@dataclass
class ClassCount:
    """What a class holds."""

    train: int = 0
    test_normal: int = 0
    test_anomalous: Counter[str] = field(default_factory=Counter)  # by kind of defect
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # width, height
    modes: Counter[str] = field(default_factory=Counter)
    masks: int = 0  # of anomalous images
    missing: list[Record] = field(default_factory=list)  # anomalous test images without a mask
    shares: list[float] = field(default_factory=list)  # of anomalous images' pixels


@dataclass
class Census:
    """All that was found; `findings` holds (file, detail) by the kinds in `KINDS`."""

    image_size: int
    classes: dict[str, ClassCount] = field(default_factory=dict)
    findings: dict[str, list[tuple[str, Any]]] = field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )

    @property
    def spoiling(self) -> int:
        """How many findings would spoil a training or its evaluation."""
        return sum(len(found) for kind, found in self.findings.items() if KINDS[kind].spoils)

    @property
    def spoiled(self) -> bool:
        """Whether there is any such finding."""
        return self.spoiling > 0


def take_census(
    train: Sequence[Record],
    test: Sequence[Record],
    *,
    image_size: int,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Census:
    """Decodes every image and mask, and compares them; a bad one is a finding, not an error.

    Two images are one picture where their pixels are equal after the conversion to RGB (and the
    crop), before resizing: whatever their names, formats, compression and metadata. Threads, as
    decoding and hashing leave Python's lock: measured as fast as processes, which would start
    slowly. Memory is a few hundred bytes a record. `progress` is called with (done, total).
    """
    census = Census(image_size)
    alike: dict[bytes, list[int]] = defaultdict(list)
    records = [*train, *test]
    for record in sorted(records, key=lambda record: record.label):
        census.classes.setdefault(class_of(record), ClassCount())
    for index, look in enumerate(_looks(records, image_size, threads)):
        _count(census, records[index], look, trained=index < len(train))
        _judge(census, records[index], look)
        if not look.problem:
            alike[look.digest].append(index)
        if progress is not None:
            progress(index + 1, len(records))
    for count in census.classes.values():
        if count.masks:
            census.findings["missing_masks"] += [(file_of(r), None) for r in count.missing]
    _compare(census, records, len(train), [same for same in alike.values() if len(same) > 1])
    return census


def look_at(record: Record, image_size: int) -> Look:
    """Decodes the image and the mask of a record; never raises for a bad file."""
    try:
        image = read_stored(record)
        try:
            pixels = as_rgb(image, None)
        except ValueError as error:
            raise ValueError(f"{file_of(record)}: {error}") from error
    except ValueError as error:
        return Look(problem=str(error))
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.data)
    look = Look(
        size=image.size,
        mode=image.mode,
        digest=digest.digest(),
        deviation=max(ImageStat.Stat(Image.fromarray(pixels)).stddev),
    )
    if record.mask is None:
        return look
    try:
        share = float(np.mean(read_mask(record, None)))
        vanishes = share > 0 and not read_mask(record, image_size).any()
    except ValueError as error:
        return look._replace(mask_problem=str(error))
    return look._replace(share=share, vanishes=vanishes)


def file_of(record: Record) -> str:
    """The file of an image, with the crop that the record is of, or its key where it is no file."""
    if not isinstance(record.image, Path):
        return record.key
    return str(record.image) + (f" {record.crop}" if record.crop else "")


def _looks(records: Sequence[Record], image_size: int, threads: int) -> Iterator[Look]:
    """Looks in the order of the records, few at a time: a future for each would be memory."""
    waiting: deque[Future[Look]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for record in records:
            if len(waiting) >= 4 * threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(look_at, record, image_size))
        while waiting:
            yield waiting.popleft().result()


def _count(census: Census, record: Record, look: Look, *, trained: bool) -> None:
    count = census.classes[class_of(record)]
    if trained:
        count.train += 1
    elif record.anomalous:
        count.test_anomalous[record.defect] += 1
    else:
        count.test_normal += 1
    if not look.problem:
        count.sizes[look.size] += 1
        count.modes[look.mode] += 1
    if record.anomalous and record.mask is not None:
        count.masks += 1
    elif record.anomalous:
        count.missing.append(record)
    if record.mask is not None and record.anomalous and not look.problem and not look.mask_problem:
        count.shares.append(look.share)


def _judge(census: Census, record: Record, look: Look) -> None:
    """Findings about one record alone."""
    found = census.findings
    image = file_of(record)
    if look.problem:
        found["unreadable_images"].append((image, look.problem))
        return
    if max(look.size) > FAR_FROM_SQUARE * min(look.size):
        found["far_from_square"].append((image, look.size))
    if min(look.size) < census.image_size:
        found["enlarged"].append((image, look.size))
    if look.deviation < NEAR_CONSTANT:
        found["near_constant"].append((image, round(look.deviation, 3)))
    if record.mask is None:
        return
    mask = str(record.mask) if isinstance(record.mask, Path) else f"{record.key} (mask)"
    if look.mask_problem:
        found["unreadable_masks"].append((mask, look.mask_problem))
    elif record.anomalous and look.share == 0:
        found["empty_masks"].append((mask, None))
    elif not record.anomalous and look.share > 0:
        found["marked_normal"].append((mask, look.share))
    elif look.vanishes:
        found["vanishing_masks"].append((mask, look.share))


def _compare(
    census: Census, records: Sequence[Record], trained: int, groups: Sequence[Sequence[int]]
) -> None:
    """Findings about groups of records with one picture; the first `trained` are for training."""
    for group in groups:
        places = [(index >= trained, class_of(records[index])) for index in group]
        tested = [records[index] for index in group if index >= trained]
        repeated = {in_test for (in_test, _), times in Counter(places).items() if times > 1}
        holds = {
            "train_and_test": 0 < len(tested) < len(group),
            "normal_and_anomalous": len({record.anomalous for record in tested}) > 1,
            "several_classes": len({name for _, name in places}) > 1,
            "twice_in_training": False in repeated,
            "twice_in_test": True in repeated,
        }
        files = [file_of(records[index]) for index in group]
        for kind in (kind for kind, true in holds.items() if true):
            census.findings[kind].append((files[0], files[1:]))
