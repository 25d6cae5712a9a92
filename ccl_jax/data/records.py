"""One picture of a data set: what is known about it, how it is read, and the checks it passes."""

from __future__ import annotations

import abc
import errno
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from ccl_jax.data import limits


class StoreError(ValueError):
    """What holds the pictures is broken, not one of them: it stops, whatever is to be skipped."""


# Of the machine or its storage, so that every further file would fail alike.
BROKEN_STORE = {
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class Stored(abc.ABC):
    """Encoded bytes that lie within a larger file, such as a shard; light, and can be pickled."""

    __slots__ = ()

    @abc.abstractmethod
    def read(self) -> bytes:
        """The bytes, read anew at every call; a StoreError names the file that they lie in."""


Source = Path | str | bytes | Stored


@dataclass(frozen=True, slots=True)
class Record:
    """A photograph and its ground truth, not yet read.

    `label` numbers the pairs of (dataset, class_name); `key` names the record in reports and
    stays the same wherever the data lies.
    """

    image: Path | bytes | Stored  # a file, or the encoded bytes of one
    dataset: str
    class_name: str
    label: int
    key: str
    mask: Path | bytes | Stored | None = None
    anomalous: bool = False
    defect: str = "good"
    sample: str = ""  # the physical part, where several views show one
    view: str = ""
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom; None: all of it


def read_image(source: Record | Source, size: int | None) -> UInt8[np.ndarray, "h w 3"]:
    """RGB in 0..255, resized to a `size` x `size` square, or in its own size where that is None.

    Resizing is Pillow's antialiased bilinear filter and does not keep the aspect, as in the
    reference. Pictures that are not 8-bit RGB become so like this:

    - grey ("L", "LA", "1") is repeated over the channels; "1" becomes 0 and 255;
    - 16-bit grey ("I;16", "I") keeps its high byte, 65535 -> 255, as Pillow does for 16-bit
      colour. A 12-bit camera that does not fill the 16 bits comes out dark: rescale first;
    - transparency ("RGBA", "LA", "P") is dropped, not blended: the stored colours count;
    - a palette ("P") is looked up; "CMYK" is converted without a colour profile;
    - of several frames the first counts;
    - EXIF orientation is not applied, as in the reference: masks belong to the stored raster.

    Raises:
        ValueError: The file cannot be decoded, is larger than `limits` allow, or has a pixel format
            without a 0..255 meaning; the text names it. A StoreError: no file could be read.
    """
    image = read_stored(source)
    try:
        return as_rgb(image, size)
    except ValueError as error:
        raise ValueError(f"{_name_and_data(source)[0]}: {error}") from error


def read_stored(source: Record | Source) -> Image.Image:
    """The picture as it is stored, decoded and cropped: in its own mode and size.

    Raises:
        ValueError: The file cannot be decoded, or is larger than `limits` allow.
    """
    name, data = _name_and_data(source)
    crop = source.crop if isinstance(source, Record) else None
    return _cropped(_decode(data, name), crop, name)


def as_rgb(image: Image.Image, size: int | None) -> UInt8[np.ndarray, "h w 3"]:
    """An opened picture converted and resized as `read_image` says."""
    if image.mode.startswith("I"):
        image = Image.fromarray(_high_byte(np.asarray(image)))
    elif image.mode == "F":
        raise ValueError(
            "floating-point pixels have no fixed range; save the image with 8 or 16 bits."
        )
    image = _opaque(image, "RGB")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def read_mask(record: Record, size: int | None) -> UInt8[np.ndarray, "h w"]:
    """Ground truth, 1 on defects and 0 elsewhere; all 0 for a record without a mask.

    Any picture format will do: every grey value but 0 is defect, so store masks without loss
    (the noise of JPEG would count). Resized as the reference does: 0 and 255 through Pillow's
    bilinear filter, then above one half.

    Raises:
        ValueError: The mask cannot be decoded, or its size is not that of its image.
    """
    if record.mask is None:
        shape = read_image(record, None).shape[:2] if size is None else (size, size)
        return np.zeros(shape, np.uint8)
    name = str(record.mask) if isinstance(record.mask, Path) else record.key
    image_name, image_data = _name_and_data(record)
    mask = _decode(record.mask, f"{name} (mask)")
    image_size = _decode(image_data, image_name, only_size=True).size
    _check_mask_size(name, mask.size, image_name, image_size)
    # A wide integer or a float may be small and still not 0, so these are compared as they are.
    grey = mask if mask.mode[0] in "IF" else _opaque(mask, "L")
    binary = Image.fromarray(np.where(np.asarray(grey) != 0, 255, 0).astype(np.uint8))
    binary = _cropped(binary, record.crop, name)
    if size is not None:
        binary = binary.resize((size, size), Image.Resampling.BILINEAR)
    return (np.asarray(binary) > 127.5).astype(np.uint8)


def picture_size(source: Record | Source) -> tuple[int, int]:
    """Width and height of the whole picture in pixels, from its header; a crop does not count.

    Raises:
        ValueError: The header cannot be read; the text names the file.
    """
    name, data = _name_and_data(source)
    return _decode(data, name, only_size=True).size


def check_records(train: Sequence[Record], test: Sequence[Record]) -> None:
    """Compares what training will see with what evaluation will ask.

    Raises:
        ValueError: Nothing to train on, an anomalous training image, two labels for one class or
            two classes for one label, a tested class without training images, or a key used twice.
    """
    if not train:
        raise ValueError("There are no training images; put normal photos in <class>/train/good.")
    anomalous = [record.key for record in train if record.anomalous]
    if anomalous:
        raise ValueError(
            f"{len(anomalous)} training images are anomalous, the first is {anomalous[0]}; "
            "training takes normal images only, so move them to the test images."
        )
    _check_labels([*train, *test])
    trained = {record.label for record in train}
    untrained = sorted({class_of(record) for record in test if record.label not in trained})
    if untrained:
        raise ValueError(
            f"{len(untrained)} classes have test images but none to train on: "
            f"{', '.join(untrained)}; add normal photos to their train/good, or leave them out "
            "with --config.data.classes."
        )
    key, uses = Counter(record.key for record in [*train, *test]).most_common(1)[0]
    if uses > 1:
        raise ValueError(f"{uses} records have the key {key}; a key must name one record.")


def check_files(records: Sequence[Record]) -> None:
    """Opens every image and mask as far as its size, so that a bad one is found before a long run.

    A picture that is cut off behind its header still passes; reading it names it later.

    Raises:
        ValueError: A file is no picture, or a mask has not the size of its image; the text names
            the first and how many there are.
    """
    problems = []
    for record in records:
        try:
            _check_headers(record)
        except StoreError:
            raise
        except ValueError as error:
            problems.append(str(error))
    if problems:
        count = f"{len(problems)} of {len(records)} pictures are bad; the first: "
        raise ValueError((count if len(problems) > 1 else "") + problems[0])


def _check_headers(record: Record) -> None:
    name, data = _name_and_data(record)
    size = _decode(data, name, only_size=True).size
    if record.mask is not None:
        mask_name = str(record.mask) if isinstance(record.mask, Path) else record.key
        mask = _decode(record.mask, f"{mask_name} (mask)", only_size=True)
        _check_mask_size(mask_name, mask.size, name, size)


def _check_mask_size(
    name: str, size: tuple[int, int], image_name: str, image_size: tuple[int, int]
) -> None:
    if size != image_size:
        raise ValueError(
            f"{name} (mask) is {_times(size)} pixels, but its image {image_name} is "
            f"{_times(image_size)}; a mask marks the pixels of its image, so save both in one size."
        )


def class_of(record: Record) -> str:
    """`dataset/class_name`, the name of a class in results."""
    return f"{record.dataset}/{record.class_name}"


def _check_labels(records: Sequence[Record]) -> None:
    pairs = sorted({(class_of(record), record.label) for record in records})
    labels_of = Counter(name for name, _ in pairs)
    names_of = Counter(label for _, label in pairs)
    wrong = [(name, label) for name, label in pairs if labels_of[name] > 1 or names_of[label] > 1]
    if wrong:
        listed = ", ".join(f"{name} has {label}" for name, label in wrong)
        raise ValueError(
            f"Class names and labels do not go together: {listed}; number the classes once, for "
            "training and test images alike."
        )


def _name_and_data(source: Record | Source) -> tuple[str, Source]:
    data = source.image if isinstance(source, Record) else source
    if isinstance(data, Path | str):
        return str(data), data
    data = data.read() if isinstance(data, Stored) else data
    return (source.key if isinstance(source, Record) else f"<{len(data)} bytes>"), data


def _decode(data: Source, name: str, *, only_size: bool = False) -> Image.Image:
    """The picture with its pixels loaded and its file closed; a bad file is one ValueError."""
    data = data.read() if isinstance(data, Stored) else data
    try:
        source = BytesIO(data) if isinstance(data, bytes) else data
        with limits.our_limit, Image.open(source) as image:
            limits.check_shape(image)
            if not only_size:
                image.load()
            return image
    except MemoryError:
        raise  # which says nothing about the file
    except Exception as error:  # damaged data makes decoders raise nearly anything
        if isinstance(error, OSError) and error.errno in BROKEN_STORE:
            raise StoreError(
                f"{name} cannot be read: {_reason(error)}. That is no fault of the file; see to "
                "the disk or network that it lies on, or to the limits of this process (ulimit "
                "-n), and run the same command again."
            ) from error
        raise ValueError(
            f"{name} cannot be read as an image: {_reason(error)}. Replace the file or leave it "
            "out; no image is skipped silently."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or not in a known image format, or has a side of 0 pixels"
    if isinstance(error, Image.DecompressionBombError):
        return str(error).partition(", could")[0].lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    if "transparency" in image.info:  # Pillow warns where it has to drop this itself
        image = image.copy()
        del image.info["transparency"]
    return image.convert(mode)


def _high_byte(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels outside 0..65535; save the image with 8 or 16 bits.")
    return (values >> 8).astype(np.uint8)


def _cropped(image: Image.Image, crop: tuple[int, int, int, int] | None, name: str) -> Image.Image:
    if crop is None:
        return image
    left, top, right, bottom = crop
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise ValueError(
            f"{name} is {_times(image.size)} pixels, so the crop {crop} "
            "(left, top, right, bottom) is empty or outside; give the record a crop inside."
        )
    with limits.our_limit:
        return image.crop(crop)


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
