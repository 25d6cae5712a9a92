"""Prepared data through the door: the same commands, with another source."""

import json
import os
import shutil

import fsspec
import miniatures
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT, write_photos
from test_builders import files, truncate
from test_main import assert_fails, command, tiny

from ccl_jax import config as configs
from ccl_jax import prepare, settle
from ccl_jax.data import manifest
from ccl_jax.data.layouts import Split
from ccl_jax.data.pictures import Pictures, TrainingImages
from ccl_jax.data.records import read_image
from ccl_jax.main import main


def prepared(folder, **settings):
    return {"data.source": "prepared", "data.prepared": folder} | settings


def prepare_words(photos, **settings):
    """The command that prepares, as tiny() trains."""
    words = tiny(photos, "unused", **settings)
    return [*words, "--job=prepare"]


def results(workdir, step=4):
    found = json.loads((workdir / f"evaluation/{step}/results.json").read_text())
    return {key: found[key] for key in ("step", "dataset", "classes", "mean")}


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    """The photos of most tests, prepared as they are found."""
    folder = tmp_path_factory.mktemp("shards") / "p"
    assert main(prepare_words(photos, **prepared(folder))) == 0
    return folder


def test_prepare_counts_the_images_and_says_what_it_wrote(photos, tmp_path, capsys):
    for form in ("original", "resized"):
        folder = tmp_path / form
        words = prepare_words(photos, **prepared(folder, **{"data.prepared_images": form}))
        assert main(words) == 0
        out = capsys.readouterr().out
        assert "bolt: 4 to train on, 2 normal and 2 anomalous to test on" in out
        assert f"{folder}: 2 shards written, 0 were there and are whole" in out
        assert main(words) == 0
        assert f"{folder}: 0 shards written, 2 were there" in capsys.readouterr().out
        found = manifest.read(folder)
        assert found.image_size == {"original": None, "resized": 64}[form]


def test_without_a_folder_the_shards_lie_beside_the_images(tmp_path, capsys, monkeypatch):
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert main(prepare_words("photos/", **{"data.source": "prepared"})) == 0
    assert (tmp_path / "photos-prepared/prepared.json").exists()


@pytest.mark.parametrize("root", [".", "../photos", "photos/.."])
def test_the_place_beside_the_images_does_not_depend_on_how_they_are_named(
    tiny_config, tmp_path, monkeypatch, root
):
    (tmp_path / "photos/photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos")
    tiny_config.data.root = root
    assert prepare.location_of(tiny_config) == str(tmp_path / "photos-prepared")


@pytest.mark.parametrize("name", ["p", "bolt/p", ""])
def test_shards_do_not_go_among_the_images(tmp_path, capsys, name):
    root = write_photos(tmp_path / "photos")
    (tmp_path / "link").symlink_to(root)
    before = sorted(root.rglob("*"))
    words = prepare_words(root, **prepared(tmp_path / "link" / name))
    assert_fails(capsys, words, "within the images of", f"--config.data.prepared={root}-prepared")
    url = {"data.cache_dir": root / "cache"}
    words = prepare_words(root, **prepared(f"file://{tmp_path}/store", **url))
    assert_fails(capsys, words, "within the images of", f"--config.data.cache_dir={root}-cache_dir")
    assert sorted(root.rglob("*")) == before


def test_source_and_licence_reach_the_metadata_of_tensorflow_datasets(tmp_path):
    root = write_photos(tmp_path / "mvtec_ad")
    words = prepare_words(root, **prepared(tmp_path / "p", **{"data.name": "mvtec_ad"}))
    assert main(words) == 0
    info = tfds.builder_from_directory(tmp_path / "p").info
    assert info.redistribution_info.license == "CC BY-NC-SA 4.0 (no commercial use)"
    assert info.homepage == "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    assert info.description.startswith("mvtec_ad: MVTec AD, https://www.mvtec.com/")


def joint(tmp_path, **settings):
    roots = {
        "mvtec": miniatures.mvtec(tmp_path / "mvtec"),
        "visa": miniatures.visa(tmp_path / "visa"),
        "btad": miniatures.btad(tmp_path / "btad") / "BTech_Dataset_transformed",
        "real_iad": miniatures.real_iad(tmp_path / "iad"),
    }
    settings = {f"data.parts.{name}.root": root for name, root in roots.items()} | settings
    settings |= {"data.image_size": 64, "run.progress": False}
    return ["main", "--config", str(ROOT / "configs/joint.py"), *words_of(settings)]


def test_a_joint_set_gives_from_shards_what_it_gives_from_its_folders(tmp_path, capsys):
    for name in ("mvtec", "visa", "btad", "iad"):
        (tmp_path / name).mkdir()
    folders = joint(tmp_path)
    assert main([*folders, "--job=baseline"]) == 0
    want = capsys.readouterr().out
    assert "| real_iad/toy |" in want and "| visa/pcb1 |" in want
    words = [*folders, *words_of(prepared(tmp_path / "p"))]
    assert main([*words, "--job=prepare"]) == 0
    info = tfds.builder_from_directory(tmp_path / "p").info
    for text in ("btad: CC BY-SA 4.0; mvtec: CC BY-NC-SA", "visa: CC BY 4.0"):
        assert text in info.redistribution_info.license
    for name in ("mvtec", "visa", "btad", "iad"):
        shutil.rmtree(tmp_path / name)
    capsys.readouterr()
    assert main([*words, "--job=baseline"]) == 0
    assert capsys.readouterr().out == want
    other = [*words, "--config.data.parts.btad.classes=('01',)", "--job=baseline"]
    assert_fails(capsys, other, "data.parts.btad.classes", '--config.data.parts.btad.classes="()"')


def words_of(settings):
    return [f"--config.{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize("form", ["original", "resized"])
def test_an_unreadable_training_image_is_prepared_where_it_is_to_be_skipped(tmp_path, capsys, form):
    root = write_photos(tmp_path / "photos")
    bad = root / "bolt/train/good/001.png"
    truncate(bad)
    settings = {"data.prepared_images": form, "data.check": "full"}
    words = tiny(root, tmp_path / "run", **prepared(tmp_path / "p", **settings))
    assert main([*words, "--job=prepare"]) == 1  # spoiled, as it is not to be skipped
    assert json.loads((tmp_path / "run/census.json").read_text())["spoiled"] is True
    capsys.readouterr()
    words.append("--config.data.bad_files=skip")
    assert main([*words, "--job=prepare"]) == 0
    out = capsys.readouterr().out
    assert "1 of the images that cannot be read are only trained on" in out
    assert ("1 training images cannot be read, so they are stored" in out) == (form == "resized")
    assert json.loads((tmp_path / "run/census.json").read_text())["spoiled"] is False
    config = configs.read_config_file(ROOT / "configs/folder.py")
    config.data.update({"name": "tiny", "image_size": 64, "prepared": str(tmp_path / "p")})
    records = prepare.read_prepared(config, None).train
    images = TrainingImages(Pictures(records, 64), "skip")
    np.testing.assert_array_equal(
        images.image(1)[0], read_image(root / "bolt/train/good/002.png", 64)
    )
    assert "tiny/bolt/train/good/001.png cannot be read" in images.image(1)[1][1]


def test_a_class_or_test_image_that_cannot_be_read_spoils_in_spite_of_skipping(tmp_path, capsys):
    for bad in ("bolt/train/good/*.png", "bolt/test/good/000.png"):
        root = write_photos(tmp_path / bad.split("/")[1])
        for file in root.glob(bad):
            truncate(file)
        settings = {"data.bad_files": "skip", "data.check": "full"}
        words = tiny(root, tmp_path / "run", **prepared(tmp_path / "p", **settings))
        assert main([*words, "--job=prepare"]) == 1
        assert not (tmp_path / "p").exists()
        assert "only trained on" not in capsys.readouterr().out


def test_the_full_check_without_the_images_opens_the_shards_and_compares_checksums(
    photos, shards, tmp_path, capsys
):
    words = tiny("", tmp_path / "run", **prepared(shards, **{"data.check": "full"}))
    assert main([*words, "--job=prepare"]) == 0
    out = capsys.readouterr().out
    assert f"{shards}: 2 classes" in out and "tiny/felt" in out and "shards written" not in out
    found = json.loads((tmp_path / "run/census.json").read_text())
    assert found["roots"] == {"tiny": str(shards)}
    assert found["classes"]["tiny/bolt"]["train_normal"] == 4
    shutil.copytree(shards, tmp_path / "p")
    path = next((tmp_path / "p").glob("ccl_jax-train*"))
    content = path.read_bytes()
    path.write_bytes(content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])
    words = tiny("", tmp_path / "run", **prepared(tmp_path / "p", **{"data.check": "full"}))
    assert_fails(capsys, [*words, "--job=prepare"], "1 of 2 shards", path.name)


def test_a_training_from_shards_gives_the_numbers_of_the_folder(trained, photos, tmp_path):
    settings = prepared(tmp_path / "p", **{"data.prepared_images": "resized"})
    assert main(prepare_words(photos, **settings)) == 0
    assert main(tiny(tmp_path / "gone", tmp_path / "run", **settings)) == 0
    assert results(tmp_path / "run") == results(trained)
    assert results(tmp_path / "run", 2) == results(trained, 2)
    assert (tmp_path / "run/data.json").read_text() == (trained / "data.json").read_text()


def test_a_workdir_goes_on_from_the_other_source_as_if_nothing_had_changed(
    trained, photos, shards, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints/4")
    shutil.rmtree(workdir / "evaluation")
    assert main(tiny(photos, workdir, **prepared(shards))) == 0
    out = capsys.readouterr().out
    assert "continuing at step 2" in out and "data.source: " in out
    assert results(workdir) == results(trained)


def test_evaluate_and_baseline_read_the_shards_too(trained, photos, shards, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("evaluation"))
    gone = {"data.root": tmp_path / "gone"}
    assert main(command("evaluate", workdir, **prepared(shards), **gone)) == 0
    assert results(workdir) == results(trained)
    capsys.readouterr()
    assert main(command("baseline", workdir, **prepared(shards), **gone)) == 0
    from_shards = capsys.readouterr().out
    assert main(command("baseline", workdir)) == 0
    assert capsys.readouterr().out == from_shards


def test_shards_need_no_data_root(shards, tmp_path, capsys):
    assert main([*tiny("", tmp_path / "run", **prepared(shards)), "--job=baseline"]) == 0
    assert "| tiny/bolt |" in capsys.readouterr().out
    assert_fails(capsys, prepare_words("", **prepared(shards)), "config.data.root=''")


def test_a_workdir_remembers_where_the_shards_are_from_every_folder(
    shards, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(shards.parent)
    tiny_config.data.source = "prepared"
    for location, remembered in (("p", str(shards)), ("gs://bucket/p", "gs://bucket/p"), ("", "")):
        tiny_config.data.prepared = location
        tiny_config.data.cache_dir = location
        settle.settle_workdir(tiny_config, tmp_path, Split([], [], []), fresh=True)
        data = configs.read_json(tmp_path / "config.json").data
        assert (data.prepared, data.cache_dir) == (remembered, remembered)
        assert data.root == tiny_config.data.root


def test_a_training_before_the_preparation_is_refused_with_the_command(photos, tmp_path, capsys):
    words = tiny(photos, tmp_path / "run", **prepared(tmp_path / "p"))
    assert_fails(capsys, words, tmp_path / "p", "--job prepare --config.data.source=prepared")
    assert not (tmp_path / "run").exists()


def test_a_training_at_another_size_than_prepared_is_refused(photos, tmp_path, capsys):
    settings = prepared(tmp_path / "p", **{"data.prepared_images": "resized"})
    assert main(prepare_words(photos, **settings)) == 0
    words = tiny(photos, tmp_path / "run", **settings | {"data.image_size": 96})
    assert_fails(capsys, words, "64 pixels instead of 96", "--config.data.image_size=64")
    words = prepare_words(photos, **settings | {"data.image_size": 96})
    assert_fails(capsys, words, "image_size=64 instead of 96")


def test_a_damaged_shard_is_named_and_repaired_by_prepare(photos, tmp_path, capsys):
    folder = tmp_path / "p"
    assert main(prepare_words(photos, **prepared(folder))) == 0
    whole = {name: content for name, (_, content) in files(folder).items()}
    truncate(next(folder.glob("ccl_jax-test*")))
    words = tiny(photos, tmp_path / "run", **prepared(folder))
    assert_fails(capsys, words, "1 of 2 shards", "--job prepare", folder)
    assert main(prepare_words(photos, **prepared(folder))) == 0
    assert "1 shards written, 1 were there" in capsys.readouterr().out
    assert {name: content for name, (_, content) in files(folder).items()} == whole


def test_generated_data_are_prepared_and_other_ones_refused(tmp_path, capsys):
    words = ["main", "--config", str(ROOT / "configs/demo.py"), "--config.run.progress=False"]
    words += [f"--config.data.root={tmp_path}/made", "--config.data.source=prepared"]
    words += [
        f"--config.synthetic.{name}=1"
        for name in ("train_per_class", "test_normal_per_class", "test_per_defect")
    ]
    words += ["--config.synthetic.image_size=32", "--config.data.classes=('nut','gear')"]
    assert main([*words, "--job=prepare"]) == 0
    shutil.rmtree(tmp_path / "made")
    assert main([*words, "--job=baseline"]) == 0
    assert "made/nut" in capsys.readouterr().out
    words = [*words, "--config.synthetic.seed=1", "--job=baseline"]
    assert_fails(capsys, words, "synthetic.seed=0 instead of 1", "--config.synthetic.seed=0")


def test_prepared_data_at_a_url_are_published_fetched_and_read(photos, tmp_path, capsys):
    url = f"file://{tmp_path}/store/photos"
    settings = prepared(url, **{"data.cache_dir": tmp_path / "here"})
    assert main(prepare_words(photos, **settings)) == 0
    assert f"{url}: 2 shards written" in capsys.readouterr().out
    assert (tmp_path / "store/photos/prepared.json").exists()
    elsewhere = settings | {"data.cache_dir": tmp_path / "there"}
    assert main([*tiny("", "unused", **elsewhere), "--job=baseline"]) == 0
    assert len(list((tmp_path / "there").glob("photos-*/ccl_jax-*"))) == 2
    other = prepare_words(photos, **elsewhere | {"data.classes": "('bolt',)"})
    assert_fails(capsys, other, f"{url} holds data prepared with other class_names", "delete all")
    assert main(prepare_words(photos, **elsewhere)) == 0
    assert f"{url}: 0 shards written" in capsys.readouterr().out


def test_the_location_is_a_url_as_it_stands_or_an_absolute_folder():
    config = configs.read_config_file(ROOT / "configs/mvtec.py")
    assert prepare.location_of(config) == os.path.abspath("data/mvtec_anomaly_detection-prepared")
    config.data.prepared = "shards"
    assert prepare.location_of(config) == os.path.abspath("shards")
    config.data.prepared = "gs://bucket/mvtec"
    assert prepare.location_of(config) == "gs://bucket/mvtec"
    assert fsspec.core.split_protocol(config.data.prepared)[0] == "gs"
