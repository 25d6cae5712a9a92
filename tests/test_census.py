"""What the census finds in miniatures with one fault each: in words, as JSON, as a status."""

import dataclasses
import io
import json
import os
import shutil
import tracemalloc

import miniatures as mini
import numpy as np
import pytest
from conftest import ROOT, write_photos
from PIL import Image

from ccl_jax.data import census
from ccl_jax.data.census import KINDS, look_at, take_census
from ccl_jax.data.census_report import as_json, as_text
from ccl_jax.data.layouts import read_mvtec
from ccl_jax.data.records import Record
from ccl_jax.main import main

SIZE = 32  # the pictures of `write_photos` are 70 x 50


@pytest.fixture
def photos(tmp_path):
    """Two classes, four training images each, and two normal and two anomalous test images."""
    return write_photos(tmp_path / "photos")


def census_of(photos, **settings):
    split = read_mvtec(photos, dataset="mine")
    return take_census(split.train, split.test, **{"image_size": SIZE, "threads": 2} | settings)


def found_in(taken):
    """The findings there are, by kind."""
    return {kind: entries for kind, entries in taken.findings.items() if entries}


def photo(seed=0, size=(70, 50)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def test_a_sound_set_has_no_findings(photos):
    taken = census_of(photos)
    assert found_in(taken) == {}
    assert not taken.spoiled
    assert as_text(taken).endswith("\n\nnothing is wrong")


def cut_off(photos):
    file = photos / "bolt/train/good/001.png"
    file.write_bytes(file.read_bytes()[:2000])
    return file


def no_image(photos):
    file = photos / "felt/test/square/001.png"
    file.write_text("no image")
    return file


def without_a_range(photos):
    Image.new("F", (70, 50)).save(photos / "bolt/test/good/002.tif")
    return photos / "bolt/test/good/002.tif"


@pytest.mark.parametrize("spoil", [cut_off, no_image, without_a_range])
def test_an_image_that_cannot_be_read_is_found_with_its_reason(photos, spoil):
    file = spoil(photos)
    taken = census_of(photos)
    ((name, reason),) = found_in(taken).pop("unreadable_images")
    assert list(found_in(taken)) == ["unreadable_images"] and taken.spoiled
    assert name == str(file)
    assert reason.startswith(str(file)) and len(reason) > len(str(file)) + 20
    assert reason in as_text(taken)


def test_every_bad_file_is_found_not_the_first_alone(photos):
    for file in photos.glob("*/train/good/*.png"):
        file.write_bytes(b"")
    taken = census_of(photos)
    assert {kind: len(found) for kind, found in found_in(taken).items()} == {"unreadable_images": 8}
    assert taken.classes["mine/bolt"].train == 4
    assert taken.classes["mine/bolt"].sizes.total() == taken.classes["mine/bolt"].modes.total() == 4


def test_a_mask_that_cannot_be_read_or_has_another_size_is_found(photos):
    masks = [photos / f"bolt/ground_truth/square/00{i}_mask.png" for i in range(2)]
    masks[0].write_bytes(b"")
    Image.new("L", (50, 70), 255).save(masks[1])
    taken = census_of(photos)
    found = found_in(taken)["unreadable_masks"]
    assert [name for name, _ in found] == list(map(str, masks)) and taken.spoiled
    assert "cannot be read" in found[0][1] and "50x70" in found[1][1]


def test_an_empty_mask_of_an_anomalous_image_is_found(photos):
    mask = photos / "felt/ground_truth/square/000_mask.png"
    Image.new("L", (70, 50)).save(mask)
    taken = census_of(photos)
    assert found_in(taken) == {"empty_masks": [(str(mask), None)]} and taken.spoiled


def with_record(photos, place, **changes):
    """A census of the photos in which one test record is another than the layout says."""
    split = read_mvtec(photos, dataset="mine")
    test = list(split.test)
    test[place] = dataclasses.replace(test[place], **changes)
    return take_census(split.train, test, image_size=SIZE, threads=1)


def test_a_mask_on_a_normal_image_is_found_unless_it_is_empty(photos):
    mask = photos / "bolt/ground_truth/square/000_mask.png"
    taken = with_record(photos, 0, mask=mask)
    assert found_in(taken) == {"marked_normal": [(str(mask), 400 / 3500)]} and taken.spoiled
    Image.new("L", (70, 50)).save(photos / "empty.png")
    assert found_in(with_record(photos, 0, mask=photos / "empty.png")) == {}


def test_an_anomalous_image_without_a_mask_is_found_in_a_class_with_masks(photos):
    taken = with_record(photos, 2, mask=None)
    file = photos / "bolt/test/square/000.png"
    assert found_in(taken) == {"missing_masks": [(str(file), None)]} and taken.spoiled
    shutil.rmtree(photos / "bolt/ground_truth")
    assert found_in(census_of(photos)) == {}


def test_a_mask_that_the_resize_loses_is_found(photos):
    mask = np.zeros((50, 70), np.uint8)
    mask[20, 30] = 255
    file = photos / "bolt/ground_truth/square/001_mask.png"
    Image.fromarray(mask).save(file)
    assert found_in(census_of(photos)) == {"vanishing_masks": [(str(file), 1 / 3500)]}
    assert not census_of(photos).spoiled
    assert "masks that resizing to 32 pixels leaves empty: 1" in as_text(census_of(photos))
    assert found_in(census_of(photos, image_size=50)) == {}


TRAIN, GOOD, BAD = "bolt/train/good/000.png", "bolt/test/good/001.png", "bolt/test/square/001.png"


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        (TRAIN, GOOD, ["train_and_test"]),
        (TRAIN, BAD, ["train_and_test"]),
        (TRAIN, "felt/test/good/000.png", ["train_and_test", "several_classes"]),
        (TRAIN, "bolt/train/good/003.png", ["twice_in_training"]),
        (TRAIN, "felt/train/good/003.png", ["several_classes"]),
        (GOOD, "bolt/test/good/000.png", ["twice_in_test"]),
        (GOOD, BAD, ["normal_and_anomalous", "twice_in_test"]),
        (GOOD, "felt/test/good/000.png", ["several_classes"]),
    ],
)
def test_a_picture_that_is_there_twice_is_found(photos, first, second, kinds):
    shutil.copy(photos / first, photos / second)
    taken = census_of(photos)
    # Training images come first, then test images; each in the order of the layout.
    names = sorted([first, second], key=lambda name: ("/test/" in name, name))
    files = [str(photos / name) for name in names]
    assert found_in(taken) == {kind: [(files[0], files[1:])] for kind in kinds}
    assert taken.spoiled == any(KINDS[kind].spoils for kind in kinds)
    assert " = ".join(files) in as_text(taken)


def test_a_picture_is_the_same_in_another_format_and_not_with_another_pixel(photos):
    with Image.open(photos / TRAIN) as image:
        image.save(photos / "bolt/test/good/777.bmp")
        image.putpixel((3, 3), (1, 2, 3))
        image.save(photos / "bolt/test/good/778.png")
    files = str(photos / TRAIN), [str(photos / "bolt/test/good/777.bmp")]
    assert found_in(census_of(photos)) == {"train_and_test": [files]}


def test_pictures_of_one_content_and_two_shapes_differ(tmp_path):
    paths = [tmp_path / "wide.png", tmp_path / "high.png"]
    for path, size in zip(paths, [(40, 60), (60, 40)], strict=True):
        Image.new("L", size, 7).save(path)
    looks = [look_at(Record(path, "mine", "nut", 0, path.name), SIZE) for path in paths]
    assert looks[0].digest != looks[1].digest


def test_an_image_of_nearly_one_colour_is_found(photos):
    file = photos / "bolt/train/good/002.png"
    noise = np.random.default_rng(0).integers(-1, 2, (50, 70, 3))
    Image.fromarray((np.array([200, 10, 90]) + noise).astype(np.uint8)).save(file)
    ((name, deviation),) = found_in(census_of(photos))["near_constant"]
    assert name == str(file) and 0.7 < deviation < 0.9
    assert not census_of(photos).spoiled


def test_one_channel_that_varies_is_enough(photos):
    values = np.full((50, 70, 3), 90, np.uint8)
    values[:, ::2, 2] = 99  # a deviation of 4.5
    Image.fromarray(values).save(photos / "bolt/train/good/002.png")
    assert found_in(census_of(photos)) == {}


def test_a_long_image_is_found(photos):
    photo(size=(101, 50)).save(photos / "bolt/train/good/002.png")
    photo(size=(100, 50)).save(photos / "bolt/train/good/003.png")
    file = str(photos / "bolt/train/good/002.png")
    assert found_in(census_of(photos)) == {"far_from_square": [(file, (101, 50))]}
    assert not census_of(photos).spoiled


def test_images_that_are_smaller_than_the_config_asks_are_found(photos):
    taken = census_of(photos, image_size=51)
    assert len(taken.findings["enlarged"]) == 16 and not taken.spoiled
    text = as_text(taken)
    assert "images that resizing enlarges, having a side below 51: 16" in text
    assert "and 13 more" in text


def test_every_kind_of_finding_has_a_test():
    with open(__file__) as file:
        text = file.read()
    assert [kind for kind in KINDS if f'"{kind}"' not in text] == []


def test_classes_are_counted_with_sizes_modes_defects_and_masks(photos):
    photo(size=(64, 64)).convert("RGBA").save(photos / "bolt/train/good/000.png")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 9).save(
        photos / "bolt/train/good/001.png"
    )
    (photos / "bolt/test/dent").mkdir()
    (photos / "bolt/ground_truth/dent").mkdir()
    photo(1).save(photos / "bolt/test/dent/000.jpg")
    Image.new("1", (70, 50), 1).save(photos / "bolt/ground_truth/dent/000_mask.png")
    json_ = as_json(census_of(photos))["classes"]
    assert list(json_) == ["mine/bolt", "mine/felt"]
    assert json_["mine/bolt"] == {
        "train_normal": 4,
        "test_normal": 2,
        "test_anomalous": {"dent": 1, "square": 2},
        "sizes": {"min": (40, 40), "median": (70, 50), "max": (64, 64), "different": 3},
        "modes": {"RGB": 7, "RGBA": 1, "I;16": 1},
        "masks": {
            "present": 3,
            "missing": 0,
            "defective_share": {
                "min": pytest.approx(400 / 3500),
                "mean": pytest.approx((1 + 800 / 3500) / 3),
                "max": 1.0,
            },
        },
    }
    row = next(line for line in as_text(census_of(photos)).splitlines() if "bolt" in line)
    assert row.split()[1:5] == ["4", "2", "3", "2"]
    assert "40x40 to 64x64, 3 sizes" in row and "3 of 3" in row and "40.95%" in row


def test_the_crop_of_a_strip_is_what_counts(tmp_path):
    strip = photo(size=(200, 50))
    strip.paste(strip.crop((0, 0, 50, 50)), (150, 0))
    strip.save(tmp_path / "strip.png")
    records = [
        Record(
            tmp_path / "strip.png", "mine", "nut", 0, f"nut/{i}", crop=(50 * i, 0, 50 * i + 50, 50)
        )
        for i in range(4)
    ]
    taken = take_census(records, [], image_size=SIZE, threads=1)
    names = [f"{tmp_path}/strip.png (0, 0, 50, 50)", f"{tmp_path}/strip.png (150, 0, 200, 50)"]
    assert found_in(taken) == {"twice_in_training": [(names[0], names[1:])]}
    assert taken.classes["mine/nut"].sizes == {(50, 50): 4}


def test_bytes_are_named_by_their_key():
    records = [Record(b"nothing", "mine", "nut", 0, "nut/train/1")]
    ((name, reason),) = take_census(records, [], image_size=SIZE, threads=1).findings[
        "unreadable_images"
    ]
    assert name == "nut/train/1" and reason.startswith("nut/train/1 cannot be read")


def test_a_folder_whose_name_is_no_utf8_can_be_printed_and_written(photos):
    no_image(photos)
    odd = photos.with_name(os.fsdecode(b"gr\xfcn"))
    photos.rename(odd)
    taken = census_of(odd)
    assert b"gr\\udcfcn/felt" in as_text(taken).encode()
    assert "gr\\udcfcn/felt" in json.dumps(as_json(taken))


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_nothing(photos, threads):
    no_image(photos)
    shutil.copy(photos / TRAIN, photos / GOOD)
    assert as_json(census_of(photos, threads=threads)) == as_json(census_of(photos, threads=2))


def test_progress_is_told_for_every_record(photos):
    told = []
    census_of(photos, progress=lambda *numbers: told.append(numbers))
    assert told == [(done, 16) for done in range(1, 17)]


def test_no_image_is_kept():
    """200 images of 30 kB each; all that is kept of them, and read at once, takes less than 40."""
    buffer = io.BytesIO()
    photo(size=(100, 100)).save(buffer, "PNG", compress_level=1)
    records = [Record(buffer.getvalue(), "mine", "nut", 0, f"nut/{i}") for i in range(200)]
    take_census(records[:10], [], image_size=SIZE, threads=2)  # what is imported on first use
    tracemalloc.start()
    take_census(records, [], image_size=SIZE, threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 30_000


def test_few_records_are_looked_at_before_their_results_are_taken(monkeypatch):
    looked = []
    monkeypatch.setattr(census, "look_at", lambda record, _: looked.append(record) or census.Look())
    ahead = []
    records = [Record(b"", "mine", "nut", 0, f"nut/{i}") for i in range(500)]
    take_census(
        records,
        [],
        image_size=SIZE,
        threads=2,
        progress=lambda done, _: ahead.append(len(looked) - done),
    )
    assert len(looked) == 500 and max(ahead) <= 8


# --- the command line --------------------------------------------------------------------------


def prepare(photos, *words, check="full", size=64):
    return main(
        [
            "main",
            "--job=prepare",
            f"--config={ROOT / 'configs/folder.py'}",
            f"--config.data.root={photos}",
            f"--config.data.check={check}",
            f"--config.data.image_size={size}",
            "--config.run.progress=False",
            *words,
        ]
    )


def test_the_full_check_prints_the_table_then_the_findings_and_writes_the_rest(
    photos, tmp_path, capsys
):
    bad = cut_off(photos)
    assert prepare(photos, f"--workdir={tmp_path / 'run'}") == 1
    out = capsys.readouterr().out
    order = [
        "2 classes",
        "class ",
        "photos/bolt",
        "photos/felt",
        "error: images that cannot be read",
    ]
    order += [str(bad), "warning: images that resizing enlarges, having a side below 64: 15"]
    order += ["and 12 more", f"{tmp_path}/run/census.json"]
    places = [out.index(text) for text in order]
    assert places == sorted(places)
    written = json.loads((tmp_path / "run/census.json").read_text())
    assert (
        written["roots"] == {"photos": str(photos)}
        and written["image_size"] == 64
        and written["spoiled"]
    )
    assert set(written["findings"]) == set(KINDS)
    unreadable = written["findings"]["unreadable_images"]
    assert (unreadable["severity"], unreadable["count"]) == ("error", 1)
    assert unreadable["files"][0]["file"] == str(bad)
    assert "cannot be read" in unreadable["files"][0]["reason"]
    enlarged = written["findings"]["enlarged"]
    assert (enlarged["severity"], len(enlarged["files"])) == ("warning", 15)
    assert enlarged["files"][0] == {
        "file": str(photos / "bolt/train/good/000.png"),
        "size": [70, 50],
    }
    assert written["classes"]["photos/felt"]["test_anomalous"] == {"square": 2}


def findings(root, tmp_path, layout="mvtec", **settings):
    """Status of the full check, and the files of what it finds wrong, by kind."""
    words = [f"--config.data.{key}={value}" for key, value in settings.items()]
    words += [f"--workdir={tmp_path / 'run'}", f"--config.data.layout={layout}"]
    status = prepare(root, *words)
    written = json.loads((tmp_path / "run/census.json").read_text())["findings"]
    errors = {kind: found["files"] for kind, found in written.items() if KINDS[kind].spoils}
    return status, {kind: [f["file"] for f in files] for kind, files in errors.items() if files}


def full_mask(file, size=(70, 50)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 255).save(file)
    return str(file)


@pytest.mark.parametrize("name", ["000_mask.png", "000.png"])
def test_the_full_check_finds_masks_of_normal_images_in_class_folders(photos, tmp_path, name):
    mask = full_mask(photos / "bolt/ground_truth/good" / name)
    full_mask(photos / "bolt/ground_truth/good/999.png")  # of no image: passed over as ever
    Image.new("L", (70, 50)).save(photos / "bolt/ground_truth/good/001.png")
    assert findings(photos, tmp_path) == (1, {"marked_normal": [mask]})
    assert prepare(photos, check="headers") == 0


def test_the_full_check_finds_masks_of_normal_images_in_lists_and_in_strips(tmp_path):
    root = mini.meta(tmp_path / "meta")
    content = json.loads((root / "meta.json").read_text())
    content["test"]["nut"][0]["mask_path"] = "nut/truth/b.png"
    (root / "meta.json").write_text(json.dumps(content))
    assert findings(root, tmp_path, "meta")[1]["marked_normal"] == [str(root / "nut/truth/b.png")]
    root = mini.manta(tmp_path / "manta")
    mask = full_mask(root / "mechanics/screw/test-pixel/mask/good/010.png", (40, 8))
    assert findings(root, tmp_path, "manta")[1]["marked_normal"] == [mask] * 5  # one a view


def test_blank_masks_of_normal_images_do_not_make_a_class_one_with_masks(photos, tmp_path):
    shutil.rmtree(photos / "bolt/ground_truth/square")
    (photos / "bolt/ground_truth/good").mkdir()
    Image.new("L", (70, 50)).save(photos / "bolt/ground_truth/good/000.png")
    assert findings(photos, tmp_path) == (0, {})


def test_the_full_check_finds_missing_masks_and_other_jobs_stop_at_them(photos, tmp_path, capsys):
    (photos / "bolt/ground_truth/square/000_mask.png").unlink()
    file = str(photos / "bolt/test/square/000.png")
    assert findings(photos, tmp_path) == (1, {"missing_masks": [file]})
    assert prepare(photos, check="headers") == 1
    assert "1 anomalous images" in capsys.readouterr().err


def test_the_full_check_finds_missing_masks_in_lists_and_in_strips(tmp_path):
    root = mini.meta(tmp_path / "meta")
    content = json.loads((root / "meta.json").read_text())
    more = mini.save(mini.picture(seed=8), root / "gear/c.png")
    content["test"]["gear"].append(mini.entry("gear/c.png", defect="dent", anomaly=1))
    (root / "meta.json").write_text(json.dumps(content))
    assert findings(root, tmp_path, "meta")[1]["missing_masks"] == [str(more)]
    root = mini.manta(tmp_path / "manta")
    (root / "mechanics/screw/test-pixel/mask/rust/000.png").unlink()
    missing = findings(root, tmp_path, "manta")[1]["missing_masks"]
    assert [file.split(" (")[0] for file in missing] == [
        str(root / "mechanics/screw/test-pixel/rust/000.png")
    ] * 5


def test_the_full_check_finds_strips_and_masks_of_manta_that_cannot_be_read(tmp_path):
    root = mini.manta(tmp_path / "manta")
    screw = root / "mechanics/screw"
    bad = [screw / "train/good/001.png", screw / "test-pixel/good/010.png"]
    for file in [*bad, screw / "test-pixel/mask/crack/000.png"]:
        file.write_bytes(b"no picture")
    status, errors = findings(root, tmp_path, "manta")
    assert status == 1
    unreadable = [file.split(" (")[0] for file in errors["unreadable_images"]]
    assert unreadable == [str(file) for file in bad for _ in range(5)]
    assert set(errors["unreadable_masks"]) == {str(screw / "test-pixel/mask/crack/000.png")}


def test_the_full_check_tells_what_is_left_aside(photos, tmp_path, capsys):
    shutil.copytree(photos / "felt/test/good", photos / "bolt/train/bad")
    assert prepare(photos, f"--workdir={tmp_path / 'run'}") == 0
    assert "photos: 2 images lie where the layout has none" in capsys.readouterr().out


def test_warnings_alone_end_with_status_0(photos, tmp_path, capsys):
    assert prepare(photos, f"--workdir={tmp_path / 'run'}") == 0
    out = capsys.readouterr().out
    assert "warning: " in out and "error: " not in out


def test_without_a_workdir_the_details_are_written_where_one_is(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert prepare(photos) == 0
    assert json.loads((tmp_path / "census.json").read_text())["spoiled"] is False
    assert str(tmp_path / "census.json") in capsys.readouterr().out


def test_a_workdir_that_cannot_be_written_is_named_before_anything_is_opened(
    photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "ccl_jax.data_jobs.take_census", lambda *_, **__: pytest.fail("opened files")
    )
    (tmp_path / "file").write_text("")
    assert prepare(photos, f"--workdir={tmp_path / 'file/run'}") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_what_cannot_be_listed_is_an_error_as_without_the_check(photos, tmp_path, capsys):
    shutil.rmtree(photos / "bolt/train")
    assert prepare(photos, f"--workdir={tmp_path / 'run'}") == 1
    assert "bolt" in capsys.readouterr().err
    assert not (tmp_path / "run/census.json").exists()


def test_the_quick_check_sees_headers_only(photos, tmp_path, capsys):
    cut_off(photos)
    assert prepare(photos, f"--workdir={tmp_path / 'run'}", check="headers") == 0
    assert "bolt: 4 to train on" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    bad = no_image(photos)
    assert prepare(photos, check="headers") == 1
    assert str(bad) in capsys.readouterr().err


def test_a_training_takes_no_census(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "ccl_jax.data_jobs.take_census", lambda *_, **__: pytest.fail("took a census")
    )
    bad = no_image(photos)
    words = ["main", f"--config={ROOT / 'configs/folder.py'}", f"--config.data.root={photos}"]
    words += [f"--workdir={tmp_path / 'run'}", "--config.data.check=full"]
    assert main([*words, "--config.run.devices=1"]) == 1
    assert str(bad) in capsys.readouterr().err


def test_the_check_may_differ_when_a_workdir_is_continued():
    from ccl_jax import config as configs

    old, new = (configs.read_config_file(ROOT / "configs/demo.py") for _ in range(2))
    new.data.check = "full"
    assert configs.differences(old, new) == ([], ["data.check: 'headers' -> 'full'"])
