"""How large a picture may be before it is decoded, whatever Pillow's own limit is set to."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

from PIL import Image
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

# 16384 x 16384, which as RGB takes 1 GiB in Pillow; WebP ends there too. The 20000 x 10000 pixels
# of a line-scan camera are within, and beyond what Pillow accepts unless it is told to.
MAX_PIXELS = 2**28
MIN_SIDE = 2  # pixels; a single line is what a camera leaves that was stopped
MAX_ASPECT = 256  # beyond it, one pixel of a 256-pixel square stands for more than the short side


def check_shape(image: Image.Image) -> None:
    """Refuses a picture that is opened, and not yet decoded, for its shape; `our_limit` for pixels.

    How much a file expands says nothing: an empty mask is often a thousandth of its pixels.

    Raises:
        ValueError: A side of one pixel, one side more than `MAX_ASPECT` times the other, or too
            many pixels in a tile of a TIFF.
    """
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels are a line, not a picture")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"of {width}x{height} pixels, one side is more than {MAX_ASPECT} times the other; cut "
            "it into pieces"
        )
    tags = getattr(image, "tag_v2", {})
    wide, high = tags.get(TILEWIDTH, 0), tags.get(TILELENGTH, 0)
    if wide * high > MAX_PIXELS:  # the decoder makes room for a whole tile, however small the image
        raise ValueError(f"{wide}x{high} pixels in each tile are more than {MAX_PIXELS}")


class _Bound(int):
    """A limit for Pillow, which warns of pictures above it and refuses those above its double."""

    def __lt__(self, other: object) -> bool:
        return False  # so it does not warn


class _PillowsLimit(AbstractContextManager):
    """Makes Pillow refuse above `MAX_PIXELS`, without a warning, while any thread is within.

    Pillow has one number for the whole process, and compares with it before it makes room, also
    for a frame that is larger than its GIF or a picture in an icon. Other code finds the number
    again as it has set it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._theirs: int | None = None
        self._ours = _Bound(MAX_PIXELS // 2)

    def __enter__(self) -> None:
        with self._lock:
            if Image.MAX_IMAGE_PIXELS is not self._ours:
                self._theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, self._ours
            self._within += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within and Image.MAX_IMAGE_PIXELS is self._ours:
                Image.MAX_IMAGE_PIXELS = self._theirs


our_limit = _PillowsLimit()  # one for the process, as Pillow's number is
