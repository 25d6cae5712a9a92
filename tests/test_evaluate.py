import json
import shutil

import jax
import miniatures as mini
import numpy as np
import pytest
from conftest import ROOT, make_tiny_config, write_photos
from sklearn.metrics import roc_auc_score

from ccl_jax import config as configs
from ccl_jax import evaluate as evaluation
from ccl_jax import jobs
from ccl_jax.data.layouts import read_mvtec, read_split
from ccl_jax.data.records import read_mask
from ccl_jax.metrics import conventions
from ccl_jax.metrics.scores import IMAGE_METRICS, METRICS, PIXEL_METRICS, pixel_histogram
from ccl_jax.predict import load_detector


def results_of(workdir, step=4):
    return json.loads((workdir / f"evaluation/{step}/results.json").read_text())


def evaluate_on(photos, trained, tmp_path, **changes):
    """Evaluates the trained detector on other photos, in a workdir of its own."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("evaluation"))
    config = make_tiny_config(photos)
    config.update_from_flattened_dict(changes)
    assert jobs.evaluate_job(config, workdir) == 0
    return results_of(workdir)


def test_training_leaves_results_as_designed(trained):
    results = results_of(trained)
    assert results["step"] == 4 and results["dataset"] == "tiny"
    assert set(results["classes"]) == {"tiny/bolt", "tiny/felt"}
    for row in results["classes"].values():
        assert (row["n_normal"], row["n_anomalous"]) == (2, 2)
        assert all(0 <= row[name] <= 1 for name in METRICS)
    assert set(results["mean"]) == set(METRICS)
    assert results["mean_over"] == dict.fromkeys(METRICS, 2)
    provenance = results["provenance"]
    assert provenance["seed"] == 42
    assert provenance["encoder"]["source"] == "random"
    assert provenance["versions"]["jax"] == jax.__version__
    assert provenance["config"]["train"]["batch_size"] == 4
    folder = trained / "evaluation/4"
    assert "| **mean**" in (folder / "results.md").read_text()
    assert (folder / "report.html").exists()
    assert (folder / "figures/tiny/bolt.png").stat().st_size > 10_000
    assert results_of(trained, step=2)["step"] == 2  # config.eval.every_steps


def test_metrics_agree_with_the_detectors_own_scores(trained, photos):
    split = read_mvtec(photos, dataset="tiny")
    detector = load_detector(trained)
    for label, name in enumerate(split.class_names):
        mine = [record for record in split.test if record.label == label]
        prediction = detector.predict([record.image for record in mine])
        truth = [record.anomalous for record in mine]
        expected = roc_auc_score(truth, prediction.scores)
        assert results_of(trained)["classes"][name]["image_auroc"] == expected


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluating_again_gives_the_same_numbers(trained, photos, tmp_path, devices):
    changes = {"run.devices": devices, "eval.batch_size": 8}
    again = evaluate_on(photos, trained, tmp_path, **changes)
    for name, row in results_of(trained)["classes"].items():
        for metric, value in row.items():
            assert again["classes"][name][metric] == pytest.approx(value, abs=1e-3), metric


def test_published_conventions_are_reported_beside_the_exact_metrics(trained, photos, tmp_path):
    names = ("adeval_50", "threshold_step")
    results = evaluate_on(photos, trained, tmp_path, **{"eval.published_metrics": names})
    assert "published_conventions" not in results_of(trained)
    assert results["mean"] == pytest.approx(results_of(trained)["mean"], abs=1e-6)
    assert list(results["published_conventions"]) == list(names)
    split = read_mvtec(photos, dataset="tiny")
    detector = load_detector(trained)
    for label, class_name in enumerate(split.class_names):
        mine = [record for record in split.test if record.label == label]
        maps = detector.predict([record.image for record in mine]).maps
        masks = np.stack([read_mask(record, detector.size) for record in mine])
        pixels = pixel_histogram(maps, masks)
        for name in names:
            found = results["published_conventions"][name]
            assert "streaming counts" in found["description"]
            # A bin is an eight-thousandth of a score; these maps spread little.
            expected = conventions.pixel_metrics(name, pixels)
            assert found["classes"][class_name] == pytest.approx(expected, abs=0.01)
    for metric, value in results["published_conventions"]["adeval_50"]["mean"].items():
        rows = results["published_conventions"]["adeval_50"]["classes"].values()
        assert value == pytest.approx(np.mean([row[metric] for row in rows]))


def test_classes_without_masks_have_null_pixel_metrics_with_the_reason(trained, tmp_path):
    photos = write_photos(tmp_path / "photos", classes=("bolt",), masks=False)
    write_photos(photos, classes=("felt",))
    results = evaluate_on(photos, trained, tmp_path)
    bolt, felt = results["classes"]["tiny/bolt"], results["classes"]["tiny/felt"]
    assert all(bolt[name] is None for name in PIXEL_METRICS)
    assert all(bolt[name] is not None for name in IMAGE_METRICS)
    assert "mask" in results["reasons"]["tiny/bolt"]["pixel_auroc"]
    assert all(felt[name] is not None for name in METRICS)
    assert results["mean"]["pixel_auroc"] == felt["pixel_auroc"]
    assert results["mean_over"]["pixel_auroc"] == 1


def test_classes_without_anomalies_say_so(trained, tmp_path):
    photos = write_photos(tmp_path / "photos")
    shutil.rmtree(photos / "bolt/test/square")
    shutil.rmtree(photos / "bolt/ground_truth")
    results = evaluate_on(photos, trained, tmp_path)
    assert all(results["classes"]["tiny/bolt"][name] is None for name in METRICS)
    assert "no anomalous" in results["reasons"]["tiny/bolt"]["image_auroc"]


def test_one_single_test_image_is_evaluated(trained, tmp_path):
    photos = write_photos(tmp_path / "photos")
    for name in ("bolt/test", "bolt/ground_truth", "felt/test/good", "felt/ground_truth"):
        shutil.rmtree(photos / name)
    (photos / "felt/test/square/001.png").unlink()
    results = evaluate_on(photos, trained, tmp_path)
    assert results["classes"]["tiny/felt"]["n_anomalous"] == 1
    assert results["reasons"]["tiny/bolt"]["image_auroc"] == "no test images"
    assert results["reasons"]["tiny/felt"]["image_auroc"] == "no normal test images"


def test_parts_with_several_views_are_judged_as_one(trained, tmp_path):
    root = mini.real_iad(tmp_path / "iad")
    changes = {"data.root": str(root), "data.layout": "real_iad", "data.name": "iad"}
    results = evaluate_on(root, trained, tmp_path, **changes)
    split = read_split(root, layout="real_iad", dataset="iad")
    detector = load_detector(trained)
    for label, name in enumerate(split.class_names):
        mine = [record for record in split.test if record.label == label]
        scores = detector.predict([record.image for record in mine]).scores
        of_part = {
            bad: max(s for s, r in zip(scores, mine, strict=True) if r.sample.startswith(bad))
            for bad in ("NG", "OK")
        }
        expected = 1.0 if of_part["NG"] > of_part["OK"] else 0.0
        row = results["classes"][name]
        assert (row["n_normal"], row["n_anomalous"]) == (6, 4)
        assert row["sample_auroc"] == expected
    assert results["mean_over"]["sample_auroc"] == 2


def test_a_joint_set_is_judged_class_by_class_and_data_set_by_data_set(trained, tmp_path):
    photos = write_photos(tmp_path / "photos", classes=("toy",))
    config = configs.read_config_file(ROOT / "configs/joint.py")
    config.update(make_tiny_config(photos))
    config.data.layout = "joint"
    config.data.name = ""
    config.data.root = ""
    del config.unlock().data.parts["visa"], config.data.parts["btad"]
    config.data.parts.mvtec.root = str(photos)
    config.data.parts.real_iad.root = str(mini.real_iad(tmp_path / "iad"))
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("evaluation"))
    assert jobs.evaluate_job(config, workdir) == 0
    results = results_of(workdir)
    assert results["dataset"] == "mvtec + real_iad"
    assert list(results["classes"]) == ["mvtec/toy", "real_iad/audiojack", "real_iad/toy"]
    assert "sample_auroc" not in results["classes"]["mvtec/toy"]
    assert results["mean_over"]["sample_auroc"] == 2
    for name in results["classes"]:
        assert (workdir / f"evaluation/4/figures/{name}.png").exists()
    assert "| real_iad/toy " in (workdir / "evaluation/4/results.md").read_text()


def test_no_test_images_at_all_still_gives_a_result(trained, tmp_path):
    photos = write_photos(tmp_path / "photos")
    for name in ("bolt/test", "bolt/ground_truth", "felt/test", "felt/ground_truth"):
        shutil.rmtree(photos / name)
    results = evaluate_on(photos, trained, tmp_path)
    assert results["mean"] == dict.fromkeys(METRICS)


def test_figures_take_defects_in_turn_and_then_normal_images(photos):
    records = read_mvtec(photos, dataset="tiny").test
    chosen = evaluation.chosen_for_figures(records, 3)
    kinds = [records[i].anomalous for i in chosen["tiny/bolt"]]
    assert kinds == [True, True, False]
    assert evaluation.chosen_for_figures(records, 0) == {}


def test_the_released_image_label_calls_a_vanished_defect_normal():
    batch = {
        "mask": np.zeros((3, 4, 4), np.uint8),
        "label": np.array([0, 0, 1]),
        "anomalous": np.array([True, True, True]),
    }
    batch["mask"][1, 0, 0] = 1
    by_mask = evaluation.image_labels(batch, {0}, "mask")
    assert by_mask.tolist() == [False, True, True]  # class 1 has no masks to go by
    assert evaluation.image_labels(batch, {0}, "folder").all()
