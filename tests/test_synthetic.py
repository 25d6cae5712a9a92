import dataclasses
import hashlib
import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from ccl_jax.data import layouts, synthetic
from ccl_jax.data.synthetic import products
from ccl_jax.data.synthetic.canvas import no_flaw

SMALL = {
    "image_size": 32,
    "train_per_class": 2,
    "test_normal_per_class": 1,
    "test_per_defect": 1,
    "seed": 0,
}
EVERY_DEFECT = [(name, d) for name, p in products.PRODUCTS.items() for d in p.defects]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return synthetic.write_benchmark(tmp_path_factory.mktemp("data") / "made", **SMALL)


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*.png")
    }


def pixels(path):
    return np.asarray(Image.open(path))


def test_there_are_ten_classes_with_at_least_four_kinds_of_defect_each():
    assert len(synthetic.class_names()) == 10
    assert min(len(synthetic.defect_names(name)) for name in synthetic.class_names()) >= 4


def test_benchmark_reads_as_mvtec_layout_with_a_mask_for_every_defect(benchmark):
    split = layouts.read_mvtec(benchmark)
    assert split.class_names == [f"made/{name}" for name in synthetic.class_names()]
    assert len(split.train) == 2 * 10
    anomalous = [record for record in split.test if record.anomalous]
    assert len(anomalous) == len(EVERY_DEFECT)
    assert len(split.test) - len(anomalous) == 10
    assert {(r.class_name, r.defect) for r in anomalous} == set(EVERY_DEFECT)
    for record in anomalous:
        mask = pixels(record.mask)
        assert mask.shape == (32, 32) and set(np.unique(mask)) == {0, 255}, record.key
        assert pixels(record.image).shape == (32, 32, 3), record.key


def test_equal_arguments_give_equal_files_and_another_seed_gives_others(benchmark, tmp_path):
    again = synthetic.write_benchmark(tmp_path / "again", **SMALL)
    assert digests(again) == digests(benchmark)
    other = synthetic.write_benchmark(tmp_path / "other", **(SMALL | {"seed": 1}))
    ours, theirs = digests(benchmark), digests(other)
    assert ours.keys() == theirs.keys()
    assert not any(ours[k] == theirs[k] for k in ours if "ground_truth" not in k)


def test_asking_for_more_pictures_changes_none_of_the_first(benchmark, tmp_path):
    more = SMALL | {"train_per_class": 3, "test_normal_per_class": 2, "test_per_defect": 2}
    larger = digests(synthetic.write_benchmark(tmp_path / "more", **more))
    few = digests(benchmark)
    assert len(larger) > len(few)
    assert all(larger[name] == digest for name, digest in few.items())


def test_benchmark_that_is_there_is_reused_without_a_write_or_a_lock(benchmark):
    lock = benchmark.parent / f".{benchmark.name}.lock"
    lock.unlink(missing_ok=True)
    times = {path: path.stat().st_mtime_ns for path in benchmark.rglob("*")}
    assert synthetic.write_benchmark(benchmark, **SMALL) == benchmark
    assert {path: path.stat().st_mtime_ns for path in benchmark.rglob("*")} == times
    assert not lock.exists()


def test_other_arguments_for_a_benchmark_that_is_there_are_an_error_with_a_fix(benchmark):
    before = digests(benchmark)
    with pytest.raises(ValueError, match=r"train_per_class=2 instead of 9.*--config\.data\.root="):
        synthetic.write_benchmark(benchmark, **(SMALL | {"train_per_class": 9}))
    assert digests(benchmark) == before


def test_another_generator_version_is_an_error(benchmark, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    manifest = json.loads((benchmark / "synthetic.json").read_text())
    (old / "synthetic.json").write_text(json.dumps(manifest | {"generator": 0}))
    with pytest.raises(ValueError, match="generator=0 instead of"):
        synthetic.write_benchmark(old, **SMALL)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"synthetic\.json is missing"):
        synthetic.write_benchmark(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        synthetic.write_benchmark(tmp_path / "file", **SMALL)


@pytest.mark.parametrize("text", ["{", "3"])
def test_an_unreadable_manifest_is_an_error_with_a_fix(tmp_path, text):
    (tmp_path / "synthetic.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read.*rm -r"):
        synthetic.write_benchmark(tmp_path, **SMALL)


@pytest.mark.parametrize("name, value", [("image_size", 16), ("test_per_defect", 0), ("seed", -1)])
def test_an_argument_out_of_range_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"config\.synthetic\.{name}={value}"):
        synthetic.write_benchmark(tmp_path / "new", **(SMALL | {name: value}))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_no_folder_and_the_next_one_starts_anew(tmp_path, benchmark):
    def interrupt(done, total):
        assert 0 < done <= total
        if done == 5:
            raise KeyboardInterrupt

    root = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_benchmark(root, **SMALL, progress=interrupt)
    assert not root.exists() and not (tmp_path / ".made.partial").exists()
    (tmp_path / ".made.partial" / "rubbish").mkdir(parents=True)  # as after a kill
    root.mkdir()
    assert digests(synthetic.write_benchmark(root, **SMALL)) == digests(benchmark)
    assert not (root / "rubbish").exists()


def _write(root):
    synthetic.write_benchmark(root, **SMALL)


def test_two_processes_that_start_together_write_one_benchmark(tmp_path, benchmark):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path / "made",)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert digests(tmp_path / "made") == digests(benchmark)
    assert not (tmp_path / ".made.partial").exists()


@pytest.mark.parametrize("name, defect", EVERY_DEFECT)
def test_mask_covers_what_changed_and_little_else(name, defect):
    seed = (5, 7, 11)
    normal = products.normal_picture(name, 64, seed).astype(int)
    picture, mask = products.anomalous_picture(name, defect, 0.6, 64, seed)
    changed = np.abs(picture - normal).max(-1) > 2 * 255 * products.VISIBLE
    assert 0.0012 <= (mask > 0).mean() < 0.4
    assert (changed & (mask == 0)).mean() < 0.004  # specks
    # Light, pose and noise are the same, so that only the defect tells the two pictures apart.
    same = np.abs(picture - normal).max(-1) <= 255 * products.VISIBLE + 3
    assert (same & (mask == 0)).sum() >= 0.98 * (mask == 0).sum()


@pytest.mark.parametrize("name, defect", EVERY_DEFECT)
def test_grosser_defect_changes_more(name, defect):
    def change(strength):
        total = 0
        for seed in range(6):
            normal = products.normal_picture(name, 32, (seed, 3)).astype(int)
            picture, _ = products.anomalous_picture(name, defect, strength, 32, (seed, 3))
            total += np.abs(picture - normal).sum()
        return total

    assert change(0.95) > change(0.05)


def test_strengths_of_few_pictures_spread_from_subtle_to_gross():
    five = sorted(synthetic.strength_of(index) for index in range(5))
    assert 0.3 <= five[0] < 0.4 and 0.9 < five[-1] < 1 and max(np.diff(five)) < 0.21


def test_gap_between_changed_pixels_is_closed_and_a_wider_one_is_not():
    plain = np.zeros((64, 64, 3))
    changed = plain.copy()
    changed[20:30, 10:20] = changed[20:30, 22:32] = changed[20:30, 44:54] = 1
    mask = products.difference_mask(plain, changed, gap=0.05)
    assert mask[25, 21] and not mask[25, 38]
    assert mask[changed[..., 0] > 0].all()
    assert not mask[:18].any() and not mask[32:].any()


def test_equal_pictures_have_an_empty_mask():
    plain = np.zeros((64, 64, 3))
    assert not products.difference_mask(plain, plain, gap=0.1).any()


def test_defect_that_never_shows_is_an_error(monkeypatch):
    blind = dataclasses.replace(products.PRODUCTS["wood"], defects=("nothing",))
    monkeypatch.setitem(products.PRODUCTS, "wood", blind)
    with pytest.raises(RuntimeError, match="nothing on wood stays invisible"):
        products.anomalous_picture("wood", "nothing", 0.5, 32, (0,))


def test_normal_product_has_no_kind_of_flaw():
    assert no_flaw().kind == ""


def test_picture_of_another_size_shows_the_same_scene():
    small = products.normal_picture("capsule", 64, (1, 2)).astype(float)
    large = products.normal_picture("capsule", 128, (1, 2)).astype(float)
    shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.97


@pytest.mark.slow
def test_no_defect_is_invisible_for_many_seeds():
    for name, defect in EVERY_DEFECT:
        for seed in range(20):
            for strength in (0.0, 1.0):
                _, mask = products.anomalous_picture(name, defect, strength, 64, (seed, 1))
                assert mask.any(), (name, defect, seed, strength)


@pytest.mark.slow
def test_light_of_normal_and_anomalous_scenes_is_drawn_from_one_distribution():
    # Many scenes: with the twenty normal ones of the default benchmark, chance alone moves an
    # AUROC of the mean colour by several hundredths.
    def brightness(split):
        seeds = ((0, split, index) for index in range(300))
        return np.array([products.normal_picture("leather", 32, s).mean() for s in seeds])

    first, second = brightness(1), brightness(2)
    greater = (first[:, None] > second).mean()
    assert abs(greater - 0.5) < 0.1
