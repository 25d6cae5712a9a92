"""How far our optimisation steps are from the PyTorch twin's, in float64; see compare_twin.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ccl_jax import settings, state, train
from ccl_jax.config import ConfigDict, read_config_file
from ccl_jax.models import published
from tests.reference.compare_twin import (
    OPTIMISED,
    Differences,
    channels_last,
    drawn_negatives,
    is_compared,
    our_trees,
)
from tests.reference.twin_model import Twin, randomise, to_numpy
from tests.reference.twin_step import TwinTraining

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A short training of a ResNet-18 at 64 pixels, six images of three classes a step."""

    projector: str = "plain"
    global_form: str = "two_view"
    flat: bool = True
    steps: int = 2
    noisy: tuple[int, ...] = ()  # steps whose noise gate is open


RECIPES = {
    "default": Recipe(steps=4, noisy=(1, 2)),
    "depthwise projector": Recipe(projector="depthwise", noisy=(0,)),
    "second release": Recipe(global_form="second_release", flat=False),
}


def random_batch(seed: int, *, noisy: bool) -> tuple[tuple, list]:
    """(clean, augmented, labels, negatives), and (values, mask) of the noise per scale."""
    rng = np.random.default_rng(seed)
    clean, augmented = rng.normal(size=(2, 6, 3, 64, 64))
    labels = rng.permutation([0, 0, 0, 1, 1, 2])
    noise = []
    for channels, side in ((64, 16), (128, 8), (256, 4)):
        values = rng.normal(size=(6, channels, side, side))
        mask = rng.integers(0, 2, (6, 1, side, side)).astype(np.float64)
        noise.append((values, mask * noisy))
    return (clean, augmented, labels, drawn_negatives(rng, labels, 3)), noise


def published_recipe(recipe: Recipe) -> ConfigDict:
    """configs/default.py, whose rates and losses a short training takes but for what it changes."""
    config = read_config_file(ROOT / "configs" / "default.py")
    config.loss.global_.form = recipe.global_form
    config.loss.cosine.flat = recipe.flat
    return config


class OurTraining:
    """Our side of a TwinTraining, from the same weights."""

    def __init__(self, twin: Twin, recipe: Recipe):
        graphdef, params, batch_stats = our_trees(twin, "resnet18", recipe.projector)
        config = published_recipe(recipe)
        optimizer = settings.optimizer_of(config, recipe.steps)
        update = train.make_update(graphdef, optimizer, settings.loss_settings(config))
        self.update = jax.jit(update, compiler_options=OPTIMISED)
        self.frozen = state.Frozen(params["encoder"], batch_stats["encoder"])
        trained = state.split_parts(params, state.TRAINED)
        self.state = state.TrainState(
            step=jnp.zeros((), jnp.int32),
            params=trained,
            batch_stats=state.split_parts(batch_stats, state.TRAINED),
            opt_state=optimizer.init(trained),
        )

    def step(self, batch: tuple, noise: list) -> dict[str, float]:
        clean, augmented, labels, negatives = batch
        self.state, scalars = self.update(
            self.state,
            self.frozen,
            channels_last(clean),
            channels_last(augmented),
            jnp.asarray(labels, jnp.int32),
            key=jax.random.key(0),
            noise=tuple((channels_last(values), channels_last(mask)) for values, mask in noise),
            negatives=jnp.asarray(negatives, jnp.int32),
        )
        return {name: float(value) for name, value in scalars.items()}

    def tensors(self) -> dict[str, np.ndarray]:
        """All weights and statistics under their released names."""
        trees = state.join(self.frozen, self.state.params, self.state.batch_stats)
        return published.to_published(*trees)


def training_differences(recipe: Recipe) -> tuple[Differences, Differences]:
    """(relative differences of the scalars, absolute ones of every tensor), after each step."""
    twin = randomise(Twin("resnet18", recipe.projector).double(), seed=11)
    ours = OurTraining(twin, recipe)
    theirs = TwinTraining(twin, global_form=recipe.global_form, flat=recipe.flat)
    scalars, tensors = {}, {}
    for step in range(recipe.steps):
        batch, noise = random_batch(100 + step, noisy=step in recipe.noisy)
        given = [tuple(map(torch.from_numpy, pair)) for pair in noise]
        want = theirs.step(*map(torch.from_numpy, batch), noise=given)
        got = ours.step(batch, noise)
        scalars |= {f"{name}, step {step}": abs(got[name] / want[name] - 1) for name in want}
        mine, twins = ours.tensors(), to_numpy(twin)
        tensors |= {
            f"{name}, step {step}": float(np.abs(mine[name] - twins[name]).max())
            for name in twins
            if is_compared(name)
        }
    return scalars, tensors
