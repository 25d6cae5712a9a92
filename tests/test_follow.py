"""An evaluator that follows a training: every checkpoint once, whatever happens on either side."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import pytest
from conftest import make_tiny_config

from ccl_jax import follow as following
from ccl_jax import jobs, main, mesh, report, scoring
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.loop import check_together
from ccl_jax.metrics.counts import UnusableScoresError
from ccl_jax.metrics.scores import METRICS
from ccl_jax.scoring import MapSettings, Scorer
from ccl_jax.signals import Stopped, StopRequest
from ccl_jax.watch import Watch
from ccl_jax.workdir import lock_workdir

CONVENTIONS = {"aupro_fpr_limit": 0.3, "published_metrics": ()}


class Trainer:
    """What a training leaves in its workdir, without the training."""

    def __init__(self, workdir, keep=5):
        self.workdir = workdir
        self.keep = keep

    def save(self, *steps):
        with Checkpoints(self.workdir / "checkpoints", keep=self.keep) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"weights": jnp.arange(4.0)})

    def complete(self, step):
        (self.workdir / following.COMPLETE).write_text(json.dumps({"step": step}))

    def damage(self, step):
        (self.workdir / f"checkpoints/{step}/state/_METADATA").write_text("{")

    def evaluate(self, step, **changes):
        values = {"n_normal": 1, "n_anomalous": 1, **dict.fromkeys(METRICS, step / 100)}
        results = report.summarize(
            {"a": values},
            {},
            step=step,
            dataset="toy",
            conventions=CONVENTIONS | changes,
            provenance={},
        )
        report.write_results(self.workdir / f"evaluation/{step}", results)


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path / "run")


def follow(trainer, monkeypatch, *script, patience=0.0, evaluate=None):
    """The status of a follower in whose pauses the script happens; the steps that it evaluated."""
    events = list(script)
    evaluated = []
    abstract = {"weights": jnp.zeros(4)}

    def nap(seconds, stop):
        events.pop(0)()  # IndexError: it waits for what never comes

    def load(step):
        with Checkpoints(trainer.workdir / "checkpoints") as checkpoints:
            checkpoints.restore(step, abstract)
        settings = MapSettings(64, 4.0, "add", "cosine", 1)
        return Scorer(None, {}, {}, settings, mesh.make_mesh(1), step, {})

    def run(scorer):
        evaluated.append(scorer.step)
        (evaluate or (lambda scorer: trainer.evaluate(scorer.step)))(scorer)

    monkeypatch.setattr(following, "nap", nap)
    try:
        with StopRequest() as stop:
            status = following.follow(
                trainer.workdir,
                lambda: following.Evaluator(load, run),
                conventions=CONVENTIONS,
                poll_seconds=1.0,
                patience=patience,
                stop=stop,
                watch=Watch(trainer.workdir / following.LOG, index=0, count=1, stall_seconds=0.0),
                tensorboard=False,
            )
    except Stopped as stopped:
        print(stopped)
        status = 128 + stopped.signal
    assert events == [], "it ended before the script did"
    return status, evaluated


def log_of(trainer):
    text = (trainer.workdir / following.LOG / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def nothing():
    pass


def test_a_follower_takes_every_checkpoint_once_and_ends_with_the_training(
    trainer, monkeypatch, capsys
):
    assert follow(
        trainer,
        monkeypatch,
        nothing,  # the workdir is not there yet
        lambda: trainer.save(2),
        nothing,
        lambda: (trainer.save(4), trainer.complete(4)),
    ) == (0, [2, 4])
    assert [(line["step"], line["image_auroc"]) for line in log_of(trainer)] == [
        (2, 0.02),
        (4, 0.04),
    ]
    out = capsys.readouterr().out
    assert out.count("waiting for checkpoints") == 1
    assert "its last step 4 is evaluated" in out


def test_a_slow_follower_takes_the_newest_and_names_what_was_deleted_before(
    trainer, monkeypatch, capsys
):
    trainer.keep = 2
    trainer.save(1, 2)

    def evaluate(scorer):
        trainer.evaluate(scorer.step)
        if scorer.step == 2:
            trainer.save(3, 4)
            trainer.complete(4)

    assert follow(trainer, monkeypatch, evaluate=evaluate) == (0, [2, 4, 3])
    assert "step 1 is skipped: its checkpoint was deleted" in capsys.readouterr().out


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_named(trainer, monkeypatch, capsys):
    trainer.save(1, 2)
    trainer.damage(2)  # half deleted
    trainer.complete(3)

    def go_on():
        shutil.rmtree(trainer.workdir / "checkpoints/2")
        trainer.save(3)

    assert follow(trainer, monkeypatch, go_on) == (0, [3, 1])
    assert "step 2 is skipped: its checkpoint was deleted" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_tried_twice_named_and_skipped(trainer, monkeypatch, capsys):
    trainer.save(1, 2, 3)
    trainer.damage(2)
    trainer.complete(3)
    assert follow(trainer, monkeypatch, nothing) == (0, [3, 1])
    out = capsys.readouterr().out
    assert out.count("step 2 is skipped") == 1 and "is damaged or incomplete" in out


def test_a_last_checkpoint_that_cannot_be_read_is_an_error(trainer, monkeypatch, capsys):
    trainer.save(1, 2)
    trainer.damage(2)
    trainer.complete(2)
    assert follow(trainer, monkeypatch, nothing) == (1, [1])
    assert "last step 2 could not be evaluated" in capsys.readouterr().out


def test_a_last_checkpoint_that_is_nowhere_is_an_error(trainer, monkeypatch, capsys):
    trainer.workdir.mkdir()
    trainer.complete(2)
    assert follow(trainer, monkeypatch, nothing) == (1, [])
    assert "there is no checkpoint at all" in capsys.readouterr().out


def test_a_diverged_network_is_named_and_skipped(trainer, monkeypatch, capsys):
    trainer.save(1, 2)
    trainer.complete(2)

    def evaluate(scorer):
        if scorer.step == 1:
            raise UnusableScoresError("NaN in class toy/a")
        trainer.evaluate(scorer.step)

    assert follow(trainer, monkeypatch, evaluate=evaluate) == (0, [2, 1])
    assert "step 1 is skipped: NaN in class toy/a" in capsys.readouterr().out


def test_an_evaluation_without_results_is_not_made_for_ever(trainer, monkeypatch, capsys):
    trainer.save(1)
    trainer.complete(1)
    assert follow(trainer, monkeypatch, evaluate=lambda scorer: None) == (1, [1])
    assert "step 1 is skipped: its evaluation left no results.json" in capsys.readouterr().out


def test_an_evaluation_that_fails_otherwise_ends_the_follower(trainer, monkeypatch):
    trainer.save(1)

    def evaluate(scorer):
        raise ValueError("a.png cannot be read")

    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        follow(trainer, monkeypatch, evaluate=evaluate)


def test_what_the_training_evaluated_itself_is_logged_and_left_as_it_is(
    trainer, monkeypatch, capsys
):
    trainer.save(1, 2)
    trainer.evaluate(1, aupro_fpr_limit=0.05)
    trainer.complete(2)
    assert follow(trainer, monkeypatch) == (0, [2])
    assert [line["step"] for line in log_of(trainer)] == [1, 2]
    out = capsys.readouterr().out
    assert "step 1 was evaluated by other settings (aupro_fpr_limit)" in out
    assert "step 2 was" not in out


def test_damaged_results_are_made_again(trainer, monkeypatch, capsys):
    trainer.save(1)
    trainer.evaluate(1)
    (trainer.workdir / "evaluation/1/results.json").write_text("{")
    trainer.complete(1)
    assert follow(trainer, monkeypatch) == (0, [1])
    assert "results.json is damaged" in capsys.readouterr().out


def test_a_follower_that_starts_again_goes_on_where_it_was(trainer, monkeypatch):
    trainer.save(1, 2)
    script = [lambda: os.kill(os.getpid(), signal.SIGTERM)]
    assert follow(trainer, monkeypatch, *script) == (128 + signal.SIGTERM, [2, 1])
    log = trainer.workdir / following.LOG / "metrics.jsonl"
    before = log.read_text()
    log.write_text(before[:-20])  # killed while it wrote
    trainer.save(3)
    trainer.complete(3)
    assert follow(trainer, monkeypatch) == (0, [3])
    assert [line["step"] for line in log_of(trainer)] == [2, 1, 3]
    assert log.read_text().splitlines()[0] == before.splitlines()[0]


def test_a_signal_ends_an_evaluation_between_two_batches(trainer, monkeypatch, capsys):
    trainer.save(1)

    def evaluate(scorer):
        with StopRequest() as stop:
            watch = Watch(trainer.workdir, index=0, count=1, stall_seconds=0.0)
            for batch in watch.over(lambda: check_together(stop, "stopped"))([{}, {"no": 0}]):
                assert batch == {}
                os.kill(os.getpid(), signal.SIGINT)

    assert follow(trainer, monkeypatch, evaluate=evaluate) == (128 + signal.SIGINT, [1])
    assert not (trainer.workdir / "evaluation").exists()
    assert "SIGINT: stopped" in capsys.readouterr().out


def test_a_follower_is_patient_while_a_training_runs_and_no_longer(trainer, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: now[0])
    trainer.save(1)
    training = lock_workdir(trainer.workdir)

    def pass_time(seconds):
        now[0] += seconds

    status = follow(
        trainer,
        monkeypatch,
        training.__enter__,
        lambda: pass_time(70),
        lambda: training.__exit__(None, None, None),
        lambda: pass_time(50),
        lambda: pass_time(20),
        patience=60.0,
    )
    assert status == (1, [1])
    out = capsys.readouterr().out
    assert "gave up: for 60 seconds" in out and "--config.eval.follow_patience=0" in out


def test_a_second_follower_is_refused(trainer, monkeypatch):
    trainer.save(1)

    def second():
        with pytest.raises(ValueError, match="another evaluator follows --workdir="):
            follow(trainer, monkeypatch)
        os.kill(os.getpid(), signal.SIGTERM)

    assert follow(trainer, monkeypatch, second) == (143, [1])


def test_the_config_of_a_training_is_waited_for(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run/config.json"
    words = ["main", "--job", "evaluate", "--workdir", str(path.parent)]
    assert main.await_training(words) == 0, "only a follower waits"
    words.append("--config.eval.follow=true")

    def nap(seconds, stop):
        path.parent.mkdir()
        path.write_text("{}")

    monkeypatch.setattr(following, "nap", nap)
    assert main.await_training(words) == 0
    assert capsys.readouterr().out.count(f"waiting for {path}") == 1
    path.unlink()
    monkeypatch.setattr(
        following, "nap", lambda seconds, stop: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert main.await_training(words) == 143
    assert main.await_training([*words, "--config.run.unfinished_exit_code=75"]) == 75
    monkeypatch.setattr(following, "nap", lambda seconds, stop: None)
    assert main.main([*words, "--config.eval.follow_patience=1e-9"]) == 1
    assert "gave up" in capsys.readouterr().out


def test_a_follower_that_was_asked_to_stop_ends_as_the_config_says(
    photos, tmp_path, monkeypatch, capsys
):
    config = make_tiny_config(photos)
    config.eval.follow = True
    config.run.unfinished_exit_code = 75
    config.run.parameter_shards = 3  # of the training, which may have had other devices
    monkeypatch.setattr(following, "nap", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert jobs.evaluate_job(config, tmp_path) == 75
    assert "SIGTERM: stopped; what was evaluated stays; run the same" in capsys.readouterr().out
    assert not list((tmp_path / following.LOG / ".processes").iterdir())
    config.run.unfinished_exit_code = 0
    assert jobs.evaluate_job(config, tmp_path) == 128 + signal.SIGTERM


def test_a_trained_workdir_is_followed_to_its_end(trained, photos, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "evaluation")
    Trainer(workdir).complete(4)
    config = make_tiny_config(photos)
    config.eval.follow = True
    config.run.tensorboard = True
    compiled_scoring, programs = scoring.compiled_scoring, []
    monkeypatch.setattr(
        scoring,
        "compiled_scoring",
        lambda options: programs.append(compiled_scoring(options)) or programs[-1],
    )
    before = compiled_scoring(scoring.convolutions_on_all_cores())._cache_size()
    assert jobs.evaluate_job(config, workdir) == 0
    assert len(programs) > 1 and len(set(map(id, programs))) == 1
    assert programs[0]._cache_size() <= before + 1
    for step in (2, 4):
        ours, theirs = (
            json.loads((folder / f"evaluation/{step}/results.json").read_text())
            for folder in (workdir, trained)
        )
        assert ours["classes"] == theirs["classes"]
    lines = (workdir / following.LOG / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 2]
    assert list(Path(workdir, following.LOG).glob("events*"))


def test_a_skipped_step_that_the_training_saves_again_is_evaluated(trainer, monkeypatch, capsys):
    trainer.save(1, 2, 3)
    trainer.damage(3)
    shutil.rmtree(trainer.workdir / "checkpoints/2")

    def save_again():
        shutil.rmtree(trainer.workdir / "checkpoints/3")
        trainer.save(3)

    def complete():
        trainer.save(4)
        trainer.complete(4)

    assert follow(trainer, monkeypatch, nothing, nothing, save_again, complete) == (0, [1, 3, 4])
    assert capsys.readouterr().out.count("step 3 is skipped") == 1


def test_a_step_that_was_deleted_unread_and_comes_back_is_evaluated(trainer, monkeypatch, capsys):
    trainer.save(1, 2)

    def evaluate(scorer):
        trainer.evaluate(scorer.step)
        if scorer.step == 2:
            shutil.rmtree(trainer.workdir / "checkpoints/1")

    def again():
        trainer.save(3)
        shutil.copytree(trainer.workdir / "checkpoints/3", trainer.workdir / "checkpoints/1")
        trainer.complete(3)

    assert follow(trainer, monkeypatch, again, evaluate=evaluate) == (0, [2, 3, 1])
    assert "step 1 is skipped: its checkpoint was deleted" in capsys.readouterr().out


def test_only_checkpoints_with_their_final_names_are_found(trainer):
    folder = trainer.workdir / "checkpoints"
    assert following.committed_steps(folder) == {}
    trainer.save(1, 20)
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    (folder / "4").write_text("no folder")
    assert sorted(following.committed_steps(folder)) == [1, 20]


def test_a_signal_to_another_process_stops_the_first(trainer, monkeypatch):
    def received_elsewhere(stop, saved):
        raise Stopped(signal.SIGUSR1, saved)

    trainer.save(1)
    monkeypatch.setattr(following, "check_together", received_elsewhere)
    assert follow(trainer, monkeypatch) == (128 + signal.SIGUSR1, [])


def test_processes_that_see_no_disk_follow_the_first(trainer, monkeypatch):
    told = [1, True, True, following._END]  # the step, that there is one, no pause, the end
    monkeypatch.setattr(mesh, "is_first", lambda: False)
    monkeypatch.setattr(mesh, "from_first", lambda number: told.pop(0))
    opened = []

    def load(step):
        opened.append(step)
        return Scorer(
            None, {}, {}, MapSettings(64, 4.0, "add", "cosine", 1), mesh.make_mesh(1), step, {}
        )

    watch = Watch(trainer.workdir, index=0, count=1, stall_seconds=0.0)
    with StopRequest() as stop:
        follower = following._Follower(trainer.workdir, CONVENTIONS, 0.0, stop, watch, None)
        status = follower.run(
            lambda: following.Evaluator(load, lambda scorer: opened.append("evaluated")), 1.0
        )
    assert (status, opened, told) == (0, [1, "evaluated"], [])


def test_a_pause_is_progress(trainer, monkeypatch):
    watch = Watch(trainer.workdir, index=0, count=1, stall_seconds=8.0)
    naps = []
    monkeypatch.setattr(
        following, "nap", lambda seconds, stop: naps.append((seconds, watch._moves))
    )
    with StopRequest() as stop:
        following._Follower(trainer.workdir, CONVENTIONS, 0.0, stop, watch, None)._pause(2.5)
    assert naps == [(1.0, 1), (1.0, 2), (0.5, 3)]
