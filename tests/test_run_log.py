"""The log of a run: each step once, also after a resume, and speeds that are right."""

import json
import math
import time

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

from ccl_jax.run_log import RunLog


class Clock:
    """Seconds since 1970, and since then only what a test lets pass."""

    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def open_log(folder, start=0, *, tensorboard=False, progress=False, **clocks):
    return RunLog(
        folder,
        total_steps=10,
        start_step=start,
        images_per_step=4,
        tensorboard=tensorboard,
        progress=progress,
        **clocks,
    )


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_line_has_step_time_and_scalars(tmp_path):
    with open_log(tmp_path) as log:
        log.write(2, {"loss": 0.5, "cosine": 0.25})
        assert len(lines_of(tmp_path)) == 1, "a line must be on disk before the run ends"
        log.write(4, {"loss": 0.4})
    first, second = lines_of(tmp_path)
    assert first["loss"] == 0.5 and first["cosine"] == 0.25 and first["step"] == 2
    assert second["step"] == 4 and second["time"] >= first["time"] > 1.7e9


def test_resumed_run_has_each_step_once(tmp_path):
    with open_log(tmp_path) as log:
        for step in (2, 4, 6, 8):
            log.write(step, {"loss": float(step)})
    with open_log(tmp_path, start=4) as log:  # killed at 8, last checkpoint at 4
        log.write(6, {"loss": 0.0})
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(2, 2), (4, 4), (6, 0)]


def test_line_cut_off_by_a_kill_is_taken_out(tmp_path):
    with open_log(tmp_path) as log:
        log.write(2, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with open_log(tmp_path, start=3) as log:
        log.write(4, {"loss": 2.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]


def test_run_that_starts_over_forgets_the_lines_of_the_one_without_checkpoint(tmp_path):
    with open_log(tmp_path) as log:
        log.write(2, {"loss": 1.0})
    with open_log(tmp_path, start=0):
        pass
    assert lines_of(tmp_path) == []


def test_not_finite_becomes_null(tmp_path):
    with open_log(tmp_path) as log:
        log.write(1, {"loss": math.nan, "norm": math.inf, "cosine": 1.0})
    (line,) = lines_of(tmp_path)
    assert line["loss"] is None and line["norm"] is None and line["cosine"] == 1.0


def read_events(folder):
    """(step, tag, value) of every scalar, and the steps of session starts, in order of files."""
    scalars, starts = [], []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # length, its checksum, record, its checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                starts.append(event.step)
    return scalars, starts


def test_tensorboard_gets_every_scalar_and_hides_what_a_killed_run_left(tmp_path):
    with open_log(tmp_path, tensorboard=True) as log:
        log.write(2, {"loss": 0.5, "cosine": 0.25})
    assert read_events(tmp_path)[0] == [(2, "loss", 0.5), (2, "cosine", 0.25)]
    with open_log(tmp_path, start=1, tensorboard=True):
        pass
    assert read_events(tmp_path)[1][-1] == 2, "steps from 2 on are purged"


def test_progress_bar_shows_losses_speed_and_time_left(tmp_path, capsys):
    with open_log(tmp_path, start=2, progress=True) as log:
        for step in (3, 4, 5):
            log.advance(step)
        log.write(5, {"loss": 0.51234, "cosine": 0.25})
    shown = capsys.readouterr().err
    assert "5/10" in shown
    assert "loss 0.5123, cosine 0.25" in shown
    assert "images/s" in shown
    assert "<" in shown, "elapsed < left"


def test_the_bar_says_that_the_step_is_compiled_and_leaves_that_out_of_its_rate(tmp_path, capsys):
    with open_log(tmp_path, progress=True) as log:
        log.compiling()
        assert "compiling the training step" in capsys.readouterr().err
        begun = log._bar.start_t
        time.sleep(0.05)
        log.compiled(0.05, 1e9)
        assert log._bar.start_t >= begun + 0.05
        assert "compiling" not in str(log._bar)


def test_without_progress_nothing_is_shown(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.advance(1)
        log.write(1, {"loss": 1.0})
    assert capsys.readouterr().err == ""


def test_speed_is_logged_after_training_steps_only(tmp_path):
    with open_log(tmp_path) as log:
        log.waited(0.001)
        for step in (1, 2, 3):
            log.advance(step)
        log.write(3, {"loss": 1.0})
        log.write(3, {"image_auroc": 0.9})
    training, evaluation = lines_of(tmp_path)
    assert training["images_per_second"] > 0 and 0 <= training["input_wait"] <= 1
    assert "images_per_second" not in evaluation


def trained_to(folder, clock, steps, start=0, seconds=0.02):
    """The lines after a start that computes up to the last of `steps`, each in its own line."""
    with open_log(folder, start=start, clock=clock, wall_clock=clock) as log:
        clock.passes(2.0)
        log.compiled(2.0, 1e9)
        for step in steps:
            clock.passes(seconds)
            log.advance(step)
            log.write(step, {"loss": 1.0})
        return lines_of(folder), log.summary()


def test_useful_time_of_steps_that_a_kill_undid_counts_once_and_goodput_goes_on(tmp_path):
    clock = Clock()
    first, _ = trained_to(tmp_path, clock, [1, 2, 3, 4])
    assert [line["step_seconds"] for line in first] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert [line.get("compile_seconds") for line in first] == [2.0, None, None, None]
    assert first[3]["goodput"] == pytest.approx(0.08 / 2.08)
    clock.passes(0.3)  # a standstill between two starts
    second, summary = trained_to(tmp_path, clock, [3, 4], start=2, seconds=0.01)
    assert [line["step"] for line in second] == [1, 2, 3, 4]
    assert [line["step_seconds"] for line in second[2:]] == pytest.approx([0.05, 0.06])
    assert summary["step_seconds"] == second[3]["step_seconds"]
    assert summary["seconds"] == pytest.approx(2.08 + 0.3 + 2.02)
    assert summary["goodput"] == second[3]["goodput"] == pytest.approx(0.06 / 4.4)
    assert json.loads((tmp_path / "goodput.json").read_text())["starts"] == 2


def test_a_step_that_takes_ten_times_the_median_is_noted(tmp_path, capsys):
    clock = Clock()
    with open_log(tmp_path, clock=clock) as log:
        log.compiled(1.0, 1e9)
        for step in range(1, 25):
            clock.passes(0.01)
            log.advance(step)
        with log.saving():
            clock.passes(0.3)
        log.advance(25)
    (note,) = lines_of(tmp_path)
    assert note["step"] == 25
    assert note["note"].startswith("step 25 took 0.3 s, 30 times the median of 0.01 s: ")
    assert "0.3 s saving" in note["note"] and "0 s waiting for input" in note["note"]
    assert note["note"] in capsys.readouterr().err


def test_other_processes_write_and_show_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_log(tmp_path / "log", tensorboard=True, progress=True) as log:
        log.advance(1)
        log.write(1, {"loss": 1.0})
    assert not (tmp_path / "log").exists()
    assert capsys.readouterr().err == ""


def test_a_note_is_shown_and_logged_at_once_by_its_step(tmp_path, capsys):
    with open_log(tmp_path, progress=True) as log:
        log.advance(3)
        log.note("a.png cannot be read")
        assert [(line["step"], line["note"]) for line in lines_of(tmp_path)] == [
            (3, "a.png cannot be read")
        ]
    assert "a.png cannot be read\n" in capsys.readouterr().err


def test_notes_of_other_processes_are_shown_and_not_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_log(tmp_path / "log") as log:
        log.note("b.png cannot be read")
    assert not (tmp_path / "log").exists()
    assert capsys.readouterr().err == "b.png cannot be read\n"
