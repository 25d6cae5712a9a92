"""How fast a run is, where its time goes, and how much of the devices and of the time it uses."""

import contextlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ccl_jax.atomic import write_atomically

# Dense peaks of one device in TFLOP/s, by the beginning of `jax.Device.device_kind`, longest first:
# (bfloat16, float32). What JAX computes in float32 runs by default as TF32 on these GPUs and as one
# pass in bfloat16 on TPUs. Sources: NVIDIA's data sheets (A100, H100, H200, L4: the figures "with
# sparsity" halved) and the pages "TPU v4", "v5e", "v5p", "v6e" of Google Cloud's documentation.
PEAK_TFLOPS = {
    "NVIDIA A100": (312.0, 156.0),
    "NVIDIA H100 PCIe": (756.0, 378.0),
    "NVIDIA H100 NVL": (835.0, 418.0),
    "NVIDIA H100": (989.0, 494.0),
    "NVIDIA H200": (989.0, 494.0),
    "NVIDIA L40S": (362.0, 183.0),
    "NVIDIA L4": (121.0, 60.0),
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),
    "TPU v5e": (197.0, 197.0),
    "TPU v5p": (459.0, 459.0),
    "TPU v5": (459.0, 459.0),
    "TPU v6 lite": (918.0, 918.0),
    "TPU v6e": (918.0, 918.0),
}
SLOW = 10.0  # a step of so many times the median is reported
REMEMBERED = 100  # steps that the median is taken of
ENOUGH = 20  # steps, before which there is none


def peak_flops(kind: str, compute_dtype: str) -> float | None:
    """FLOP/s that a device of this kind can do at most; None where that is not known (as of CPUs).

    `compute_dtype` is "bfloat16" or "float32".
    """
    for beginning in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if kind == beginning or kind.startswith((f"{beginning} ", f"{beginning}-")):
            bfloat16, float32 = PEAK_TFLOPS[beginning]
            return 1e12 * (bfloat16 if compute_dtype == "bfloat16" else float32)
    return None


def count_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products and convolutions of a traced program, over all its devices.

    A multiplication and an addition count as two, also with what pads an image; what else is
    computed is little and not counted, as is usual for a model's FLOP utilisation. Of a branch the
    costliest side counts, of a loop of unknown length one round. Counted here and not taken from
    the compiled program's `cost_analysis()`, which is per device and takes every loop for one
    round: 4.26 instead of 4.51 TFLOP for the published step.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            depth = math.prod(kernel) / kernel[parameters["dimension_numbers"].rhs_spec[0]]
            products = 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            total += products / math.prod(parameters["lhs_dilation"])  # the rest is inserted zeros
        else:
            inner = [count_flops(each) for each in _inner_programs(parameters)]
            if name == "cond":
                total += max(inner, default=0.0)
            elif name == "shard_map":  # written for one device
                total += sum(inner) * math.prod(parameters["mesh"].shape.values())
            else:
                total += sum(inner) * parameters.get("length", 1)
    return total


def _inner_programs(parameters: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in parameters.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(each, "jaxpr", each), "eqns"):
                yield each


class SlowStep(NamedTuple):
    """A step that took far longer than most, in seconds, and where its time went."""

    seconds: float
    median: float  # of the steps before
    waiting: float  # for input
    saving: float

    @property
    def computing(self) -> float:
        """What is neither waiting nor saving."""
        return max(self.seconds - self.waiting - self.saving, 0.0)

    def __str__(self) -> str:
        return (
            f"took {self.seconds:.3g} s, {self.seconds / max(self.median, 1e-9):.0f} times the "
            f"median of {self.median:.3g} s: {self.waiting:.3g} s waiting for input, "
            f"{self.saving:.3g} s saving, {self.computing:.3g} s computing"
        )


class Throughput:
    """Speed, and the shares of the time that go into waiting for input and into saving.

    Counts from `begin`, once the step is compiled; without it from the end of the first step, so
    that compilation does not enter. A step is timed from one call of `step` to the next: that holds
    the wait for its input and, as the loop runs a step ahead, the computing of the step before.
    """

    def __init__(
        self,
        images_per_step: int,
        clock: Callable[[], float] = time.perf_counter,
        *,
        devices: int = 1,
        peak: float | None = None,
    ) -> None:
        """Over `devices`, of which each can do `peak` FLOP/s at most."""
        self._images_per_step = images_per_step
        self._devices = devices
        self._peak = peak
        self._flops: float | None = None
        self._clock = clock
        self._start: float | None = None
        self._last: float | None = None  # end of the last step
        self._steps = 0
        self._spent = {"waiting": 0.0, "saving": 0.0, "pausing": 0.0}  # since the last figures
        self._spent_here = dict.fromkeys(self._spent, 0.0)  # since the last step
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self.step_seconds = 0.0  # of all steps whose figures were asked for

    def begin(self, flops: float | None = None) -> None:
        """Starts counting; a step takes `flops` over all devices."""
        self._flops = flops
        self._restart()
        self._last = self._start

    def step(self) -> SlowStep | None:
        """Counts a step, and returns it if it was far slower than most."""
        now, here = self._clock(), self._spent_here
        self._spent_here = dict.fromkeys(here, 0.0)
        if self._start is None:
            self._restart()
        else:
            self._steps += 1
        before, self._last = self._last, now
        if before is None:
            return None
        seconds = now - before - here["pausing"]
        median = statistics.median(self._durations) if len(self._durations) >= ENOUGH else math.inf
        self._durations.append(seconds)
        if seconds < SLOW * median:
            return None
        return SlowStep(seconds, median, here["waiting"], here["saving"])

    def waited(self, seconds: float) -> None:
        """Adds to the time spent waiting for input."""
        self._add("waiting", seconds)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the time of the block as one in which a checkpoint held the steps up."""
        before = self._clock()
        try:
            yield
        finally:
            self._add("saving", self._clock() - before)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out: an evaluation is no training."""
        before = self._clock()
        try:
            yield
        finally:
            self._add("pausing", self._clock() - before)

    def figures(self) -> dict[str, float]:
        """The figures since the last call, which then start anew; {} where no step was counted.

        `images_per_second` over all devices and `images_per_second_per_device`; `input_wait` and
        `checkpoint_stall`, the shares in [0, 1] of the time in which the loop waited for input and
        for a save; `mfu` where FLOPs and peak are known. Evaluations are left out. Right after the
        losses were fetched they are exact, for until then steps may still be computing.
        """
        if self._start is None or self._steps == 0:
            return {}
        seconds = max(self._clock() - self._start - self._spent["pausing"], 1e-9)
        speed = self._steps * self._images_per_step / seconds
        figures = {
            "images_per_second": speed,
            "images_per_second_per_device": speed / self._devices,
            "input_wait": min(self._spent["waiting"] / seconds, 1.0),
            "checkpoint_stall": min(self._spent["saving"] / seconds, 1.0),
        }
        if self._flops and self._peak:
            done = self._flops * self._steps / self._devices
            figures["mfu"] = done / seconds / self._peak
        lost = self._spent["waiting"] + self._spent["saving"]
        self.step_seconds += max(seconds - lost, 0.0)
        self._restart()
        return figures

    def _add(self, what: str, seconds: float) -> None:
        self._spent[what] += seconds
        self._spent_here[what] += seconds

    def _restart(self) -> None:
        self._start = self._clock()
        self._steps = 0
        self._spent = dict.fromkeys(self._spent, 0.0)


class Goodput:
    """The useful share of the time since the very first start of a folder, restarts included.

    Useful is the time that the steps took which the state now consists of: steps that a kill undid,
    and that were computed again, count once; compiling, waiting for input, saving, evaluating,
    starting up and standing still between two starts do not count. All of that, from the first
    start on, is in the time that it is divided by. The file keeps when that was.
    """

    def __init__(self, file: Path, before: float, clock: Callable[[], float] = time.time) -> None:
        """`before` is the useful time of earlier starts in seconds."""
        self._before, self._clock = before, clock
        known = json.loads(file.read_text()) if file.exists() else {"first_start": clock()}
        self._first = known["first_start"]
        known["starts"] = known.get("starts", 0) + 1
        write_atomically(file, json.dumps(known) + "\n")

    @property
    def elapsed(self) -> float:
        """Seconds since the first start."""
        return max(self._clock() - self._first, 1e-9)

    def figures(self, step_seconds: float) -> dict[str, float]:
        """`step_seconds`, useful seconds so far over all starts, and `goodput`, in [0, 1].

        Given the useful seconds since this start.
        """
        useful = self._before + step_seconds
        return {"step_seconds": useful, "goodput": min(useful / self.elapsed, 1.0)}


def device_peak(where: jax.sharding.Mesh, compute_dtype: str, tflops: float) -> float | None:
    """FLOP/s of one device of the mesh at most: `tflops`, or for 0 by the kind of device."""
    if tflops:
        return 1e12 * tflops
    return peak_flops(where.devices.flat[0].device_kind, compute_dtype)
