"""The command line as a user types it; most tests call main() in this process, to save imports."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import miniatures as mini
import pytest
from conftest import ROOT, write_photos

from ccl_jax import settle
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.data.layouts import Split
from ccl_jax.main import main
from ccl_jax.run_log import RunLog


def command(job, workdir, **settings):
    words = ["main", "--job", job, "--workdir", str(workdir)]
    return words + [f"--config.{key}={value}" for key, value in settings.items()]


def tiny(photos, workdir, **settings):
    """The smallest training as a command line."""
    settings = {
        "data.root": photos,
        "data.name": "tiny",
        "data.image_size": 64,
        "encoder.weights": "random",
        "model.encoder": "resnet10",
        "model.projector": "depthwise",
        "train.batch_size": 4,
        "train.steps": 4,
        "train.log_every": 2,
        "train.checkpoint_every": 2,
        "eval.batch_size": 4,
        "eval.every_steps": 2,
        "eval.figures_per_class": 1,
        "run.devices": 1,
        "run.tensorboard": False,
        "run.progress": False,
    } | settings
    return [*command("train", workdir, **settings), "--config", str(ROOT / "configs/folder.py")]


def assert_fails(capsys, words, *expected, status=1):
    """The one clear message that a command ends with."""
    assert main(words) == status
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message, message
    for text in expected:
        assert str(text) in message, message
    return message


def test_evaluate_and_predict_need_only_the_workdir(trained, photos, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("evaluation"))
    assert main(command("evaluate", workdir, **{"eval.step": 2})) == 0
    assert "**mean**" in capsys.readouterr().out
    assert json.loads((workdir / "evaluation/2/results.json").read_text())["step"] == 2
    image = photos / "bolt/test/square/000.png"
    assert main(command("predict", workdir, **{"predict.input": image})) == 0
    assert (workdir / "predictions/scores.csv").exists()
    assert (workdir / "predictions/overlays").is_dir()


def test_prepare_counts_the_images(photos, capsys):
    words = ["main", "--config", str(ROOT / "configs/folder.py"), "--job=prepare"]
    assert main([*words, f"--config.data.root={photos}"]) == 0
    assert "bolt: 4 to train on, 2 normal and 2 anomalous to test on" in capsys.readouterr().out


def test_prepare_says_where_the_data_come_from_even_before_they_are_there(tmp_path, capsys):
    words = ["main", "--config", str(ROOT / "configs/visa.py"), "--job=prepare"]
    words.append(f"--config.data.root={tmp_path / 'VisA'}")
    assert_fails(capsys, words, "VisA does not exist")
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "licence: CC BY 4.0" in out and "VisA_20220922.tar" in out
    mini.visa(tmp_path / "VisA")
    assert main(words) == 0
    assert "visa/pcb1: 3 to train on, 1 normal and 1 anomalous" in capsys.readouterr().out


def test_prepare_describes_every_part_of_a_joint_set_and_what_is_left_aside(tmp_path, capsys):
    words = ["main", "--config", str(ROOT / "configs/joint.py"), "--job=prepare"]
    (tmp_path / "visa").mkdir()
    roots = {
        "mvtec": mini.mvtec2(tmp_path / "mvtec2"),
        "visa": mini.visa(tmp_path / "visa"),
        "btad": mini.btad(tmp_path / "btad"),
        "real_iad": mini.real_iad(tmp_path / "iad"),
    }
    words += [f"--config.data.parts.{name}.root={root}" for name, root in roots.items()]
    words.append("--config.data.parts.mvtec.layout=mvtec2")
    assert main(words) == 0
    out = capsys.readouterr().out
    for text in ("mvtec: MVTec AD 2,", "visa: VisA,", "btad: BTAD", "real_iad: Real-IAD,"):
        assert text in out
    assert "mvtec: 4 validation images are set aside" in out
    assert "9 classes" in out and "real_iad/toy: 10 to train on" in out


def test_help_says_what_the_jobs_do(capsys):
    assert main(["main", "--help"]) == 0
    assert "--config configs/demo.py" in capsys.readouterr().out


def test_an_unknown_setting_gets_a_did_you_mean(photos, tmp_path, capsys):
    words = tiny(photos, tmp_path / "run", **{"train.batchsize": 8})
    message = assert_fails(capsys, words, "config.train.batchsize", status=2)
    assert 'Did you mean "config.train.batch_size"?' in message


def test_a_setting_of_the_wrong_type_is_named(photos, tmp_path, capsys):
    words = tiny(photos, tmp_path / "run", **{"train.batch_size": "many"})
    assert_fails(capsys, words, "config.train.batch_size", "many", status=2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["main"], "--config configs/demo.py"),
        (["main", "--job=fly"], "fly"),
        (["main", "--config", "nowhere.py", "--workdir", "x"], "nowhere.py"),
        (["main", "--config", str(ROOT / "configs/demo.py")], "--workdir"),
        (["main", "--config", str(ROOT / "configs/demo.py"), "train"], "train"),
        (["main", "--job=evaluate"], "needs a trained folder"),
        (["main", "--job=evaluate", "--workdir=nowhere"], "nowhere/config.json does not exist"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_explained(words, expected, capsys):
    assert_fails(capsys, words, expected, status=2)


def test_illegal_values_are_refused_before_anything_is_written(photos, tmp_path, capsys):
    words = tiny(photos, tmp_path / "run", **{"data.image_size": 65})
    assert_fails(capsys, words, "config.data.image_size=65")
    assert not (tmp_path / "run").exists()


def test_a_missing_data_folder_is_named(tmp_path, capsys):
    assert_fails(capsys, tiny(tmp_path / "no", tmp_path / "run"), tmp_path / "no")


def test_a_class_without_training_images_is_named(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos")
    shutil.rmtree(photos / "bolt/train")
    assert_fails(capsys, tiny(photos, tmp_path / "run"), "bolt")


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", train=1)
    assert_fails(
        capsys, tiny(photos, tmp_path / "run"), "config.train.batch_size=4", "2 training images"
    )


def test_a_training_set_of_one_image_is_refused_or_trained_with_a_batch_of_one(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", classes=("bolt",), train=1)
    assert_fails(capsys, tiny(photos, tmp_path / "run"), "config.train.batch_size=4")
    words = tiny(photos, tmp_path / "run", **{"train.batch_size": 1, "train.steps": 2})
    assert main(words) == 0


@pytest.mark.parametrize("setting", ["train.batch_size", "eval.batch_size"])
def test_a_batch_that_the_devices_cannot_divide_is_refused(photos, tmp_path, capsys, setting):
    words = tiny(photos, tmp_path / "run", **{"run.devices": 4, setting: 6})
    message = assert_fails(capsys, words, f"config.{setting}=6", "4 devices")
    assert f"--config.{setting}=8" in message


def test_more_devices_than_there_are_is_refused(photos, tmp_path, capsys):
    assert_fails(
        capsys, tiny(photos, tmp_path / "run", **{"run.devices": 9}), "config.run.devices=9"
    )


def test_a_workdir_of_another_config_is_refused_and_left_alone(trained, photos, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    before = (workdir / "config.json").read_text()
    words = tiny(photos, workdir, **{"optimizer.lr": 1e-3})
    assert_fails(capsys, words, "optimizer.lr: 0.005 -> 0.001", f"--workdir={workdir}-2")
    assert (workdir / "config.json").read_text() == before


def test_settings_of_how_to_run_may_differ_and_are_listed(trained, photos, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    assert main(tiny(photos, workdir, **{"run.threads": 2, "eval.batch_size": 2})) == 0
    out = capsys.readouterr().out
    assert "run.threads: 4 -> 2" in out and "eval.batch_size: 4 -> 2" in out
    assert json.loads((workdir / "config.json").read_text())["run"]["threads"] == 2


def test_two_runs_in_one_workdir_are_refused(trained, photos, tmp_path, capsys):
    from ccl_jax.workdir import lock_workdir

    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    with lock_workdir(workdir):
        assert_fails(capsys, tiny(photos, workdir), "in use by another run", os.getpid())


def test_an_unwritable_workdir_is_refused(photos, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_fails(
        capsys, tiny(photos, tmp_path / "file/run"), tmp_path / "file/run", "cannot be written"
    )


@pytest.mark.parametrize("content", [b"", b"text"])
@pytest.mark.parametrize("name", ["train/good/001.png", "test/good/001.png"])
def test_a_file_that_is_no_image_is_named_before_the_training(tmp_path, capsys, name, content):
    photos = write_photos(tmp_path / "photos", train=2)
    bad = photos / "felt" / name
    bad.write_bytes(content)
    assert_fails(capsys, tiny(photos, tmp_path / "run"), bad, "cannot be read as an image")
    assert not (tmp_path / "run").exists()


def test_a_mask_of_another_size_is_named_before_the_training(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", train=2)
    write_photos(tmp_path / "larger", size=(80, 60))
    bad = "bolt/ground_truth/square/001_mask.png"
    shutil.copy(tmp_path / "larger" / bad, photos / bad)
    assert_fails(capsys, tiny(photos, tmp_path / "run"), photos / bad, "80x60", "70x50")
    assert not (tmp_path / "run").exists()


def test_a_truncated_training_image_stops_the_run_and_may_be_taken_out(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", train=3)
    bad = photos / "felt/train/good/002.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    words = tiny(photos, tmp_path / "run", **{"train.batch_size": 6, "train.steps": 1})
    assert_fails(capsys, words, bad, "cannot be read as an image")
    bad.unlink()
    words = tiny(photos, tmp_path / "run", **{"train.steps": 1})
    assert main(words) == 0


def test_a_first_start_that_failed_leaves_the_workdir_free_for_other_settings(
    photos, tmp_path, capsys
):
    workdir = tmp_path / "run"
    words = tiny(photos, workdir, **{"encoder.weights": "missing.safetensors"})
    assert_fails(capsys, words, "missing.safetensors")
    assert main(tiny(photos, workdir, **{"train.batch_size": 2, "train.steps": 1})) == 0


def test_training_images_that_changed_since_the_start_are_refused(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    photos = write_photos(tmp_path / "photos", train=5)
    assert_fails(capsys, tiny(photos, workdir), "started with 8 training images", "now holds 10")


def test_a_bad_file_met_later_loses_no_step(tmp_path, capsys, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    honest = RunLog.advance

    def spoil(self, step):
        honest(self, step)
        for path in photos.glob("*/train/good/*.png"):
            path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", spoil)
        words = tiny(photos, tmp_path / "run", **{"train.steps": 40, "run.threads": 1})
        words += ["--config.data.cache_gib=0"]  # an image that is in memory is not read again
        words += ["--config.train.checkpoint_every=1000", "--config.eval.every_steps=0"]
        assert_fails(capsys, words, "cannot be read as an image")
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        assert checkpoints.latest is not None and checkpoints.latest >= 1


def test_bad_training_files_are_skipped_when_asked_for_and_named_at_once_and_at_the_end(
    tmp_path, capsys
):
    photos = write_photos(tmp_path / "photos")
    bad = photos / "felt/train/good/002.png"
    words = tiny(photos, tmp_path / "run", **{"eval.every_steps": 0})
    bad.write_bytes(b"")
    message = assert_fails(capsys, words, bad, "cannot be read as an image")
    assert "--config.data.bad_files=skip" in message
    assert main([*words, "--config.data.bad_files=skip"]) == 0
    out, err = capsys.readouterr()
    assert err.count(f"{bad} cannot be read as an image") == 1
    end = out[out.index("1 training images could not be read") :]
    assert f"{bad} cannot be read as an image" in end and "**mean**" in end
    log = (tmp_path / "run/log/metrics.jsonl").read_text()
    notes = [line for line in map(json.loads, log.splitlines()) if "note" in line]
    assert [line["note"].split(" cannot")[0] for line in notes] == [str(bad)]


def test_a_run_that_a_bad_file_stopped_goes_on_when_it_may_be_skipped(trained, tmp_path, capsys):
    photos, workdir = write_photos(tmp_path / "photos"), tmp_path / "run"
    shutil.copytree(trained, workdir)
    for bad in photos.glob("bolt/train/good/00[012].png"):
        bad.write_bytes(b"")
    words = tiny(photos, workdir, **{"data.bad_files": "skip", "data.cache_gib": 0})
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"]["bad_files"] == "stop"
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "data.bad_files: 'stop' -> 'skip'" in out and "continuing at step 4" in out


def test_skipped_files_are_remembered_over_starts_and_stand_in_the_results(
    tiny_config, tmp_path, capsys
):
    photos, workdir = write_photos(tmp_path / "photos"), tmp_path / "run"
    bad = photos / "felt/train/good/002.png"
    whole = bad.read_bytes()
    words = tiny(photos, workdir, **{"data.bad_files": "skip", "eval.every_steps": 0})
    words.append("--config.train.steps=2")

    def skipped():
        results = json.loads((workdir / "evaluation/2/results.json").read_text())
        return results["provenance"]["skipped_training_images"]

    bad.write_bytes(b"")
    assert main(words) == 0
    assert [reason.partition(" cannot be read")[0] for reason in skipped()] == [str(bad)]
    bad.write_bytes(whole)
    capsys.readouterr()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "continuing at step 2" in out and "1 training images could not be read" in out
    assert len(skipped()) == 1
    # A new training in the same folder has skipped nothing.
    settle.settle_workdir(tiny_config, workdir, Split([], [], []), fresh=True)
    assert settle.skipped_in(workdir) == []


def test_a_damaged_config_of_a_workdir_is_named(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "config.json").write_text("{")
    assert_fails(capsys, command("evaluate", workdir), workdir / "config.json", "damaged", status=2)


@pytest.mark.parametrize("job", ["evaluate", "predict"])
def test_a_trained_workdir_is_not_used_at_another_size(trained, photos, tmp_path, capsys, job):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    words = command(job, workdir, **{"data.image_size": 96, "predict.input": photos})
    assert_fails(capsys, words, "data.image_size: 64 -> 96")


def test_predict_tells_of_unreadable_files_and_ends_with_status_1(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    photos = write_photos(tmp_path / "photos")
    (photos / "bolt/test/good/001.png").write_text("")
    words = command("predict", workdir, **{"predict.input": photos / "bolt/test"})
    assert main(words) == 1
    assert "1 files could not be read" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(trained, photos, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"depthwise"', '"plain"'))
    assert_fails(capsys, command("evaluate", workdir), "does not fit the model", workdir)


def test_an_error_that_is_not_ours_keeps_its_traceback(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ccl_jax.datasets.check_records", lambda *_: json.loads("{"))
    assert main(tiny(photos, tmp_path / "run")) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readme_demo_command_leaves_what_the_design_promises(tmp_path):
    readme = (ROOT / "README.md").read_text()
    line = next(
        line for line in readme.splitlines() if "ccl_jax.main --config configs/demo" in line
    )
    words = line[line.index("-m ccl_jax.main") :].split("#")[0].split()
    words[words.index("--workdir") + 1] = str(tmp_path / "run")
    small = {
        "data.root": tmp_path / "data",
        "data.image_size": 64,
        "synthetic.image_size": 64,
        "synthetic.train_per_class": 2,
        "synthetic.test_normal_per_class": 2,
        "synthetic.test_per_defect": 1,
        "train.steps": 2,
        "train.batch_size": 4,
    }
    words += [f"--config.{key}={value}" for key, value in small.items()]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # as users run it
    ran = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "**mean**" in ran.stdout
    results = json.loads((tmp_path / "run/evaluation/2/results.json").read_text())
    assert len(results["classes"]) >= 8
    assert results["mean"]["image_auroc"] is not None
    for name in (
        "config.json",
        "encoder/encoder.safetensors",
        "checkpoints/2",
        "log/metrics.jsonl",
    ):
        assert (tmp_path / "run" / name).exists(), name
    assert list((tmp_path / "run/log").glob("events*"))
    for name in ("results.md", "report.html"):
        assert "mean" in (tmp_path / "run/evaluation/2" / name).read_text(), name
    figures = list((tmp_path / "run/evaluation/2/figures").rglob("*.png"))
    assert len(figures) == len(results["classes"])


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_saves_and_the_next_one_goes_on(photos, tmp_path):
    words = tiny(photos, tmp_path / "run", **{"train.steps": 100000, "eval.every_steps": 0})
    start = ["launch/local.sh", *words[3:]]
    environment = os.environ | {"PYTHON": sys.executable}
    log = tmp_path / "run/log/metrics.jsonl"
    saved = []
    for _ in range(2):
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        process = subprocess.Popen(
            start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        while process.poll() is None and not (
            log.exists() and len(log.read_text().splitlines()) > lines
        ):
            time.sleep(0.2)
        process.terminate()
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, out
        saved.append(int(out.split("SIGTERM: saved step ")[1].split()[0]))
        with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
            assert checkpoints.latest == saved[-1]
    assert f"continuing at step {saved[0]}" in out
    assert saved[1] > saved[0] > 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps))
