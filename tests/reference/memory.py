"""How much device memory a training step takes, planned by XLA: nothing is allocated or run.

    python -m tests.reference.memory [--config configs/mvtec.py] [--batch 16] [--size 256]
        [--dtype float32,bfloat16] [--remat no,yes] [--page docs/benchmarks.md]

Compiles the step of a config for abstract arguments and reads the compiled program's memory
analysis: arguments (state, frozen encoder, batch) + temporary buffers + outputs - what the outputs
share with donated arguments. A CPU's compiler makes the plan that is read here where no other
device is at hand; one for GPUs fuses and orders operations otherwise, and adds workspace for
convolutions. XLA for CPUs merges what `run.remat` wants computed twice, so that no plan for a CPU
shows what it saves; the column "kept" does: what the network's forward pass leaves in memory for
its backward pass, as JAX differentiates it, before any compiler.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ccl_jax import config as configs
from ccl_jax import mesh, settings, setup
from ccl_jax.benchmark.page import machine, replace_part
from ccl_jax.benchmark.table import circumstances, heading
from ccl_jax.config import ConfigDict
from ccl_jax.models import network as networks
from ccl_jax.scoring import architecture_of
from ccl_jax.state import TRAINED, Frozen, init_state, split_parts

GIB = 2**30
LIMITS = {"float32": 16, "bfloat16": 10}  # GiB, within which the published recipe is to train
HEAD = [
    "compute dtype",
    "`run.remat`",
    "arguments",
    "temporary",
    "not shared outputs",
    "all",
    "kept",
]


def plan_of(config: ConfigDict) -> Any:
    """The memory analysis of the config's training step, compiled for one device."""
    where = mesh.make_mesh(1)
    architecture = architecture_of(config.to_dict())
    graphdef, params, batch_stats = setup.abstract_network(config)
    optimizer = settings.optimizer_of(config, 1000)
    state = jax.eval_shape(lambda key: init_state(architecture, optimizer, key), jax.random.key(0))
    frozen = Frozen(params["encoder"], batch_stats["encoder"])
    images, size = config.train.batch_size, config.data.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }
    step = setup.train_step_of(config, graphdef, optimizer, where)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(step, donate_argnums=0).lower(state, frozen, batch, position)
    return lowered.compile().memory_analysis()


def kept_of(config: ConfigDict) -> int:
    """Bytes that the network's forward pass of both views keeps for its backward pass."""
    graphdef, params, batch_stats = setup.abstract_network(config)
    trained = split_parts(params, TRAINED)
    images, size = config.train.batch_size, config.data.image_size
    views = [jax.ShapeDtypeStruct((images, size, size, 3), jnp.float32)] * 2

    def kept(trained: Any, params: Any, batch_stats: Any, *views: jax.Array) -> Any:
        def forward(trained: Any) -> Any:
            network = networks.merge(graphdef, params | trained, batch_stats)
            return network(*views, train=True)

        _, pull = jax.vjp(forward, trained)
        return pull

    pull = jax.eval_shape(kept, trained, params, batch_stats, *views)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trained))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull)) - weights


def row_of(config: ConfigDict) -> list[str]:
    """A table row: the settings, and GiB of arguments, temporary buffers, outputs, and all."""
    plan = plan_of(config)
    fresh = plan.output_size_in_bytes - plan.alias_size_in_bytes
    parts = [plan.argument_size_in_bytes, plan.temp_size_in_bytes, fresh]
    figures = [f"{part / GIB:.2f}" for part in (*parts, sum(parts), kept_of(config))]
    return [config.model.compute_dtype, "yes" if config.run.remat else "no", *figures]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in Markdown, under their heads."""
    ruled = [HEAD, ["---", "---", *["---:"] * (len(HEAD) - 2)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def main() -> None:
    """Prints a row as soon as it is known, and writes all to the page where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/mvtec.py", metavar="FILE")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--size", type=int, default=256, help="pixels, side of an image")
    parser.add_argument("--encoder", default="", help="another one than the config's")
    parser.add_argument("--dtype", default="float32,bfloat16", help="compute dtypes")
    parser.add_argument("--remat", default="no,yes", help="values of run.remat")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page to write the table to")
    chosen = parser.parse_args()
    config = configs.read_config_file(chosen.config)
    config.train.batch_size, config.data.image_size = chosen.batch, chosen.size
    config.model.encoder = chosen.encoder or config.model.encoder
    rows = []
    for dtype in chosen.dtype.split(","):
        for remat in chosen.remat.split(","):
            config.model.compute_dtype, config.run.remat = dtype, remat == "yes"
            start = time.perf_counter()
            rows.append(row_of(config))
            print(" | ".join(rows[-1]), f"({time.perf_counter() - start:.0f} s)", flush=True)
    if chosen.page is None:
        return
    what = f"{config.model.encoder}, {chosen.batch} images of {chosen.size}x{chosen.size}"
    limits = " and ".join(f"{limit} GiB in {dtype}" for dtype, limit in LIMITS.items())
    flags = os.environ.get("XLA_FLAGS", "")
    found = circumstances("tests.reference.memory", sys.argv[1:])
    body = (
        heading(found)
        + (f"With `XLA_FLAGS={flags}`. " if flags else "\n")
        + f"GiB of one training step ({what}), as this platform's compiler plans them; a GPU's "
        f"plans otherwise. XLA for CPUs merges what `run.remat` computes again; what it saves "
        f"on another device was not measured. Kept: what the forward pass leaves for the "
        f"backward pass, before any compiler. Wanted: the published recipe (batch 16, 256x256) "
        f"within {limits}.\n\n{table(rows)}\n"
    )
    replace_part(chosen.page, machine(), "Memory of a training step", body)


if __name__ == "__main__":
    main()
