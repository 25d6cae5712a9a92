"""How pictures become arrays, what a bad file says, and the checks on a list of records."""

import dataclasses
import gc
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ccl_jax.data import limits
from ccl_jax.data.records import (
    Record,
    as_rgb,
    check_files,
    check_records,
    read_image,
    read_mask,
)

RED, BLUE = (200, 10, 30), (20, 40, 220)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def two_pixels(left, right, mode):
    """Two columns of two pixels; a single row would be refused."""
    image = Image.new(mode, (2, 2), left)
    image.paste(right, (1, 0, 2, 2))
    return image


def palette_image():
    image = two_pixels(0, 1, "P")
    image.putpalette([*RED, *BLUE])
    return image


def sixteen_bit(*values, dtype=np.uint16):
    return Image.fromarray(np.array([values] * 2, dtype))


def png(width, height, rows, *, bits=8, colour=0, extra=()):
    """A PNG put together chunk by chunk, whatever its header claims."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def record(image, **changes):
    about = {"dataset": "mine", "class_name": "nut", "label": 0, "key": "mine/nut/1.png"}
    return Record(image=image, **{**about, **changes})


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (encoded(two_pixels(RED, BLUE, "RGB")), RED, BLUE),
        (encoded(two_pixels(7, 250, "L")), (7,) * 3, (250,) * 3),
        (encoded(two_pixels((7, 0), (250, 255), "LA")), (7,) * 3, (250,) * 3),
        (encoded(two_pixels((*RED, 0), (*BLUE, 128), "RGBA")), RED, BLUE),
        (encoded(palette_image()), RED, BLUE),
        (encoded(palette_image(), transparency=bytes([0, 128])), RED, BLUE),
        (encoded(palette_image(), transparency=0), RED, BLUE),
        (encoded(two_pixels(0, 1, "1")), (0,) * 3, (255,) * 3),
        (encoded(two_pixels((0,) * 4, (255, 0, 0, 0), "CMYK"), "TIFF"), (255,) * 3, (0, 255, 255)),
        (encoded(sixteen_bit(65535, 0x1234)), (255,) * 3, (0x12,) * 3),
        (encoded(sixteen_bit(256, 255)), (1,) * 3, (0,) * 3),
        (encoded(sixteen_bit(65535, 0x1234, dtype=">u2"), "TIFF"), (255,) * 3, (0x12,) * 3),
        (encoded(sixteen_bit(65535, 0x1234, dtype=np.int32), "TIFF"), (255,) * 3, (0x12,) * 3),
    ],
    ids=[
        "RGB",
        "L",
        "LA",
        "RGBA",
        "P",
        "P-alpha",
        "P-colour",
        "1",
        "CMYK",
        "I;16",
        "I;16-low",
        "I;16B",
        "I",
    ],
)
def test_every_pixel_format_becomes_rgb_as_documented(data, left, right):
    np.testing.assert_array_equal(read_image(data, None), np.array([[left, right]] * 2, np.uint8))


def png_of_sixteen_bits(values):
    """A grey [w] or colour [w, 3] PNG of two equal rows; Pillow writes no 16-bit colour."""
    width, colour = len(values), 2 if values.ndim == 2 else 0
    return png(width, 2, (b"\0" + values.astype(">u2").tobytes()) * 2, bits=16, colour=colour)


def test_sixteen_bit_grey_and_colour_agree():
    grey = np.array([0, 255, 256, 40000, 65535], np.uint16)
    from_grey = read_image(png_of_sixteen_bits(grey), None)
    from_colour = read_image(png_of_sixteen_bits(np.repeat(grey[:, None], 3, 1)), None)
    np.testing.assert_array_equal(from_grey, from_colour)
    np.testing.assert_array_equal(from_grey[0, :, 0], grey >> 8)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg_of_every_mode_is_read(tmp_path, mode):
    Image.new(mode, (20, 10)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg", 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (4, 4)), "floating-point"),
        (sixteen_bit(0, 65536, dtype=np.int32), "outside 0..65535"),
        (sixteen_bit(0, -1, dtype=np.int32), "outside 0..65535"),
    ],
    ids=["float", "too large", "negative"],
)
def test_pixels_without_a_fixed_range_are_refused_by_name(tmp_path, image, reason):
    image.save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match=rf"depth\.tif.*{reason}.*8 or 16 bits"):
        read_image(tmp_path / "depth.tif", 8)


def test_resizing_is_antialiased_bilinear_and_drops_the_aspect(tmp_path):
    pixels = noise(30, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    want = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), 8), np.asarray(want))
    checkers = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    shrunk = as_rgb(Image.fromarray(checkers.astype(np.uint8)), 4)
    assert abs(shrunk.astype(int) - 127).max() <= 2  # point sampling would give 0 or 255


def test_a_photo_keeps_its_own_size_when_none_is_asked(tmp_path):
    Image.fromarray(noise(30, 50)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", None)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, noise(30, 50))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(noise(30, 50)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", None).shape == (30, 50, 3)


def test_the_first_frame_counts():
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    data = encoded(first, "TIFF", save_all=True, append_images=[second])
    assert tuple(read_image(data, None)[0, 0]) == RED


def test_as_rgb_leaves_the_callers_picture_alone():
    image = palette_image()
    image.info["transparency"] = b"\0"
    as_rgb(image, 2)
    assert image.mode == "P" and image.info["transparency"] == b"\0"


def test_a_record_is_cropped_before_it_is_resized():
    data = encoded(Image.fromarray(noise(20, 30)))
    strip = record(data, crop=(10, 2, 16, 12), mask=encoded(Image.fromarray(noise(20, 30))))
    np.testing.assert_array_equal(read_image(strip, None), noise(20, 30)[2:12, 10:16])
    assert read_mask(strip, None).shape == (10, 6)


@pytest.mark.parametrize("crop", [(0, 0, 31, 5), (5, 5, 5, 9), (-1, 0, 4, 4)])
def test_a_crop_outside_its_picture_is_an_error(crop):
    with pytest.raises(ValueError, match=r"mine/nut/1\.png is 30x20 pixels, so the crop"):
        read_image(record(encoded(Image.fromarray(noise(20, 30))), crop=crop), None)


WHOLE = {suffix: encoded(Image.fromarray(noise(40, 40)), suffix) for suffix in ("PNG", "JPEG")}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty, or not in a known image format"),
        (b"only text in here\n", "empty, or not in a known image format"),
        (WHOLE["PNG"][:20], "(?i)truncated|not in a known image format"),
        (WHOLE["PNG"][: len(WHOLE["PNG"]) // 2], "(?i)truncated"),
        (WHOLE["JPEG"][: len(WHOLE["JPEG"]) // 2], "(?i)truncated"),
        (WHOLE["PNG"][:60] + b"\0\0\0\0" + WHOLE["PNG"][64:], "."),
    ],
    ids=["zero bytes", "text", "header cut", "PNG cut", "JPEG cut", "PNG overwritten"],
)
def test_a_damaged_file_is_one_error_with_name_reason_and_fix(tmp_path, data, reason):
    file = tmp_path / "damaged.png"
    file.write_bytes(data)
    with pytest.raises(
        ValueError, match=f"(?s){reason}.*Replace the file or leave it out"
    ) as error:
        read_image(record(file), 8)
    assert str(error.value).startswith(f"{file} cannot be read as an image: ")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_the_same_error(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png cannot be read .* no such file or directory"):
        read_image(tmp_path / "gone.png", 8)


def test_damaged_bytes_are_named_by_the_records_key():
    with pytest.raises(ValueError, match=r"^mine/nut/1\.png cannot be read as an image"):
        read_image(record(b"nothing"), 8)
    with pytest.raises(ValueError, match=r"^<7 bytes> cannot be read as an image"):
        read_image(b"nothing", 8)


@pytest.mark.parametrize("theirs", [100, None], ids=["lowered", "switched off"])
def test_pillows_limit_is_neither_asked_nor_changed(tmp_path, monkeypatch, theirs):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", theirs)
    for kind in ("png", "tiff", "webp", "jpg", "bmp"):
        Image.new("L", (30, 30)).save(tmp_path / f"large.{kind}")
        assert read_image(tmp_path / f"large.{kind}", 8).shape == (8, 8, 3)
        strip = record(tmp_path / f"large.{kind}", crop=(0, 0, 25, 25))
        assert read_mask(dataclasses.replace(strip, mask=strip.image), None).shape == (25, 25)
    with pytest.raises(ValueError, match="10000000000 pixels"):
        read_image(png(100_000, 100_000, b""), 8)
    assert theirs == Image.MAX_IMAGE_PIXELS


def test_pillows_limit_is_given_back_when_the_last_thread_is_done(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with limits.our_limit:
        with limits.our_limit:
            pass
        assert Image.MAX_IMAGE_PIXELS == limits.MAX_PIXELS // 2
    assert Image.MAX_IMAGE_PIXELS == 100
    with limits.our_limit:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # by other code, in another thread
        with limits.our_limit:
            assert Image.MAX_IMAGE_PIXELS == limits.MAX_PIXELS // 2
    assert Image.MAX_IMAGE_PIXELS == 200


def tiff(width, height, extra=()):
    """A grey TIFF without pixels, whatever its header claims."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 8}
    entries = sorted((tags | dict(extra)).items())
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)


def bitmap(width, height):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def gif(width, height, frame):
    """A GIF whose first frame claims to be larger than the picture."""
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
    dispose = b"\x21\xf9\x04\x08\0\0\0\0"
    return screen + dispose + b"," + struct.pack("<4HB", 0, 0, *frame, 0) + b"\2\2\x44\1\0;"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(100_000, 100_000, b""), r"\(10000000000 pixels\) exceeds limit of 268435456"),
        (tiff(100_000, 100_000), r"\(10000000000 pixels\) exceeds limit of 268435456"),
        (bitmap(100_000, 100_000), r"\(10000000000 pixels\) exceeds limit of 268435456"),
        (png(20_000, 13_500, bytes(300)), r"\(270000000 pixels\) exceeds limit of 268435456"),
        (tiff(64, 64, {322: 40_000, 323: 40_000, 324: 8, 325: 16}.items()), "in each tile"),
        (gif(2, 2, (65_535, 65_535)), r"\(4294836225 pixels\) exceeds limit of 268435456"),
        (png(1, 50, bytes(100)), "1x50 pixels are a line"),
        (png(50, 1, bytes(51)), "50x1 pixels are a line"),
        (png(2000, 4, bytes(8004)), "2000x4 pixels, one side is more than 256 times"),
        (png(4, 2000, bytes(10_000)), "4x2000 pixels, one side is more than 256 times"),
        (png(0, 50, b""), "a side of 0 pixels"),
        (png(50, 0, b""), "a side of 0 pixels"),
    ],
    ids=[
        "PNG",
        "TIFF",
        "BMP",
        "just beyond",
        "TIFF tile",
        "GIF frame",
        "column",
        "row",
        "wide",
        "high",
        "no width",
        "no height",
    ],
)
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_an_absurd_size_is_refused_from_the_header_by_name(tmp_path, kind, data, reason):
    file, photo = tmp_path / "absurd.png", tmp_path / "photo.png"
    file.write_bytes(data)
    Image.new("L", (50, 50)).save(photo)
    both = record(file) if kind == "image" else record(photo, mask=file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for read in (read_image if kind == "image" else read_mask, lambda *_: check_files([both])):
            with pytest.raises(ValueError, match=rf"absurd\.png .*cannot be read .*{reason}"):
                read(both, 8)
    assert not caught


def test_the_largest_pictures_that_pass_are_named_in_the_limits():
    assert 20_000 * 10_000 <= limits.MAX_PIXELS == 16_384**2
    check_files([record(png(20_000, 10_000, b"")), record(png(16_384, 16_384, b""))])
    check_files([record(png(512, 2, b"")), record(png(2, 512, b"")), record(png(2, 2, b""))])


@pytest.mark.slow
def test_a_line_scan_picture_of_20000_by_10000_pixels_is_read(tmp_path):
    """Twice what Pillow would accept; it takes a gigabyte."""
    for kind in ("png", "tiff"):
        Image.new("L", (20_000, 10_000), 9).save(tmp_path / f"scan.{kind}")
        assert (read_image(tmp_path / f"scan.{kind}", 8) == 9).all()


BOMB = zlib.compress(bytes(2**21))


@pytest.mark.parametrize(
    "chunk",
    [(b"zTXt", b"a\0\0" + BOMB), (b"iTXt", b"a\0\1\0\0\0" + BOMB), (b"iCCP", b"a\0\0" + BOMB)],
    ids=["text", "international text", "colour profile"],
)
def test_a_chunk_beside_the_pixels_that_expands_enormously_is_refused_by_name(chunk):
    with pytest.raises(ValueError, match=r"mine/nut/1\.png cannot be read .* too large"):
        read_image(record(png(4, 4, bytes(20), extra=[chunk])), 8)


def test_files_are_closed_after_reading_and_after_failing(tmp_path):
    good, text = tmp_path / "a.png", tmp_path / "b.png"
    good.write_bytes(WHOLE["PNG"])
    text.write_bytes(WHOLE["PNG"][:200])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_mask(record(good, mask=good), 8)
        with pytest.raises(ValueError, match=r"b\.png"):
            read_image(text, 8)
        gc.collect()
    assert not caught


@pytest.mark.parametrize(
    "mask",
    [
        two_pixels(0, 1, "L"),
        two_pixels(0, 255, "L"),
        two_pixels(0, 1, "1"),
        two_pixels((0, 255), (1, 0), "LA"),
        two_pixels((0, 0, 0, 255), (0, 9, 0, 0), "RGBA"),
        two_pixels((0, 0, 0), (128, 0, 0), "RGB"),
        sixteen_bit(0, 1),
        sixteen_bit(0, 70000, dtype=np.int32),
        sixteen_bit(0.0, 0.25, dtype=np.float32),
    ],
    ids=["one", "255", "bit", "LA", "RGBA", "RGB", "16-bit", "32-bit", "float"],
)
def test_every_grey_value_but_zero_is_defect(mask):
    image = encoded(Image.new("RGB", (2, 2)))
    found = read_mask(record(image, mask=encoded(mask, "TIFF")), None)
    np.testing.assert_array_equal(found, np.array([[0, 1]] * 2, np.uint8))


def test_a_palette_mask_counts_by_its_colours():
    mask = two_pixels(0, 1, "P")
    mask.putpalette([0, 0, 0, 128, 0, 0])
    data = encoded(mask, transparency=b"\0\xff")
    found = read_mask(record(encoded(Image.new("RGB", (2, 2))), mask=data), None)
    np.testing.assert_array_equal(found, [[0, 1]] * 2)


def test_a_mask_is_resized_by_pillow_and_cut_at_one_half():
    grey = (np.random.default_rng(1).random((30, 50)) < 0.5).astype(np.uint8)
    want = Image.fromarray(grey * np.uint8(255)).resize((8, 8), Image.Resampling.BILINEAR)
    data = encoded(Image.fromarray(grey))
    found = read_mask(record(encoded(Image.new("RGB", (50, 30))), mask=data), 8)
    np.testing.assert_array_equal(found, np.asarray(want) / 255 > 0.5)
    assert 0 < found.mean() < 1 and found.dtype == np.uint8


def test_a_record_without_mask_has_an_empty_one():
    normal = record(encoded(Image.new("RGB", (5, 3))))
    np.testing.assert_array_equal(read_mask(normal, 4), np.zeros((4, 4), np.uint8))
    np.testing.assert_array_equal(read_mask(normal, None), np.zeros((3, 5), np.uint8))


def test_mask_and_image_of_different_size_are_both_named(tmp_path):
    Image.new("RGB", (50, 30)).save(tmp_path / "photo.png")
    Image.new("L", (30, 50)).save(tmp_path / "photo_mask.png")
    both = record(tmp_path / "photo.png", mask=tmp_path / "photo_mask.png")
    with pytest.raises(
        ValueError, match=r"photo_mask\.png.* 30x50 .*photo\.png is 50x30.*one size"
    ):
        read_mask(both, 8)


def test_a_damaged_mask_is_named(tmp_path):
    (tmp_path / "photo_mask.png").write_bytes(b"")
    both = record(WHOLE["PNG"], mask=tmp_path / "photo_mask.png")
    with pytest.raises(ValueError, match=r"photo_mask\.png \(mask\) cannot be read"):
        read_mask(both, 8)


NUT = record(b"", key="nut/train/1")
NUT_TEST = record(b"", key="nut/test/1", anomalous=True)
GEAR = record(b"", class_name="gear", label=1, key="gear/train/1")


def test_sound_records_pass():
    check_records([NUT, GEAR], [NUT_TEST])
    check_records([NUT], [])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([], [NUT_TEST], "no training images.*train/good"),
        ([NUT, NUT_TEST], [], "1 training images are anomalous, the first is nut/test/1"),
        ([NUT], [dataclasses.replace(NUT_TEST, label=3)], "mine/nut has 0, mine/nut has 3"),
        ([NUT], [dataclasses.replace(GEAR, label=0)], "mine/gear has 0, mine/nut has 0"),
        ([NUT], [GEAR, NUT_TEST], "none to train on: mine/gear"),
        ([NUT, GEAR], [NUT], "2 records have the key nut/train/1"),
    ],
    ids=["nothing", "anomalous", "two labels", "two names", "untrained", "key twice"],
)
def test_records_that_contradict_each_other_are_refused(train, test, message):
    with pytest.raises(ValueError, match=message):
        check_records(train, test)
