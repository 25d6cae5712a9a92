import dataclasses
import itertools
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import miniatures
import numpy as np
import pytest
from conftest import ROOT, write_photos
from numbered import joined
from test_builders import SETTINGS, flip, odd_split, prepare, read, shard_file, truncate

from ccl_jax.data import manifest
from ccl_jax.data.layouts import Split, read_mvtec, read_split
from ccl_jax.data.pipeline import evaluation_batches, train_batches
from ccl_jax.data.records import Stored, StoreError, check_files, check_records, read_image
from ccl_jax.data.shards import Picture, ShardReader

SIZE = 64


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two classes as photographed, and a third of odd formats."""
    photos = read_mvtec(write_photos(tmp_path_factory.mktemp("data") / "photos", masks=True))
    odd = odd_split()
    records = [
        [*ours, *(record.__class__(**{**fields(record), "label": 2}) for record in theirs)]
        for ours, theirs in zip(photos[:2], odd[:2], strict=True)
    ]
    return Split(*records, [*photos.class_names, *odd.class_names])


def fields(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


@pytest.fixture(scope="module", params=["original", "resized"])
def prepared(request, split, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "p"
    prepare(split, folder, image_size=None if request.param == "original" else SIZE)
    return folder


def train(records, **changes):
    options = {"image_size": SIZE, "batch_size": 5, "seed": 3, "shuffle": "plain", "threads": 2}
    with train_batches(records, **{**options, "workers": 0, **changes}) as batches:
        return list(itertools.islice(batches, 7))


def evaluate(records, **changes):
    options = {"image_size": SIZE, "batch_size": 4, "threads": 2, "workers": 0}
    with evaluation_batches(records, **{**options, **changes}) as batches:
        return list(batches)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


@pytest.mark.parametrize("shuffle", ["plain", "class_balanced"])
def test_training_batches_are_those_of_the_folder(split, prepared, shuffle):
    want = train(split.train, shuffle=shuffle)
    assert_same(train(read(prepared).train, shuffle=shuffle), want)
    assert_same(train(read(prepared).train, shuffle=shuffle, start=3)[:4], want[3:])


def test_evaluation_batches_are_those_of_the_folder(split, prepared):
    want = evaluate(split.test)
    assert any(batch["mask"].any() for batch in want)
    assert_same(evaluate(read(prepared).test), want)


def test_the_union_of_two_hosts_is_the_batch_of_one(split, prepared):
    shares = [
        train(read(prepared).train, batch_size=4, process_index=i, process_count=2)
        for i in range(2)
    ]
    assert_same(joined(shares), train(split.train, batch_size=4))


@pytest.mark.parametrize("size", [None, SIZE])
def test_crops_of_strips_give_the_batches_of_the_folder(tmp_path, size):
    split = read_split(miniatures.manta(tmp_path / "manta"), layout="manta")
    assert {record.crop for record in split.train} == {(8 * i, 0, 8 * i + 8, 8) for i in range(5)}
    prepare(split, tmp_path / "p", image_size=size)
    again = read(tmp_path / "p")
    assert_same(train(again.train), train(split.train))
    assert_same(evaluate(again.test), evaluate(split.test))


def test_worker_processes_read_the_same_batches(split, prepared):
    assert_same(train(read(prepared).train, workers=2), train(split.train))
    assert_same(evaluate(read(prepared).test, workers=1), evaluate(split.test))


def test_records_name_their_pictures_and_hold_none(prepared):
    records = read(prepared).test
    check_records(read(prepared).train, records)
    check_files(records)
    assert all(isinstance(record.image, Stored) for record in records)
    assert len(pickle.dumps(records)) < 250 * len(records) + 1000
    readers = {id(record.image.shard) for record in records}
    assert len(readers) == len({record.image.shard.path for record in records})


def test_a_record_that_was_read_can_be_pickled_and_read_again(prepared):
    records = read(prepared).train
    want = [read_image(record, SIZE) for record in records]
    again = pickle.loads(pickle.dumps(records))
    assert len({id(record.image.shard) for record in again}) < len(again)  # still shared
    for record, image in zip(again, want, strict=True):
        np.testing.assert_array_equal(read_image(record, SIZE), image)


def test_threads_that_begin_together_read_without_tensorflow_datasets(prepared):
    """While that is imported, another thread's `from ... import` yields stand-ins."""
    program = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from ccl_jax.data.shards import read_prepared

folder = Path({str(prepared)!r})
records = read_prepared(folder, image_size={SIZE}, settings={SETTINGS!r}).train[:4]
together = Barrier(len(records))
def read(record):
    together.wait()
    return record.image.read()
with ThreadPoolExecutor(len(records)) as pool:
    assert all(pool.map(read, records))
print("tensorflow_datasets" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]


def test_many_threads_share_a_reader(prepared):
    records = read(prepared).train * 40
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda record: record.image.read(), records))
    assert contents == [record.image.read() for record in read(prepared).train] * 40


def test_a_chosen_class_has_the_batches_that_it_has_in_the_folder(tmp_path):
    root = write_photos(tmp_path / "photos", classes=("bolt", "felt", "nut"))
    prepare(read_mvtec(root), tmp_path / "p")
    for chosen in (("nut",), ("bolt", "nut"), ("nut", "bolt"), ()):
        want = read_mvtec(root, classes=chosen)
        found = read(tmp_path / "p", classes=chosen)
        assert found.class_names == want.class_names
        assert [(r.key, r.label) for r in found.train] == [(r.key, r.label) for r in want.train]
        assert_same(train(found.train, batch_size=4), train(want.train, batch_size=4))
    assert read(tmp_path / "p", classes=("photos/nut",)).class_names == ["photos/nut"]
    with pytest.raises(ValueError, match=r"names 'not'.* did you mean 'nut'\? there are: bolt, fe"):
        read(tmp_path / "p", classes=("not",))


def test_what_does_not_fit_the_config_is_refused_with_the_setting_to_use(split, tmp_path):
    prepare(split, tmp_path / "p", image_size=SIZE)
    with pytest.raises(ValueError, match=r"64 pixels instead of 96 \(--config\.data\.image_size=6"):
        read(tmp_path / "p", image_size=96)
    with pytest.raises(ValueError, match=r"instead of 'visa' \(--config\.data\.layout=mvtec\)"):
        read(tmp_path / "p", settings={"data.layout": "visa"})
    with pytest.raises(ValueError, match=r"data\.name=odd, photos instead of other"):
        read(tmp_path / "p", dataset="other")
    prepare(split, tmp_path / "original")
    assert len(read(tmp_path / "original", image_size=96).train) == len(split.train)


def test_a_folder_where_nothing_is_prepared_is_named_with_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no prepared data; .*--job prepare"):
        read(tmp_path / "nowhere")


def test_a_truncated_shard_is_noticed_without_reading_it_all(split, tmp_path):
    prepare(split, tmp_path / "p")
    truncate(shard_file(tmp_path / "p"))
    with pytest.raises(ValueError, match=r"1 of \d+ shards.* bytes instead of \d+\. .*--job prep"):
        read(tmp_path / "p")


def test_a_record_damaged_since_the_start_is_named_when_it_is_read(split, tmp_path):
    prepare(split, tmp_path / "p")
    records = read(tmp_path / "p").train
    path = shard_file(tmp_path / "p", 0)
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"record 0 of .*00000-of-.* cannot be read .*--job prep"):
        read_image(records[0], SIZE)
    with pytest.raises(ValueError, match=r"record 0 of .*00000-of"):
        train(records, batch_size=len(records))


def test_a_shard_that_is_gone_or_cut_since_the_start_is_named_when_it_is_read(split, tmp_path):
    prepare(split, tmp_path / "p")
    records = read(tmp_path / "p").train
    truncate(shard_file(tmp_path / "p", 0))
    shard_file(tmp_path / "p", 1).unlink()
    other = next(record for record in records if record.image.shard.path.name.find("-00001-") > 0)
    for record, reason in ((records[0], r"\d+ bytes instead of \d+"), (other, "is missing")):
        with pytest.raises(StoreError, match=rf"{reason}\. .*--job prepare"):
            record.image.read()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_skip_passes_over_a_bad_picture_in_a_shard_and_stops_at_a_broken_shard(
    split, tmp_path, workers
):
    bad = dataclasses.replace(split.train[0], image=b"not a picture")
    prepare(split._replace(train=[bad, *split.train[1:]]), tmp_path / "p")
    records = read(tmp_path / "p").train
    options = {"image_size": SIZE, "batch_size": len(records), "seed": 3, "shuffle": "plain"}
    options |= {"threads": 1, "workers": workers, "bad_files": "skip", "report": list}
    with train_batches(records, **options) as batches:
        next(batches)
        assert list(batches.unreadable) == [0] and bad.key in batches.unreadable[0]
    truncate(shard_file(tmp_path / "p", 0))
    records = pickle.loads(pickle.dumps(records))  # as another process opens it
    with (
        train_batches(records, **options) as batches,
        pytest.raises(ValueError, match=r"00000-of-.* bytes instead of .*--job prepare") as error,
    ):
        next(batches)
    assert "bad_files" not in str(error.value)


def test_a_shard_of_a_later_preparation_is_not_read_by_a_process_that_began_before(split, tmp_path):
    prepare(split, tmp_path / "p")
    records = read(tmp_path / "p").train
    size = shard_file(tmp_path / "p", 0).stat().st_size
    shutil.rmtree(tmp_path / "p")
    prepare(split._replace(train=split.train[::-1]), tmp_path / "p")
    assert shard_file(tmp_path / "p", 0).stat().st_size == size
    with pytest.raises(StoreError, match=r"00000-of-.* was prepared anew .* start it again"):
        records[0].image.read()


def test_a_checksum_that_differs_is_found_where_all_is_compared(split, tmp_path):
    prepare(split, tmp_path / "p")
    found = manifest.read(tmp_path / "p")
    path = shard_file(tmp_path / "p", 0)
    flip(path)
    if manifest.damage(tmp_path / "p", found.shards[0], full=False) == "":
        read(tmp_path / "p")
    with pytest.raises(ValueError, match=r"00000-of-"):
        read(tmp_path / "p", full=True)


def test_opening_from_many_threads_opens_once(split, tmp_path):
    prepare(split, tmp_path / "p")
    shard = manifest.read(tmp_path / "p").shards[0]
    reader = ShardReader(tmp_path / "p", shard)
    barrier, opened = threading.Barrier(8), set()

    def go():
        barrier.wait()
        Picture(reader, 0, "image").read()
        opened.add(id(reader._opened()))

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


MEMORY = """
import io, itertools, re, sys, time
from pathlib import Path
import numpy as np
from PIL import Image
from ccl_jax.data import builders
from ccl_jax.data.layouts import Split
from ccl_jax.data.pipeline import train_batches
from ccl_jax.data.records import Record, check_records
from ccl_jax.data.shards import read_prepared

folder, total = Path(sys.argv[1]), int(sys.argv[2])

def peak():  # MiB; ru_maxrss would begin with that of the parent
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

if sys.argv[3] == "write":
    def png(number):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()
    pictures = [png(number) for number in range(256)]
    records = [
        Record(image=pictures[i % 256], dataset="many", class_name=f"class{i * 10 // total}",
               label=i * 10 // total, key=f"many/class{i * 10 // total}/train/good/{i:06}.png")
        for i in range(total)
    ]
    names = [f"class{label}" for label in range(10)]
    builders.prepare(Split(records, [], names), folder, settings={}, image_size=None)
    sys.exit()
before = peak()
begin = time.perf_counter()
split = read_prepared(folder, image_size=32, settings={})
check_records(split.train, split.test)
seconds = time.perf_counter() - begin
listed = peak()
epochs = []
with train_batches(split.train, image_size=32, batch_size=500, seed=0, shuffle="plain", threads=2,
                   workers=0) as batches:
    for _ in range(2):
        for batch in itertools.islice(batches, total // 500):
            assert batch["image"].shape == (500, 32, 32, 3)
        epochs.append(peak())
print(seconds, before, listed, *epochs)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_hundred_thousand_records_list_fast_and_train_in_flat_memory(tmp_path):
    for what in ("write", "read"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / "p"), "100000", what],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    print(done.stdout)
    seconds, before, listed, first, second = map(float, done.stdout.split())
    assert seconds < 20
    assert listed - before < 200  # MiB
    assert first - listed < 150
    assert second - first < 10
