"""This package's side of speed_torch.py, a process of its own: what is timed.

Imports nothing that images with JAX and PyTorch alone lack: no grain, ml_collections,
tensorflow_datasets or array_record (tests/test_speed.py), so the published settings come from
ccl_jax/benchmark/published.py.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from ccl_jax import losses, matching, state, train
from ccl_jax.benchmark.page import machine
from ccl_jax.benchmark.published import NOISE_PROBABILITY, RECIPE, optimizer
from ccl_jax.benchmark.published import losses as published_losses
from ccl_jax.models import network as networks
from ccl_jax.models import published
from ccl_jax.scoring import MapSettings, score_images
from tests.reference.speed_batches import Batch, make_batches, normalised
from tests.reference.speed_protocol import Job, serve


class Timed:
    """The network of a dtype, and everything that is timed of it."""

    def __init__(self, options: Mapping[str, Any]):
        self.architecture = state.Architecture("rd", options["encoder"], "plain", options["dtype"])
        self.losses = published_losses(options["dtype"])
        self.graphdef, *shapes = self.architecture.abstract()
        with np.load(options["weights"]) as tensors:
            trees = published.from_published(dict(tensors), *shapes, source=options["weights"])
        self.params, self.batch_stats = jax.device_put(trees)
        self.frozen = state.Frozen(self.params["encoder"], self.batch_stats["encoder"])
        self.optimizer = optimizer()
        batches = make_batches(options["different"], options["images"], options["image_size"])
        self.given = [self.on_device(batch) for batch in batches]
        self.pictures = [
            jax.device_put({"image": batch.clean, "label": batch.labels}) for batch in batches
        ]
        self.maps = MapSettings(options["image_size"], 0.0, "add", "cosine", 1)
        self.states: dict[str, state.TrainState] = {}
        update = train.make_update(self.graphdef, self.optimizer, self.losses)
        self.update = jax.jit(update, donate_argnums=0)
        step = train.make_train_step(
            self.graphdef,
            self.optimizer,
            self.losses,
            RECIPE,
            noise_probability=NOISE_PROBABILITY,
            root=jax.random.key(0),
        )
        self.step = jax.jit(step, donate_argnums=0)

    @staticmethod
    def on_device(batch: Batch) -> tuple[jax.Array, ...]:
        views = [normalised(view) for view in batch[:2]]
        return tuple(jax.device_put([*views, batch.labels, batch.negatives]))

    def fresh(self) -> state.TrainState:
        """A state of its own, whose arrays may be donated."""
        copied = jax.tree.map(jnp.copy, (self.params, self.batch_stats))
        params, batch_stats = (state.split_parts(tree, state.TRAINED) for tree in copied)
        return state.TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=self.optimizer.init(params),
        )

    def trained(self, purpose: str, advance: Callable[..., tuple], batches: list) -> Job:
        """A job of training steps on a state of its own, from the first batch on."""
        next_of = itertools.cycle(batches)

        def job(steps: int) -> dict[str, Any]:
            now = self.states.pop(purpose, None) or self.fresh()
            rows = []
            for _ in range(steps):
                now, scalars = advance(now, next(next_of))
                rows.append(scalars)
            self.states[purpose] = jax.block_until_ready(now)
            names = ("cosine", "local", "global")
            return {"terms": {name: float(rows[0][name]) for name in names}}

        return job

    def given_views(self, now: state.TrainState, batch: tuple) -> tuple:
        clean, augmented, labels, negatives = batch
        key = jax.random.key(0)
        return self.update(now, self.frozen, clean, augmented, labels, key=key, negatives=negatives)

    def whole_step(self, now: state.TrainState, batch: dict) -> tuple:
        return self.step(now, self.frozen, batch, now.step + 0)

    def inference(self) -> Job:
        """A job of batches scored, from the first on."""
        next_of = itertools.cycle(self.pictures)
        settings = self.maps

        def job(steps: int) -> dict[str, Any]:
            trees = (self.graphdef, self.params, self.batch_stats)
            maps = [
                score_images(*trees, next(next_of)["image"], settings=settings).maps
                for _ in range(steps)
            ]
            jax.block_until_ready(maps)
            return {"terms": {"mean score": float(maps[0].mean())}}

        return job

    def part(self, function: Callable, *arguments: Any) -> Job:
        """A job of one part alone, jitted."""
        compiled = jax.jit(function)

        def job(steps: int) -> dict[str, Any]:
            jax.block_until_ready([compiled(*arguments) for _ in range(steps)][-1])
            return {}

        return job

    def parts(self) -> dict[str, Job]:
        """Each part alone; what needs gradients with its backward pass."""
        clean, augmented, labels, negatives = self.given[0]
        trained = {part: self.params[part] for part in state.TRAINED}

        def merged(params: dict) -> networks.Network:
            whole = {"encoder": self.params["encoder"], **params}
            return networks.merge(self.graphdef, whole, self.batch_stats)

        def encode(params: dict, *views: jax.Array) -> list:
            network = networks.merge(
                self.graphdef, {"encoder": params, **trained}, self.batch_stats
            )
            return [network.encoder(view, train=False) for view in views]

        encoded = jax.jit(encode)(self.params["encoder"], clean, augmented)
        shown = [[maps.astype(jnp.float32) for maps in view] for view in encoded]
        projected = jax.jit(lambda maps: merged(trained).projector(maps))(encoded[0])
        projected = [maps.astype(jnp.float32) for maps in projected]

        def network_loss(params: dict, first: list, second: list) -> jax.Array:
            network = merged(params)
            code = network.neck(network.projector(first), train=True)
            other = network.neck(network.projector(second), train=True)
            rebuilt = network.decoder(code, train=True)
            loss = losses.cosine_distillation_loss(first, rebuilt)
            return loss + jnp.mean(code**2) + jnp.mean(other**2)

        def local_loss(queries: list, keys: list, targets: list, others: list) -> jax.Array:
            return losses.local_contrastive_loss(
                targets,
                others,
                queries,
                keys,
                labels,
                jax.random.key(0),
                temperature=self.losses.local_temperature,
                negatives=negatives,
                maps_dtype=self.losses.narrow_dtype,
            )

        def search(targets: list, others: list) -> list:
            pairs = zip(targets, others, strict=True)
            dtype = self.losses.narrow_dtype
            return [matching.best_matches(*pair, maps_dtype=dtype)[0] for pair in pairs]

        def optimise(gradients: dict, opt_state: Any, params: dict) -> tuple:
            updates, opt_state = self.optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), trained)
        return {
            "encoder": self.part(encode, self.params["encoder"], clean, augmented),
            "projector, neck, decoder": self.part(jax.grad(network_loss), trained, *encoded),
            "local loss": self.part(jax.grad(local_loss, (0, 1)), projected, projected, *shown),
            "best-match search": self.part(search, *shown),
            "optimizer": self.part(optimise, gradients, self.optimizer.init(trained), trained),
        }


class Jobs(dict[str, Job]):
    """The jobs named "dtype: task"; parts are made when one is asked for."""

    def __init__(self, timed: Timed):
        self.timed = timed
        super().__init__()
        self._add(
            {
                "training": timed.trained("training", timed.given_views, timed.given),
                "whole step": timed.trained("whole step", timed.whole_step, timed.pictures),
                "inference": timed.inference(),
            }
        )

    def _add(self, jobs: Mapping[str, Job]) -> None:
        self |= {f"{self.timed.architecture.compute_dtype}: {name}": jobs[name] for name in jobs}

    def __missing__(self, name: str) -> Job:
        parts = self.timed.parts()
        if name.partition(": ")[2] not in parts:
            raise KeyError(name)
        self._add(parts)
        return self[name]


def main(options: dict[str, Any]) -> None:
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    hello = {
        "machine": machine(),
        "platform": jax.devices()[0].platform,
        "versions": versions,
        "variants": [options["dtype"]],
    }
    serve(hello, Jobs(Timed(options)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
