"""The PyTorch side of speed_torch.py, a process of its own: what is timed, in each form.

"as published" is float32 as it is, eager, channels first; cuDNN tries its algorithms, as the
released code has it. "tuned" is channels last, TF32 allowed, fused Adam, in float32 or under
bfloat16 autocast, whichever is quicker, and that with `torch.compile` or without: the driver takes
the quickest of these variants, and says of one that does not work why.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.reference import twin_losses
from tests.reference.speed_batches import Batch, make_batches, normalised
from tests.reference.speed_protocol import Job, serve
from tests.reference.twin_fast import FastTraining, local_contrastive, score_maps
from tests.reference.twin_model import Twin, from_numpy, randomise, to_numpy


class Variant(NamedTuple):
    """How the twin is run."""

    compiled: bool = False
    bfloat16: bool = False

    @property
    def name(self) -> str:
        """In the words of the table."""
        dtype = "bfloat16" if self.bfloat16 else "float32"
        return f"{dtype}, {'compiled' if self.compiled else 'eager'}"


FORMS = {
    "eager": [Variant()],
    "tuned": [
        Variant(compiled, bfloat16)
        for compiled, bfloat16 in itertools.product((False, True), (False, True))
    ],
}


class Timed:
    """The twin on one device in one form, and everything that is timed of it, by variant."""

    def __init__(self, options: Mapping[str, Any], *, tuned: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.layout = torch.channels_last if tuned else torch.contiguous_format
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if tuned else "highest")
        self.weights = options["weights"]
        self.model = self.placed(Twin(options["encoder"]))
        self.training = FastTraining(self.model, fused=tuned)
        batches = make_batches(options["different"], options["images"], options["image_size"])
        self.batches = [self.on_device(batch) for batch in batches]
        self.restart()

    def restart(self) -> None:
        """The given weights, no optimizer state, the first batch: every variant begins so."""
        with np.load(self.weights) as tensors:
            from_numpy(self.model, tensors)
        for optimizer in self.training.optimizers:
            optimizer.state.clear()
        self.next = itertools.cycle(self.batches)

    def placed(self, thing: Any) -> Any:
        """On the device, in the form's layout."""
        return thing.to(self.device, memory_format=self.layout)

    def on_device(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        views = [
            self.placed(torch.from_numpy(normalised(view).transpose(0, 3, 1, 2).copy()))
            for view in batch[:2]
        ]
        rest = [torch.from_numpy(array).long().to(self.device) for array in batch[2:]]
        return (*views, *rest)

    def as_in(self, variant: Variant, function: Callable) -> Callable:
        """The function under autocast, and compiled, as far as the variant says so."""

        def cast(*arguments: Any) -> Any:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=variant.bfloat16):
                return function(*arguments)

        return torch.compile(cast) if variant.compiled else cast

    def done(self) -> None:
        """Returns once the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def train(self, variant: Variant) -> Job:
        """A job of training steps."""
        losses = self.as_in(variant, self.training.losses)
        self.restart()

        def job(steps: int) -> dict[str, Any]:
            self.model.train()
            rows = [self.training.advance(losses, *next(self.next)) for _ in range(steps)]
            self.done()
            return {"terms": {name: float(term) for name, term in rows[0].items()}}

        return job

    def infer(self, variant: Variant) -> Job:
        """A job of batches scored."""
        score = self.as_in(variant, functools.partial(score_maps, self.model))
        self.restart()

        def job(steps: int) -> dict[str, Any]:
            self.model.eval()
            with torch.inference_mode():
                maps = [score(next(self.next)[0]) for _ in range(steps)]
            self.done()
            return {"terms": {"mean score": float(maps[0].mean())}}

        return job

    def part(self, variant: Variant, name: str) -> Job:
        """A job of one part of a step alone; what needs gradients with its backward pass."""
        self.model.train()
        clean, augmented, _, negatives = self.batches[0]
        with torch.no_grad():
            targets, others = self.model.net_t(clean), self.model.net_t(augmented)
            projected = self.model.proj_layer(targets)
        queries, keys = ([maps.clone().requires_grad_() for maps in projected] for _ in range(2))
        for parameter in self.training.parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)

        def network() -> torch.Tensor:
            code = self.model.mff_oce(self.model.proj_layer(targets))
            other = self.model.mff_oce(self.model.proj_layer(others))
            loss = twin_losses.cosine_distillation(targets, self.model.net_s(code))
            return loss + code.square().mean() + other.square().mean()

        def local() -> torch.Tensor:
            return local_contrastive(
                targets, others, queries, keys, negatives, temperature=self.training.temperature
            )

        def encode() -> list:
            return [self.model.net_t(images) for images in (clean, augmented)]

        def search() -> list:
            pairs = zip(targets, others, strict=True)
            return [twin_losses.matches(*pair) for pair in pairs]

        functions = {
            "encoder": encode,
            "projector, neck, decoder": network,
            "local loss": local,
            "best-match search": search,
        }
        work = self.training.update if name == "optimizer" else self.as_in(variant, functions[name])

        def job(steps: int) -> dict[str, Any]:
            self.model.train()  # scoring has come between
            with torch.set_grad_enabled(name not in ("encoder", "best-match search")):
                for _ in range(steps):
                    result = work()
                    if isinstance(result, torch.Tensor):
                        result.backward()
            self.done()
            return {}

        return job


class Jobs(dict[str, Job]):
    """Jobs named "variant: task", each made when it is first asked for."""

    def __init__(self, timed: Timed, variants: Mapping[str, Variant]):
        super().__init__()
        self.timed, self.variants = timed, variants

    def __missing__(self, name: str) -> Job:
        variant, _, task = name.partition(": ")
        makers = {"training": self.timed.train, "inference": self.timed.infer}
        make = makers.get(task, functools.partial(self.timed.part, name=task))
        self[name] = make(self.variants[variant])
        return self[name]


def main(options: dict[str, Any]) -> None:
    """Answers until its input ends; the first process of a comparison draws the weights."""
    weights = Path(options["weights"])
    if not weights.exists():
        np.savez(weights, **to_numpy(randomise(Twin(options["encoder"]), seed=0)))
    variants = {variant.name: variant for variant in FORMS[options["form"]]}
    hello = {
        "platform": "gpu" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "variants": list(variants),
    }
    timed = Timed(options, tuned=options["form"] == "tuned")
    serve(hello, Jobs(timed, variants))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
