import dataclasses
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT, write_photos
from PIL import Image

from ccl_jax.data import builders, manifest
from ccl_jax.data.layouts import Split, read_mvtec
from ccl_jax.data.records import Record, read_image, read_mask
from ccl_jax.data.shards import read_prepared

SETTINGS = {"data.layout": "mvtec"}


def prepare(split, folder, **changes):
    """Two records or so to a shard, so that few records make several shards."""
    options = {"settings": SETTINGS, "image_size": None, "shard_bytes": 20_000} | changes
    return builders.prepare(split, folder, **options)


def read(folder, **changes):
    return read_prepared(folder, **{"image_size": 64, "settings": SETTINGS} | changes)


@pytest.fixture
def split(tmp_path):
    return read_mvtec(write_photos(tmp_path / "photos"))


def encoded(pixels, format="PNG", mode=None):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format)
    return buffer.getvalue()


def odd_records():
    """Every kind of picture and field that a record can have."""
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (40, 90, 3), np.uint8)
    mask = np.zeros((40, 90), np.uint8)
    mask[5:20, 30:70] = 1  # small integers, as in VisA
    pictures = [
        encoded(colour),
        encoded(colour, "JPEG"),
        encoded(colour, "BMP"),
        encoded(colour, mode="L"),
        encoded(colour, mode="P"),
        encoded(colour, mode="RGBA"),
        encoded(colour[..., 0].astype(np.uint16) << 8),
    ]
    return [
        Record(
            image=picture,
            mask=encoded(mask) if number % 2 else None,
            dataset="odd",
            class_name="Überwurf mutter",
            label=0,
            key=f"odd/test/{number} ü.png",
            anomalous=bool(number % 2),
            defect="kratzer, fein" if number % 2 else "good",
            sample=f"S{number // 2:04}",
            view=f"C{number % 2}",
            crop=(number, 2, 80, 39) if number > 3 else None,
        )
        for number, picture in enumerate(pictures)
    ]


def odd_split():
    train = [
        dataclasses.replace(r, mask=None, anomalous=False, defect="good", key=f"{r.key}-train")
        for r in odd_records()
    ]
    return Split(train, odd_records(), ["odd/Überwurf mutter"])


def fields(record):
    values = dataclasses.asdict(dataclasses.replace(record, image=b"", mask=None))
    return values | {"mask": record.mask is not None}


def files(folder):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("size", [None, 64])
def test_all_fields_and_pictures_of_all_records_come_back_in_order(tmp_path, size):
    split = odd_split()
    assert prepare(split, tmp_path / "p", image_size=size, threads=3) == (
        len(list((tmp_path / "p/records").iterdir())),
        0,
    )
    again = read(tmp_path / "p")
    assert again.class_names == split.class_names
    for name in ("train", "test"):
        ours, theirs = getattr(again, name), getattr(split, name)
        assert len(ours) == len(theirs) == 7
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(read_image(mine, 64), read_image(other, 64))
            np.testing.assert_array_equal(read_mask(mine, 64), read_mask(other, 64))
            if size is not None:  # the crop is in the picture
                other = dataclasses.replace(other, crop=None)
            else:
                assert mine.image.read() == other.image
                np.testing.assert_array_equal(read_image(mine, None), read_image(other, None))
            assert fields(mine) == fields(other)


def test_there_are_several_shards_with_as_many_records_as_their_names_and_listings_say(
    split, tmp_path
):
    prepare(split, tmp_path / "p")
    found = manifest.read(tmp_path / "p")
    assert len(found.shards) == len({shard.file for shard in found.shards}) >= 4
    assert sum(shard.records for shard in found.shards if shard.split == "train") == 8
    for shard in found.shards:
        assert manifest.count_records(tmp_path / "p" / shard.file) == shard.records
        assert manifest.damage(tmp_path / "p", shard, full=True) == ""


@pytest.mark.parametrize("size", [None, 64])
def test_tensorflow_datasets_reads_the_folder_without_this_package(split, tmp_path, size):
    about = {"description": "bolts and felt", "license": "CC0", "homepage": "https://example.org"}
    prepare(split, tmp_path / "p", image_size=size, about=about)
    builder = tfds.builder_from_directory(tmp_path / "p")
    assert builder.info.description == "bolts and felt"
    assert builder.info.redistribution_info.license == "CC0"
    for name in ("train", "test"):
        records = getattr(split, name)
        source = builder.as_data_source(name)
        assert [example["key"].decode() for example in source] == [r.key for r in records]
        for example, record in zip(source, records, strict=True):
            assert example["label"] == record.label and example["anomalous"] == record.anomalous
            if size is None:
                assert example["image"] == record.image.read_bytes()
            else:
                np.testing.assert_array_equal(example["image"], read_image(record, 64))
            assert bool(example["mask"]) == (record.mask is not None)


def test_the_same_command_again_compares_everything_and_writes_nothing(split, tmp_path):
    first = prepare(split, tmp_path / "p")
    before = files(tmp_path / "p")
    assert prepare(split, tmp_path / "p") == (0, first.written)
    assert files(tmp_path / "p") == before


def test_progress_counts_every_record_that_is_written(split, tmp_path):
    seen = []
    prepare(split, tmp_path / "p", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 16) for done in range(1, 17)]
    os.remove(tmp_path / "p" / manifest.read(tmp_path / "p").shards[0].file)
    seen.clear()
    prepare(split, tmp_path / "p", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] < 16


CHILD = """
import os, signal, sys
from pathlib import Path
from ccl_jax.data import builders
from ccl_jax.data.layouts import read_mvtec
photos, folder, kill_at, wait = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
import time
def progress(done, total):
    time.sleep(wait)
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
print(*builders.prepare(read_mvtec(Path(photos)), Path(folder), settings={"data.layout": "mvtec"},
      image_size=None, shard_bytes=20_000, progress=progress))
"""


def start_child(photos, folder, *, kill_at=0, wait=0.0):
    words = [sys.executable, "-c", CHILD, photos, folder, kill_at, wait]
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_preparation_goes_on_and_keeps_its_finished_shards(split, tmp_path):
    folder = tmp_path / "p"
    child = start_child(tmp_path / "photos", folder, kill_at=8)
    child.communicate(timeout=100)
    assert child.returncode == -signal.SIGKILL
    finished = [name for name in files(folder) if name.startswith("ccl_jax-")]
    assert len(finished) > 0
    assert any(name.endswith(".partial") for name in files(folder))  # it was writing one
    with pytest.raises(ValueError, match=r"interrupted; .*--job prepare .* goes on where it"):
        read(folder)
    before = files(folder)
    summary = prepare(split, folder)
    assert summary.kept == len(finished) and summary.written > 0
    after = files(folder)
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    assert not any(name.endswith(".partial") for name in after)
    untouched = prepare(split, tmp_path / "whole")
    assert sum(summary) == sum(untouched)
    whole = files(tmp_path / "whole")
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in whole.items()
    }
    assert [r.key for r in read(folder).train] == [r.key for r in split.train]


def test_a_preparation_that_was_killed_at_its_very_start_goes_on(split, tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / ".prepared.json.partial").write_text("{")
    assert prepare(split, folder).written > 0
    assert len(read(folder).train) == 8


def test_of_two_processes_that_start_together_each_shard_is_written_by_one(split, tmp_path):
    children = [start_child(tmp_path / "photos", tmp_path / "p", wait=0.02) for _ in range(2)]
    results = [child.communicate(timeout=100) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    counts = sorted(tuple(map(int, out.split())) for out, _ in results)
    total = len(manifest.read(tmp_path / "p").shards)
    assert counts == [(0, total), (total, 0)]
    assert [r.key for r in read(tmp_path / "p", full=True).test] == [r.key for r in split.test]


def test_a_killed_process_lets_the_one_that_waits_go_on(split, tmp_path):
    first = start_child(tmp_path / "photos", tmp_path / "p", kill_at=10, wait=0.1)
    while not (tmp_path / "p" / manifest.NAME).exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    summary = prepare(split, tmp_path / "p")  # waits for it
    first.communicate(timeout=100)
    assert first.returncode == -signal.SIGKILL
    assert summary.kept > 0 and summary.written > 0
    assert len(read(tmp_path / "p").test) == 8


def shard_file(folder, number=1):
    return folder / manifest.read(folder).shards[number].file


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_or_missing_shard_is_named_and_written_again_by_the_command_in_the_message(
    split, tmp_path, damage
):
    folder = tmp_path / "p"
    prepare(split, folder)
    before = files(folder)
    damage(shard_file(folder))
    with pytest.raises(ValueError, match=r"1 of \d+ shards .*00001-of-.*--job prepare") as error:
        read(folder, full=True)
    assert f"--config.data.prepared={folder}" in str(error.value)
    assert prepare(split, folder).written == 1
    after = files(folder)
    others = after.keys() - {shard_file(folder).name}
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    read(folder, full=True)


def test_a_damaged_listing_is_named_and_its_shard_written_again(split, tmp_path):
    folder = tmp_path / "p"
    prepare(split, folder)
    path = folder / manifest.read(folder).shards[0].listing
    path.write_text(path.read_text().replace("000.png", "999.png"))
    with pytest.raises(ValueError, match=r"train-00000\.json has another checksum"):
        read(folder)
    path.write_text("{")
    assert prepare(split, folder).written == 1
    assert [r.key for r in read(folder).train] == [r.key for r in split.train]


def change_manifest(folder, **changes):
    path = folder / manifest.NAME
    values = json.loads(path.read_text())
    for shard in values["shards"]:
        shard.update(changes)
    path.write_text(json.dumps(values))


def test_a_shard_with_another_number_of_records_than_the_manifest_says_is_named(split, tmp_path):
    prepare(split, tmp_path / "p")
    shard = manifest.read(tmp_path / "p").shards[0]._replace(records=7)
    text = manifest.damage(tmp_path / "p", shard, full=False)
    assert re.search(r"00000-of-\d+ holds \d records instead of 7", text)


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "../../stolen"},
        {"file": "/etc/passwd"},
        {"listing": "records/../../stolen.json"},
        {"listing": "/etc/passwd"},
        {"split": "val"},
        {"records": 7},
    ],
    ids=str,
)
def test_a_manifest_that_names_anything_but_the_shards_is_refused(split, tmp_path, changes):
    prepare(split, tmp_path / "p")
    change_manifest(tmp_path / "p", **changes)
    with pytest.raises(
        ValueError, match=r"prepared\.json is damaged \(it names .*--job prepare --c"
    ):
        read(tmp_path / "p")


def test_a_manifest_that_leaves_a_shard_out_or_counts_without_end_is_refused(split, tmp_path):
    prepare(split, tmp_path / "p")
    path = tmp_path / "p" / manifest.NAME
    values = json.loads(path.read_text())
    for changes, reason in [
        ({"shards": values["shards"][:-1]}, "it does not name ccl_jax-test"),
        ({"shards": values["shards"] + values["shards"][:1]}, "where nothing must be"),
        ({"per_shard": {"train": 0, "test": 1}}, "zero"),
    ]:
        path.write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=rf"prepared\.json is damaged \(.*{reason}"):
            read(tmp_path / "p")


def test_a_listing_that_names_another_file_or_too_few_stamps_has_its_shard_written_again(
    split, tmp_path
):
    prepare(split, tmp_path / "p")
    path = tmp_path / "p" / manifest.read(tmp_path / "p").shards[0].listing
    whole = json.loads(path.read_text())
    other = {"shard": whole["shard"] | {"file": "../../stolen"}}
    for changes in ({"stamps": whole["stamps"][:-1]}, {"stamps": [[]] * len(whole["rows"])}, other):
        path.write_text(json.dumps(whole | changes))
        assert prepare(split, tmp_path / "p").written == 1
        assert json.loads(path.read_text())["shard"] == whole["shard"]


def test_a_class_without_pictures_is_named_instead_of_shifting_the_others(split, tmp_path):
    felt = [[r for r in part if r.label == 1] for part in split[:2]]
    with pytest.raises(
        ValueError, match=r"labels \[1\], and there are 2 classes: photos/bolt, phot"
    ):
        prepare(Split(*felt, split.class_names), tmp_path / "p")


def test_a_setting_that_is_a_list_is_told_as_a_shell_takes_it():
    lines = manifest.differences({"data.views": ["C1"]}, {"data.views": ()}, flag="--config.")
    assert lines[0].endswith("(--config.data.views=\"('C1',)\")")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1}', '{"version": 1, "shards": 3}'])
def test_a_damaged_manifest_is_named(split, tmp_path, text):
    prepare(split, tmp_path / "p")
    (tmp_path / "p" / manifest.NAME).write_text(text)
    with pytest.raises(ValueError, match=r"p/prepared\.json is damaged .*rm -r .*--job prepare"):
        read(tmp_path / "p")


def test_another_version_of_the_format_is_refused(split, tmp_path):
    prepare(split, tmp_path / "p")
    path = tmp_path / "p" / manifest.NAME
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    for function in (read, lambda folder: prepare(split, folder)):
        with pytest.raises(ValueError, match=r"version 99 of the format, and .* reads version 1"):
            function(tmp_path / "p")


def test_data_of_another_source_or_form_are_refused_with_what_differs(split, tmp_path):
    folder = tmp_path / "p"
    prepare(split, folder, image_size=64)
    one = read_mvtec(tmp_path / "photos", classes=("felt",))
    fewer = split._replace(test=split.test[:-1])
    for changes, message in [
        ({"image_size": 96}, "image_size=64 instead of 96"),
        ({"image_size": None}, "images='resized' instead of 'original'; image_size=64 instead of"),
        ({"settings": {"data.layout": "visa"}}, "data.layout='mvtec' instead of 'visa'"),
        ({"settings": {**SETTINGS, "synthetic.seed": 1}}, "synthetic.seed=None instead of 1"),
        ({"split": one}, r"other class_names \(only there: \['photos/bolt'\], only here: \[\]\)"),
        ({"split": fewer}, "records={'train': 8, 'test': 8} instead of {'train': 8, 'test': 7}"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            prepare(**{"split": split, "folder": folder, "image_size": 64, **changes})
        assert f"rm -r {folder}" in str(error.value)
    assert prepare(split, folder, image_size=64).written == 0


def test_a_picture_that_was_edited_since_is_named(split, tmp_path):
    prepare(split, tmp_path / "p")
    image = split.test[3].image
    Image.new("RGB", (70, 50)).save(image)
    with pytest.raises(ValueError, match=r"1 pictures have changed .*/001\.png has \d+ bytes inst"):
        prepare(split, tmp_path / "p")


def test_a_mask_that_was_edited_without_changing_its_size_is_named(split, tmp_path):
    mask = next(record.mask for record in split.test if record.mask is not None)
    Image.new("L", (70, 50)).save(mask, "BMP")
    prepare(split, tmp_path / "p")
    flip(mask)
    with pytest.raises(ValueError, match=r"1 pictures .*_mask\.png has another content"):
        prepare(split, tmp_path / "p")


def test_renamed_pictures_are_named(split, tmp_path):
    prepare(split, tmp_path / "p")
    renamed = [dataclasses.replace(r, key=r.key.replace("felt", "fur")) for r in split.train]
    with pytest.raises(ValueError, match=r"4 pictures .*/fur/train/good/000\.png is where .*/felt"):
        prepare(split._replace(train=renamed), tmp_path / "p")


def test_files_that_were_only_copied_or_moved_are_the_same(split, tmp_path):
    prepare(split, tmp_path / "p")
    for record in (*split.train, *split.test):
        os.utime(record.image, ns=(0, 0))
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    moved = read_mvtec(tmp_path / "elsewhere", dataset="photos")
    assert prepare(moved, tmp_path / "p").written == 0


def test_a_folder_with_other_files_is_left_alone(split, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"p holds files, but no prepared data .*p-prepared\."):
        prepare(split, tmp_path / "p")
    assert [file.name for file in (tmp_path / "p").iterdir()] == ["letter.txt"]


def test_a_folder_that_cannot_be_written_is_named(split, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"config\.data\.prepared=.*file/p cannot be written"):
        prepare(split, tmp_path / "file/p")


@pytest.mark.parametrize("size", [None, 64])
def test_a_picture_that_cannot_be_read_stops_the_preparation_by_name(split, tmp_path, size):
    bad = split.train[5].image
    if size is None:
        bad.unlink()
        expected = FileNotFoundError
    else:
        truncate(bad)
        expected = ValueError
    with pytest.raises(expected, match=bad.name):
        prepare(split, tmp_path / "p", image_size=size)


def test_an_unreadable_training_image_is_stored_as_it_is_where_somebody_is_told(split, tmp_path):
    truncate(split.train[5].image)
    cropped = dataclasses.replace(split.train[0], crop=(0, 0, 999, 10))  # outside
    split = split._replace(train=[cropped, *split.train[1:]])
    told = []
    prepare(split, tmp_path / "p", image_size=64, threads=2, unreadable=told.append)
    assert sorted(text.split()[0] for text in told) == sorted(
        [str(cropped.image), str(split.train[5].image)]
    )
    again = read(tmp_path / "p").train
    assert again[5].image.read() == split.train[5].image.read_bytes()
    for number, record in enumerate(again):
        if number in (0, 5):
            with pytest.raises(ValueError, match=rf"^{record.key} cannot be read as an image"):
                read_image(record, 64)
        else:
            np.testing.assert_array_equal(
                read_image(record, 64), read_image(split.train[number], 64)
            )


def test_an_unreadable_test_image_stops_the_preparation_in_any_case(split, tmp_path):
    truncate(split.test[5].image)
    with pytest.raises(ValueError, match=split.test[5].image.name):
        prepare(split, tmp_path / "p", image_size=64, unreadable=print)


@pytest.fixture
def full_disk():
    """Files that cannot grow beyond ten kilobytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_is_told_with_what_to_do(split, tmp_path, full_disk):
    with pytest.raises(ValueError, match=r"partial cannot be written \(.*too large.*make room"):
        prepare(split, tmp_path / "p")


def test_a_set_without_test_images_is_prepared(split, tmp_path):
    prepare(split._replace(test=[]), tmp_path / "p")
    again = read(tmp_path / "p")
    assert (len(again.train), again.test) == (8, [])
