"""A training that is killed again and again ends as if nobody had disturbed it."""

import subprocess
import sys

import numpy as np
import pytest

from tests import campaign

# Leaves the files of a training behind, in its order, without one: its state is a chain of hashes.
PRETENDED = """
import json, os, sys, time
from pathlib import Path
from tests.campaign import EVALUATE_EVERY, SAVE_EVERY, STEPS, TMP

folder, forgets = Path(sys.argv[1]), sys.argv[2] == "forgets"
data, workdir = folder / "data", folder / "run"
if not data.exists():
    (folder / ".data.partial").mkdir(exist_ok=True)
    time.sleep(0.1)
    (folder / ".data.partial").rename(data)
(workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
(workdir / "log").mkdir(exist_ok=True)
for remains in (workdir / "checkpoints").glob(f"*{TMP}"):
    (remains / "state").unlink(missing_ok=True)
    remains.rmdir()
done = max((int(path.name) for path in (workdir / "checkpoints").iterdir()), default=0)
state = int((workdir / f"checkpoints/{done}/state").read_text()) if done and not forgets else 0
goes_on = f", continuing at step {done}" if done else ""
print(f"40 images, {STEPS} steps of 4{goes_on}", flush=True)
log = workdir / "log/metrics.jsonl"
if log.exists():
    rows = [row for row in log.read_text().splitlines() if json.loads(row)["step"] <= done]
    log.with_suffix(".partial").write_text("".join(row + "\\n" for row in rows))
    log.with_suffix(".partial").rename(log)


def evaluate(step):
    time.sleep(0.05)
    results = workdir / f"evaluation/{step}/results.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".partial").write_text(json.dumps({"classes": {"a": state}}))
    results.with_suffix(".partial").rename(results)


if done and done % EVALUATE_EVERY == 0 and done < STEPS:
    if not (workdir / f"evaluation/{done}/results.json").exists():
        evaluate(done)
with log.open("a") as lines:
    for step in range(done + 1, STEPS + 1):
        time.sleep(0.02)
        state = hash((state, step))
        lines.write(json.dumps({"step": step}) + "\\n")
        lines.flush()
        evaluates = step % EVALUATE_EVERY == 0 and step < STEPS
        if evaluates or step % SAVE_EVERY == 0:
            partial = workdir / f"checkpoints/{step}{TMP}"
            partial.mkdir()
            (partial / "state").write_text(str(state))
            time.sleep(0.05)
            partial.rename(workdir / f"checkpoints/{step}")
        if evaluates:
            evaluate(step)
evaluate(STEPS)
"""


class Pretended(campaign.Run):
    """Starts the program above in the place of a training."""

    forgets = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", PRETENDED, str(self.folder), self.forgets or "-"]


@pytest.fixture
def pretended(monkeypatch):
    def last_state(workdir):
        text = (workdir / f"checkpoints/{campaign.STEPS}/state").read_text()
        return {"state": np.int64(int(text))}

    monkeypatch.setattr(campaign, "Run", Pretended)
    monkeypatch.setattr(campaign, "last_state", last_state)
    monkeypatch.setattr(Pretended, "forgets", "")


def test_kills_fall_in_every_phase_and_are_counted(pretended, tmp_path, capsys):
    assert campaign.campaign(tmp_path, kills=18, per_round=6, seed=0) == 0
    said = capsys.readouterr().out
    assert "18 kills in " in said
    rows = dict(
        (cells[1].strip(), int(cells[4]))
        for line in said.splitlines()
        if line.startswith("|") and (cells := line.split("|"))[4].strip().isdigit()
    )
    assert rows.pop("all") == sum(rows.values()) == 18
    assert min(rows[phase] for phase in ("data preparation", "step", "save", "evaluation")) > 0


def test_training_that_forgets_its_state_is_found(pretended, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Pretended, "forgets", "forgets")
    assert campaign.campaign(tmp_path, kills=4, per_round=4, seed=0) == 1
    assert "round 1: evaluation/" in capsys.readouterr().out


def test_start_that_does_not_go_on_from_the_newest_checkpoint_is_found(tmp_path):
    run = campaign.Run(tmp_path, tmp_path)
    run.output.write_text("demo: 40 images, 24 steps of 4 images, continuing at step 6\n")
    campaign.check_resumed(run, 6)
    for saved in (9, None):
        with pytest.raises(RuntimeError, match="continuing at step 6"):
            campaign.check_resumed(run, saved)


def test_process_that_does_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(campaign, "PATIENCE", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(RuntimeError, match="did nothing"):
        campaign.wait_for(process, lambda: False)
    assert process.wait(10) != 0


@pytest.mark.slow
def test_five_kills_change_no_bit_of_the_last_state(tmp_path, capsys):
    assert campaign.campaign(tmp_path / "campaign", kills=5, per_round=5, seed=1) == 0
    said = capsys.readouterr().out
    assert said.count("equal, bit for bit") >= 1
    assert "\n5 kills in " in said
