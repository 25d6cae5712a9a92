"""Losses, their gradients and whole training steps against the record; see compare.py."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccl_jax import losses, train
from ccl_jax import settings as of_config
from ccl_jax.config import ConfigDict, read_config_file
from ccl_jax.models import published
from ccl_jax.state import TRAINED, Frozen, TrainState, split_parts
from tests.reference.compare import Differences, images, load_network, precision
from tests.reference.goldens import Golden, channels_first, channels_last, sample_indices

# Of the other families and detectors that the same file records.
OTHER_FAMILIES = ("l1_", "l2_", "csum", "ffocal")
FIRST_RELEASE = "scl_v1"
# The tests switch XLA's optimisation off; without any, float64 convolutions take ten times as long.
OPTIMISED = {"xla_backend_optimization_level": 1}


def loss_differences(name: str, *, f64: bool) -> Differences:
    """Values and gradients of all cases of a `loss_*` golden that concern the three losses."""
    golden = Golden(name)
    cases = {
        "regression": distillation_case,
        "dense": local_case,
        "scl": global_case,
    }
    compute = cases[name.removeprefix("loss_").split("_")[0]]
    found: Differences = {}
    with precision(f64=f64) as dtype:
        for case, settings in golden.meta["cases"].items():
            if case.startswith(OTHER_FAMILIES):
                continue
            value, gradients = compute(golden, case, settings, dtype)
            found[f"{case}/loss"] = golden.difference(f"{case}/loss", value, f64=f64)
            for key in settings["grads_present"]:
                gradient = gradients[key]
                gradient = channels_first(gradient) if gradient.ndim == 4 else gradient
                key = f"{case}/grad_{key}"
                found[key] = golden.difference(key, gradient, f64=f64)
    return found


def inputs(golden: Golden, *keys: str, dtype: type) -> list[jax.Array]:
    """Stored inputs, maps as [b, h, w, c]."""
    arrays = [golden[key].astype(dtype) for key in keys]
    return [jnp.asarray(channels_last(a) if a.ndim == 4 else a) for a in arrays]


def distillation_case(golden: Golden, case: str, _: dict, dtype: type) -> tuple[Any, dict]:
    """Cosine distillation; forms that the package lacks differ by a constant factor."""
    recorded = sum(re.fullmatch(r"t\d", key) is not None for key in golden.arrays)
    scales = 1 if case == "cos_single_default" else recorded
    flat, factor = True, 1.0
    if case != "cos_single_default":
        _, flat_word, average, weight = case.split("_")
        flat = flat_word == "flat1"
        factor = float(weight.removeprefix("lam")) / (scales if average == "avg1" else 1)
    names_t, names_s = ([f"{side}{i}" for i in range(scales)] for side in "ts")
    targets = inputs(golden, *names_t, dtype=dtype)
    rebuilt = inputs(golden, *names_s, dtype=dtype)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=1)
    def loss(targets: Any, rebuilt: Any) -> jax.Array:
        return factor * losses.cosine_distillation_loss(targets, rebuilt, flat=flat)

    value, by_rebuilt = loss(targets, rebuilt)
    _, by_targets = loss(rebuilt, targets)  # symmetric, but ours stops the targets' gradient
    gradients = dict(zip(names_s, by_rebuilt, strict=True))
    return value, gradients | dict(zip(names_t, by_targets, strict=True))


def local_case(golden: Golden, case: str, settings: dict, dtype: type) -> tuple[Any, dict]:
    """Local CL with the recorded negatives."""
    kinds = ("q_b", "k_b", "q_grid", "k_grid")
    maps = {
        kind: inputs(golden, *(f"{kind}{i}" for i in settings["scales"]), dtype=dtype)
        for kind in kinds
    }
    labels = jnp.asarray(settings["labels"])
    negatives = golden.arrays.get(f"{case}/negatives")
    if negatives is None:  # a batch of one class, for which the original draws none
        negatives = np.zeros((len(settings["scales"]), len(labels)), np.int32)

    @functools.partial(jax.value_and_grad, argnums=(2, 3))
    def loss(*maps: Any) -> jax.Array:
        return settings["lam"] * losses.local_contrastive_loss(
            *maps,
            labels,
            jax.random.key(0),
            temperature=settings["temperature"],
            negatives=jnp.asarray(negatives, jnp.int32),
        )

    value, gradients = jax.jit(loss)(*(maps[kind] for kind in kinds))
    return value, {
        f"{kind}{scale}": gradient
        for kind, of_kind in zip(("q_grid", "k_grid"), gradients, strict=True)
        for scale, gradient in zip(settings["scales"], of_kind, strict=True)
    }


def global_case(golden: Golden, case: str, settings: dict, dtype: type) -> tuple[Any, dict]:
    """Global CL in the form of either release."""
    labels = jnp.asarray(settings["labels"])
    temperature = settings["temperature"]
    rows = inputs(golden, *settings["grads_present"], dtype=dtype)

    def loss(*rows: Any) -> jax.Array:
        form = losses.second_release_contrastive_loss
        if case.startswith(FIRST_RELEASE):
            form = losses.two_view_supervised_contrastive_loss
        return form(*rows, labels, temperature=temperature)

    value, gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(rows)))))(*rows)
    return value, dict(zip(settings["grads_present"], gradients, strict=True))


def trajectory_differences(name: str, *, f64: bool) -> Differences:
    """Recorded optimisation steps: losses, gradient norms, first gradients, and sampled weights."""
    golden = Golden(name)
    with precision(f64=f64) as dtype:
        graphdef, params, batch_stats = load_network(golden, dtype)
        initial = published.to_published(params, batch_stats)
        config = second_release()
        optimizer = of_config.optimizer_of(config, len(golden.meta["labels"]))
        frozen = Frozen(params.pop("encoder"), batch_stats.pop("encoder"))
        state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
        update = jax.jit(
            train.make_update(graphdef, optimizer, of_config.loss_settings(config)),
            compiler_options=OPTIMISED,
        )
        found: Differences = {}
        rows = []
        for step, labels in enumerate(golden.meta["labels"]):
            state, scalars = update(
                state,
                frozen,
                *(images_of_step(golden, tag, step, dtype) for tag in ("img", "aug_img")),
                jnp.asarray(labels),
                key=jax.random.key(0),
                negatives=jnp.asarray(golden[f"negatives_step{step}"], jnp.int32),
            )
            rows.append({key: float(value) for key, value in scalars.items()})
            if step == 0:
                clip = min(1.0, 5.0 / (rows[0]["gradient_norm"] + 1e-6))
                gradients = published.to_published(first_gradients(state, clip), {})
            after = published.to_published(state.params, state.batch_stats)
            found |= weight_differences(golden, step, after, initial, f64=f64)
        found |= scalar_differences(golden, rows, f64=f64)
        return found | gradient_differences(golden, gradients, f64=f64)


def second_release() -> ConfigDict:
    """The recorded recipe: configs/default.py with the second release's global loss."""
    config = read_config_file(Path(__file__).parents[2] / "configs" / "default.py")
    config.loss.global_.form = "second_release"
    return config


def images_of_step(golden: Golden, tag: str, step: int, dtype: type) -> jax.Array:
    """One view of one step; the index describes the views of all steps at once."""
    described = next(key for key in golden.meta["inputs"] if key.startswith(f"{tag}_step"))
    golden.meta["inputs"][f"{tag}_step{step}"] = golden.meta["inputs"][described]
    return images(golden, f"{tag}_step{step}", dtype)


def first_gradients(state: TrainState, clip: float) -> dict:
    """The gradients of the first step before clipping, from Adam's first moment after it."""
    found: dict = {}
    for _, tree in optax.tree.get_all_with_path(state.opt_state, "mu"):
        found |= {part: leaf for part, leaf in tree.items() if jax.tree.leaves(leaf)}
    found = split_parts(found, TRAINED)
    return jax.tree.map(lambda mu: np.asarray(mu, np.float64) / (1 - 0.5) / clip, found)


def relative(want: Any, got: Any) -> float:
    """The L2 difference relative to what is wanted."""
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def wanted(golden: Golden, key: str, *, f64: bool) -> np.ndarray:
    """A recorded array of the chosen precision; some were recorded in one only."""
    return golden.arrays.get(f"{key}__f64", golden[key]) if f64 else golden[key]


def scalar_differences(golden: Golden, rows: list[dict], *, f64: bool) -> Differences:
    """Losses of every step, and norms of the gradients."""
    names = {"loss_cos": "cosine", "loss_scl": "global", "loss_dense": "local"}
    names |= {"loss_total": "loss", "grad_norm_before_clip": "gradient_norm"}
    return {
        f"{key} of step {step}": relative(wanted(golden, key, f64=f64)[step], row[name])
        for key, name in names.items()
        for step, row in enumerate(rows)
    }


def gradient_differences(golden: Golden, gradients: dict, *, f64: bool) -> Differences:
    """First gradients: samples and norms."""
    found = {}
    for key in golden:
        if key.startswith("grad0/") and key.endswith("/samples"):
            name = key.split("/")[1]
            value = gradients[name].reshape(-1)
            at = sample_indices(f"param:{name}", value.size, golden[key].size)
            found[key] = relative(wanted(golden, key, f64=f64), value[at])
            norm = f"grad0/{name}/l2"
            found[norm] = relative(wanted(golden, norm, f64=f64), np.linalg.norm(value))
    return found


def weight_differences(
    golden: Golden, step: int, after: dict, initial: dict, *, f64: bool
) -> Differences:
    """Sampled weights, their mean and spread, and how far they moved, after one step."""
    found = {}
    for key in golden:
        if not key.startswith("par/") or not key.endswith("/samples"):
            continue
        name = key.split("/")[1]
        value = np.asarray(after[name], np.float64).reshape(-1)
        start = np.asarray(initial[name], np.float64).reshape(-1)
        at = sample_indices(f"param:{name}", value.size, golden[key].shape[1])
        if not np.allclose(start[at], golden[f"par/{name}/init_samples"], rtol=1e-6):
            raise ValueError(f"{name} does not start as recorded")
        values = {
            "samples": value[at],
            "mean_std": [value.mean(), value.std()],
            "mean_abs_delta": np.abs(value - start).mean(),
        }
        for kind, got in values.items():
            want = wanted(golden, f"par/{name}/{kind}", f64=f64)[step]
            found[f"par/{name}/{kind} after step {step + 1}"] = relative(want, got)
    return found
