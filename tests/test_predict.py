import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ccl_jax.data.layouts import plain_images
from ccl_jax.predict import load_detector, predict_files


@pytest.fixture(scope="module")
def detector(trained):
    return load_detector(trained)


def test_paths_arrays_and_pil_images_get_the_same_scores(detector, photos):
    paths = plain_images(photos / "bolt/test")
    from_paths = detector.predict(paths)
    assert from_paths.scores.shape == (4,)
    assert from_paths.maps.shape == (4, 64, 64)
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    for images in (arrays, np.stack(arrays), [Image.fromarray(a) for a in arrays]):
        again = detector.predict(images)
        np.testing.assert_array_equal(again.scores, from_paths.scores)
        np.testing.assert_array_equal(again.maps, from_paths.maps)


def test_one_image_is_a_list_of_one(detector, photos):
    path = photos / "felt/test/good/000.png"
    for image in (path, str(path), np.asarray(Image.open(path))):
        assert detector.predict(image).scores.shape == (1,)


def test_scores_do_not_depend_on_the_batch(detector, photos):
    paths = plain_images(photos / "bolt/test")
    together = detector.predict(paths)
    alone = np.concatenate([detector.predict(path, batch_size=1).scores for path in paths])
    np.testing.assert_allclose(together.scores, alone, rtol=1e-4)


def test_the_image_score_is_the_maximum_of_the_map(detector, photos):
    prediction = detector.predict(photos / "bolt/test/square/000.png")
    assert prediction.scores[0] == prediction.maps[0].max()


def test_a_detector_says_what_it_is(detector):
    assert repr(detector) == "Detector(step=4, size=64)"


def test_no_images_give_an_empty_prediction(detector):
    prediction = detector.predict([])
    assert prediction.scores.shape == (0,) and prediction.maps.shape == (0, 64, 64)


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros(8, np.uint8)],
)
def test_an_array_that_is_no_image_is_refused_with_the_fix(detector, array):
    with pytest.raises(ValueError, match="pass uint8"):
        detector.predict([array])


def test_grayscale_arrays_are_accepted(detector):
    assert detector.predict(np.zeros((9, 7), np.uint8)).scores.shape == (1,)


def test_a_folder_gives_scores_and_overlays_and_names_the_bad_file(detector, photos, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(photos / "bolt/test", folder)
    (folder / "notes.png").write_text("not an image")
    table, unreadable = predict_files(detector, folder, tmp_path / "out", batch_size=2)
    assert unreadable == 1
    rows = {row["image"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert len(rows) == 5
    assert "notes.png" in rows["notes.png"]["error"] and rows["notes.png"]["score"] == ""
    good = rows["square/000.png"]
    expected = detector.predict(folder / "square/000.png").scores[0]
    assert float(good["score"]) == pytest.approx(expected, rel=1e-4)
    with Image.open(table.parent / good["overlay"]) as overlay:
        assert overlay.size == (64, 64)
    assert len(list((table.parent / "overlays").rglob("*.png"))) == 4


def test_only_unreadable_files_are_an_error(detector, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 files can be read.*a\.png"):
        predict_files(detector, tmp_path, tmp_path / "out", batch_size=2)


def test_names_that_could_collide_get_overlays_of_their_own(detector, photos, tmp_path):
    source = photos / "bolt/test/good/000.png"
    for name in ("a/b.png", "a_b.png", "a__b.png", "a_/b.png", "a/_b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "in" / name)
    predict_files(detector, tmp_path / "in", tmp_path / "out", batch_size=4)
    assert len(list((tmp_path / "out/overlays").rglob("*.png"))) == 5


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_detector(tmp_path)


def test_the_config_of_another_version_is_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["eval"]["distance"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no eval\.distance: it comes from another version"):
        load_detector(tmp_path / "run")


def test_an_encoder_that_was_changed_is_refused(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    path = workdir / "encoder/encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(ValueError, match=r"encoder\.safetensors has the hash"):
        load_detector(workdir)


def test_a_step_without_checkpoint_lists_those_there(trained):
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        load_detector(trained, step=3)
    assert load_detector(trained, step=2).step == 2


def test_a_checkpoint_of_another_model_is_refused(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"depthwise"', '"plain"'))
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_detector(workdir)
    assert "projector" in str(error.value)
