"""What a training leaves and returns when it is complete, and when it was asked to stop."""

import json
import os
import shutil
import signal
import time

import pytest

from ccl_jax import follow, jobs, main, mesh, notices, setup
from ccl_jax.datasets import read_split
from ccl_jax.scoring import Scorer
from ccl_jax.signals import Stopped


def test_a_complete_training_says_so_with_its_time_and_goodput(trained):
    mark = json.loads((trained / "complete.json").read_text())
    assert mark["step"] == 4
    assert abs(mark["time"] - time.time()) < 7200
    assert 0 < mark["step_seconds"] < mark["seconds"]
    assert mark["goodput"] == pytest.approx(mark["step_seconds"] / mark["seconds"], rel=0.2)


def test_the_log_has_speed_waiting_stalls_compile_time_and_goodput(trained):
    lines = [json.loads(line) for line in (trained / "log/metrics.jsonl").read_text().splitlines()]
    trainings = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trainings] == [2, 4]
    for line in trainings:
        assert line["images_per_second"] == line["images_per_second_per_device"] > 0
        assert 0 <= line["input_wait"] <= 1 and 0 <= line["checkpoint_stall"] < 1
        assert 0 < line["goodput"] < 1
        assert "mfu" not in line, "the peak of a CPU is not known"
    assert trainings[0]["compile_seconds"] > 0 and "compile_seconds" not in trainings[1]
    assert trainings[1]["step_seconds"] > trainings[0]["step_seconds"] > 0
    assert trainings[1]["checkpoint_stall"] > 0, "step 2 was saved after its line"


def test_a_signal_during_the_last_evaluation_ends_it_within_a_batch(
    trained, tiny_config, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("evaluation"))
    honest, scored = Scorer.__call__, []

    def asked_to_stop(self, images):
        scored.append(1)
        if len(scored) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, images)

    tiny_config.run.unfinished_exit_code = 75
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", asked_to_stop)
        assert jobs.train_job(tiny_config, workdir) == 75
    out = capsys.readouterr().out
    assert "SIGTERM: saved step 4 of 4, whose evaluation is missing; run the same command" in out
    assert len(scored) == 1
    assert (workdir / "complete.json").exists() and not (workdir / "evaluation").exists()
    assert jobs.train_job(tiny_config, workdir) == 0
    assert (workdir / "evaluation/4/results.json").exists()


def test_a_signal_during_the_preparation_of_data_ends_it_at_once(
    tiny_config, tmp_path, monkeypatch, capsys
):
    def asked_to_stop(config):
        os.kill(os.getpid(), signal.SIGUSR1)
        pytest.fail("went on")

    monkeypatch.setattr(jobs, "read_split", asked_to_stop)
    assert jobs.train_job(tiny_config, tmp_path / "run") == 128 + signal.SIGUSR1
    assert "SIGUSR1: what was saved is safe; run the same command" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_of_several_processes_none_ends_for_a_signal_during_the_preparation_alone(
    tiny_config, tmp_path, monkeypatch
):
    done = []

    def asked_to_stop(config):
        os.kill(os.getpid(), signal.SIGUSR1)
        done.append("read")
        return read_split(config)

    def with_all(stop, saved):
        done.append(stop.signal)
        raise Stopped(stop.signal, saved)

    monkeypatch.setattr(jobs, "read_split", asked_to_stop)
    monkeypatch.setattr(jobs, "check_together", with_all)
    monkeypatch.setattr(mesh, "is_alone", lambda: False)
    assert jobs.train_job(tiny_config, tmp_path / "run") == 128 + signal.SIGUSR1
    assert done == ["read", signal.SIGUSR1]


def test_a_second_ctrl_c_in_one_of_several_processes_ends_it_without_the_others(
    tiny_config, tmp_path, monkeypatch
):
    def interrupted(config, workdir):
        raise KeyboardInterrupt

    def end(status):
        raise SystemExit(status)

    monkeypatch.setitem(main.JOBS, "train", interrupted)
    monkeypatch.setattr(main, "parse", lambda words: (tiny_config, tmp_path, "train"))
    assert main.main(["main"]) == 130
    monkeypatch.setattr(mesh, "is_alone", lambda: False)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="130"):
        main.main(["main"])


def test_steps_that_are_left_take_the_mark_of_a_complete_training_away(
    tiny_config, photos, tmp_path, capsys
):
    split, where = read_split(tiny_config), mesh.make_mesh(1)
    mark = tmp_path / follow.COMPLETE
    mark.write_text("{}")
    notices.begin(tiny_config, tmp_path, split, where, done=4, total=4)
    assert mark.exists()
    for _ in range(2):
        notices.begin(tiny_config, tmp_path, split, where, done=3, total=4)
        assert not mark.exists()
    assert "4 steps of 4 images (2.0 epochs) on 1 x cpu, continuing at step 3" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("status", "alone", "waits"), [(1, False, False), (1, True, True), (143, False, True)]
)
def test_an_error_of_one_of_several_processes_ends_it_without_the_others(
    monkeypatch, status, alone, waits
):
    ended = []
    monkeypatch.setattr(mesh, "is_alone", lambda: alone)
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit) as left:
        main.leave(status)
    assert left.value.code == status
    assert ended == ([] if waits else [status])


def test_an_evaluation_on_the_way_that_was_interrupted_is_made_up_for(
    trained, tiny_config, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    wanted = json.loads((workdir / "evaluation/2/results.json").read_text())["classes"]
    for gone in ("evaluation/2", "evaluation/4", "checkpoints/4"):
        shutil.rmtree(workdir / gone)
    assert jobs.train_job(tiny_config, workdir) == 0
    assert json.loads((workdir / "evaluation/2/results.json").read_text())["classes"] == wanted
    assert (workdir / "evaluation/4/results.json").exists()


def test_how_a_training_was_spread_does_not_matter_to_later_jobs(trained, tiny_config, tmp_path):
    shutil.copy(trained / "config.json", tmp_path / "config.json")
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["run"] |= {"cluster": "gcetpu", "parameter_shards": 4}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    words = ["--job", "evaluate", f"--workdir={tmp_path}"]
    config = main.read_config(None, words)
    assert config.run.cluster == "auto"
    assert config.run.devices == 1
    with pytest.raises(ValueError, match="parameter_shards=4 does not divide the 1 devices"):
        setup.devices_of(config)
    assert setup.devices_of(config, "eval.batch_size", shards=1).size == 1
