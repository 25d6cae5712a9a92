"""Prints how far the PyTorch twin is from the record, and this package from the twin, in float64.

`python -m tests.reference.measure_twin` takes about three minutes on two cores.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import jax
import numpy as np

from tests.reference import compare_twin, compare_twin_steps, goldens, twin_record
from tests.reference.twin_step import one_thread

Measurement = tuple[str, compare_twin.Differences]


def twin_and_record() -> Iterator[Measurement]:
    """The twin against each golden that concerns it."""
    kinds = {
        ("teacher_resnet*", "teacher_wide_resnet*"): twin_record.encoder_differences,
        ("rd_*",): twin_record.network_differences,
        ("loss_*",): twin_record.loss_differences,
        ("trajectory_rd_*",): twin_record.trajectory_differences,
    }
    for patterns, differences in kinds.items():
        for name in goldens.names(*patterns):
            yield f"twin and record: {name}", differences(name)


def ours_and_twin() -> Iterator[Measurement]:
    """This package against the twin."""
    for temperature, (case, labels) in itertools.product((0.05, 0.5), compare_twin.LABELS.items()):
        at = f"temperature {temperature}, {case}"
        yield f"ours and twin: local, {at}", compare_twin.local_differences(labels, temperature)
        for form in ("two_view", "second_release"):
            found = compare_twin.global_differences(form, labels, temperature)
            yield f"ours and twin: global {form}, {at}", found
    for flat in (True, False):
        yield f"ours and twin: cosine, flat={flat}", compare_twin.cosine_differences(flat=flat)
    for (encoder, projector), training in itertools.product(compare_twin.ENCODERS, (False, True)):
        found = compare_twin.forward_differences(encoder, projector, training=training)
        mode = "training" if training else "evaluation"
        yield f"ours and twin: forward in {mode}, {encoder}, projector {projector}", found
    for name, recipe in compare_twin_steps.RECIPES.items():
        scalars, tensors = compare_twin_steps.training_differences(recipe)
        yield f"ours and twin: {recipe.steps} steps, {name}, scalars", scalars
        yield f"ours and twin: {recipe.steps} steps, {name}, tensors (absolute)", tensors


def main() -> None:
    """Prints the largest difference of each comparison."""
    with jax.enable_x64(True), one_thread():
        start = time.perf_counter()
        for what, found in itertools.chain(twin_and_record(), ours_and_twin()):
            key = max(found, key=lambda k: np.nan_to_num(found[k], nan=np.inf))
            print(f"{found[key]:8.1e}  {what}: {key} (of {len(found)})", flush=True)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
