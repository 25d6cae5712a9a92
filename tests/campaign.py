"""Kills a training again and again, resumes it, and compares with one that nobody disturbed.

    python -m tests.campaign --kills 30 --workdir /tmp/campaign

A small training on generated data runs once undisturbed. Then rounds follow, each from an empty
folder: the same command is started, and killed at a random moment that a seed draws, until the
round's kills are used up; the last start runs to the end. Its state (parameters, optimizer,
statistics, step) and its results must equal the undisturbed ones bit for bit, and every start must
go on from the newest checkpoint that was complete when the one before it was killed. Prints a
table of where the kills fell; status 1 where anything differs.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
STEPS, SAVE_EVERY, EVALUATE_EVERY = 24, 3, 8
TMP = ".orbax-checkpoint-tmp"
PHASES = ("data preparation", "start-up", "step", "save", "evaluation")
# What a kill is aimed at; where it falls is read from the files afterwards.
AIMS = ("data preparation", "step", "save", "evaluation", "save", "anywhere")
SETTINGS = {
    "data.image_size": 64,
    "synthetic.image_size": 64,
    "synthetic.train_per_class": 4,
    "synthetic.test_normal_per_class": 2,
    "synthetic.test_per_defect": 1,
    "model.projector": "depthwise",
    "train.batch_size": 4,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.checkpoint_every": SAVE_EVERY,
    "eval.every_steps": EVALUATE_EVERY,
    "eval.batch_size": 8,
    "eval.figures_per_class": 0,
    "run.devices": 1,
    "run.tensorboard": False,
    "run.progress": False,
}
# Compiled once. Without the tests' XLA_FLAGS: so compiled, a step takes seconds.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "",
}
PATIENCE = 1800  # seconds for one start, on a machine that others use too


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill: where it was aimed, where it fell, and what the files said then."""

    round: int
    signal: str
    aim: str
    phase: str
    step: int  # the last in the log
    saved: int | None  # the newest complete checkpoint


class Run:
    """The command in one folder, and what its files say while it runs."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.data, self.workdir = folder / "data", folder / "run"
        self.folder = folder
        self._cache = cache
        self._starts = 0
        self._before = b""  # of the log, when this start began

    def start(self) -> subprocess.Popen:
        """Starts the command; its output goes to start-<n>.log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._starts += 1
        self._before = self._log_bytes()
        with self.output.open("w") as output:
            return subprocess.Popen(
                self.command(),
                env=os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(self._cache)},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def command(self) -> list[str]:
        """What is started."""
        overrides = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
        places = ["--config=configs/demo.py", f"--workdir={self.workdir}"]
        places += [f"--config.data.root={self.data}"]
        return [sys.executable, "-m", "ccl_jax.main", *places, *overrides]

    @property
    def output(self) -> Path:
        return self.folder / f"start-{self._starts}.log"

    def _log_bytes(self) -> bytes:
        path = self.workdir / "log/metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def step(self) -> int:
        """The last step in the log, of this start or one before."""
        lines = self._log_bytes().split(b"\n")[:-1]  # without one that is being written
        return json.loads(lines[-1])["step"] if lines else 0

    def has_data(self) -> bool:
        return self.data.exists()

    def prepares_data(self) -> bool:
        return (self.folder / ".data.partial").exists() and not self.has_data()

    def has_stepped(self) -> bool:
        """Whether this start has logged a step."""
        text = self.output.read_text()
        if self._log_bytes() == self._before or " steps of " not in text:
            return False
        begin = re.search(r"continuing at step (\d+)", text)
        return self.step() > (int(begin[1]) if begin else 0)

    def saves(self) -> bool:
        return any((self.workdir / "checkpoints").glob(f"*{TMP}"))

    def saved(self) -> int | None:
        """The newest complete checkpoint."""
        names = [path.name for path in (self.workdir / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=None)

    def evaluates(self) -> bool:
        """Whether an evaluation is due: its step is saved, and its results are not there."""
        step = self.step()
        due = step == STEPS or (step > 0 and step % EVALUATE_EVERY == 0)
        there = self.workdir / "evaluation" / str(step) / "results.json"
        return due and self.saved() == step and not self.saves() and not there.exists()

    def phase(self) -> str:
        """What the run is doing, one of PHASES."""
        if not self.has_data():
            return PHASES[0]
        if self.saves():
            return "save"
        if self.evaluates():
            return "evaluation"
        return "step" if self.has_stepped() else "start-up"


def wait_for(process: subprocess.Popen, reached: Callable[[], bool]) -> bool:
    """Waits until `reached`; False where the process ended first. RuntimeError after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None:
        if reached():
            return True
        if time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"{process.args} did nothing for {PATIENCE} seconds")
        time.sleep(0.01)
    return False


def reach(
    run: Run, process: subprocess.Popen, aim: str, seconds: float, draw: random.Random
) -> bool:
    """Waits for a random moment of what the kill is aimed at; False where the run ended first.

    `seconds` is what the undisturbed run took from its first step to its end.
    """
    if aim == "data preparation":
        delay = draw.uniform(0, 0.02 * seconds)
        arrived = wait_for(process, lambda: run.prepares_data() or run.has_data())
    elif aim == "step":
        goal = run.step() + draw.randint(1, 5)
        delay = draw.uniform(0, 0.02 * seconds)
        arrived = wait_for(process, lambda: run.has_stepped() and run.step() >= goal)
    elif aim == "save":
        goal = run.step() + draw.randint(1, 5)
        delay = draw.uniform(0, 0.2)
        arrived = wait_for(process, lambda: run.step() >= goal and run.saves())
    elif aim == "evaluation":
        delay = draw.uniform(0, 0.04 * seconds)
        arrived = wait_for(process, lambda: run.has_stepped() and run.evaluates())
    else:
        delay = draw.uniform(0, 1.5 * seconds)
        arrived = True
    end = time.monotonic() + delay
    return arrived and wait_for(process, lambda: time.monotonic() >= end)


def kill(
    run: Run, process: subprocess.Popen, aim: str, number: int, draw: random.Random
) -> Kill | None:
    """Kills the process, and says where that was; None where it came to its end before.

    One of six kills is a SIGTERM, after which a run may save.
    """
    name = signal.SIGTERM if draw.random() < 1 / 6 else signal.SIGKILL
    process.send_signal(signal.SIGSTOP)  # so that the files tell where it was
    phase, step, saved = run.phase(), run.step(), run.saved()
    process.send_signal(name)
    process.send_signal(signal.SIGCONT)
    if process.wait(PATIENCE) == 0:
        return None
    return Kill(number, name.name, aim, phase, step, max(saved or 0, run.saved() or 0) or None)


def undisturbed(folder: Path, cache: Path) -> tuple[Run, float]:
    """A run to the end, which also fills the compilation cache, and its seconds from step 1 on."""
    run, begin = Run(folder / "undisturbed", cache), time.monotonic()
    process = run.start()
    wait_for(process, run.has_stepped)
    first = time.monotonic()
    status = process.wait(PATIENCE)
    if status != 0:
        raise RuntimeError(f"{run.output}: the undisturbed run ended with status {status}")
    end = time.monotonic()
    print(f"undisturbed: {end - begin:.0f} s, {end - first:.0f} s from its first step", flush=True)
    return run, end - first


def disturbed(
    run: Run, kills: int, number: int, seconds: float, draw: random.Random
) -> Iterator[Kill]:
    """Starts the command until it comes to its end, and kills it `kills` times before."""
    aims = list(AIMS[1:])
    draw.shuffle(aims)
    aims = [AIMS[0], *aims] * kills
    done, saved = 0, None
    while True:
        process = run.start()
        fell = None
        if done < kills and reach(run, process, aims[done], seconds, draw):
            fell = kill(run, process, aims[done], number, draw)
        status = process.wait(PATIENCE)
        check_resumed(run, saved)
        if fell is None:
            if status != 0:
                raise RuntimeError(f"{run.output}: ended with status {status}")
            return
        done, saved = done + 1, fell.saved
        yield fell


def check_resumed(run: Run, saved: int | None) -> None:
    """RuntimeError where a start went on from anything but the checkpoint that was there."""
    text = run.output.read_text()
    if " steps of " not in text:  # killed before it said where it goes on
        return
    wanted = f"continuing at step {saved}\n" if saved else None
    if (wanted is not None and wanted not in text) or (saved is None and "continuing" in text):
        raise RuntimeError(f"{run.output}: {saved=}, but it says {text!r}")
    if "damaged" in text:
        raise RuntimeError(f"{run.output}: a kill has damaged a checkpoint: {text!r}")


def difference(run: Run, wanted: Run) -> str | None:
    """What differs between the last states and results of two runs; None where nothing does."""
    for step in (*range(EVALUATE_EVERY, STEPS, EVALUATE_EVERY), STEPS):
        one, other = (
            json.loads((r.workdir / f"evaluation/{step}/results.json").read_text())["classes"]
            for r in (run, wanted)
        )
        if one != other:
            return f"evaluation/{step}/results.json"
    one, other = last_state(run.workdir), last_state(wanted.workdir)
    if one.keys() != other.keys():
        return f"leaves {sorted(one.keys() ^ other.keys())}"
    for name in one:
        if one[name].dtype != other[name].dtype or one[name].tobytes() != other[name].tobytes():
            return name
    return None


def last_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every leaf of the newest checkpoint, by name."""
    import jax

    from ccl_jax import config as configs
    from ccl_jax import mesh, settings
    from ccl_jax.checkpoint import Checkpoints
    from ccl_jax.scoring import architecture_of
    from ccl_jax.state import init_state

    config = configs.read_json(workdir / "config.json")
    architecture = architecture_of(config.to_dict())
    optimizer = settings.optimizer_of(config, STEPS)
    sharding = mesh.replicated(mesh.make_mesh(1))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda key: init_state(architecture, optimizer, key), jax.random.key(0)),
    )
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(STEPS, abstract)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def table(kills: list[Kill]) -> str:
    """Kills by the phase they fell in, and by signal, in Markdown."""
    counts = Counter((kill.phase, kill.signal) for kill in kills)
    lines = ["| killed during | SIGKILL | SIGTERM | |", "|---|---:|---:|---:|"]
    for phase in PHASES:
        hard, soft = counts[phase, "SIGKILL"], counts[phase, "SIGTERM"]
        lines.append(f"| {phase} | {hard} | {soft} | {hard + soft} |")
    hard = sum(kill.signal == "SIGKILL" for kill in kills)
    lines.append(f"| all | {hard} | {len(kills) - hard} | {len(kills)} |")
    return "\n".join(lines)


def campaign(folder: Path, kills: int, per_round: int, seed: int) -> int:
    """Runs it, prints what happened, and returns the exit status."""
    draw = random.Random(seed)
    cache = folder / "compiled"
    wanted, seconds = undisturbed(folder, cache)
    fallen: list[Kill] = []
    unequal = rounds = 0
    while len(fallen) < kills:
        rounds += 1
        run = Run(folder / f"round-{rounds}", cache)
        for one in disturbed(run, min(per_round, kills - len(fallen)), rounds, seconds, draw):
            fallen.append(one)
            print(f"kill {len(fallen)}: {one}", flush=True)
        found = difference(run, wanted)
        unequal += found is not None
        print(f"round {rounds}: {found or 'equal, bit for bit'}", flush=True)
    print(f"\n{table(fallen)}\n")
    print(
        f"{len(fallen)} kills in {rounds} rounds; {rounds - unequal} rounds equal the undisturbed"
    )
    return 1 if unequal else 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--per-round", type=int, default=6, help="kills of one training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workdir", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    folder = options.workdir.absolute()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--workdir={folder} is not empty; choose another folder.")
    return campaign(folder, options.kills, options.per_round, options.seed)


if __name__ == "__main__":
    sys.exit(main())
