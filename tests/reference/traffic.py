"""What the devices send each other in a training step, read from the compiled program.

    python -m tests.reference.traffic [--devices 1,2,4,8,16,32,64] [--output FILE]

Compiles the published step (WideResNet-50-2, 256 pixels, 16 images per device) for so many fake
CPU devices, without running it, for negatives from the whole batch and from the next images; prints
a Markdown table of the bytes that each device receives, by collective. An hour on two cores.
"""

import argparse
import collections
import dataclasses
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from ccl_jax import config as configs
from ccl_jax import mesh, settings, setup
from ccl_jax.scoring import architecture_of
from ccl_jax.state import Frozen, init_state

ROOT = Path(__file__).parent.parent.parent
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "s32": 4, "u32": 4}
BYTES |= {"s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_LINE = re.compile(rf"= (?P<shape>.+?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    bytes: int  # of what comes out of it on one device
    group: int  # devices that take part together
    computation: str  # "main", or that of a loop or branch

    @property
    def received(self) -> float:
        """Bytes that a device receives, in the form that needs fewest: rings, or one message."""
        others = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * others, "reduce-scatter": self.group - 1.0}
        return self.bytes * factor.get(self.kind, others if self.kind != KINDS[3] else 1.0)


def collectives(program: str, devices: int) -> Iterator[Collective]:
    """The collectives of a program's text after partitioning; those of one device are left out."""
    computation = ""
    for line in program.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            computation = "main" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
        found = _LINE.search(line)
        if found is None or "-done(" in line:
            continue
        size = group_size(line, devices)
        kind = found["kind"]
        arrays = [
            BYTES[kind_] * math.prod(int(n) for n in shape.split(",") if n)
            for kind_, shape in _ARRAY.findall(found["shape"])
            if kind_ in BYTES
        ]
        if "-start(" in line and kind != "all-reduce":  # (what goes in, what comes out, ...)
            arrays = arrays[1:2]
        if size > 1:
            yield Collective(kind, sum(arrays), size, computation)


def group_size(line: str, devices: int) -> int:
    """How many devices a collective's line names together."""
    if "collective-permute" in line:
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        return devices if any(a != b for a, b in pairs) else 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(groups[1].split(",")) if groups and groups[1] else devices


def compiled_step(config: configs.ConfigDict, where: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The training step of a config, compiled for a mesh from shapes alone."""
    return traced_step(config, where).lower().compile()


def traced_step(config: configs.ConfigDict, where: jax.sharding.Mesh) -> jax.stages.Traced:
    """The training step of a config on a mesh, as operations on shapes."""
    architecture = architecture_of(config.to_dict())
    graphdef, params, stats = setup.abstract_network(config)
    optimizer = settings.optimizer_of(config, 1000)
    step = setup.train_step_of(config, graphdef, optimizer, where)
    state = jax.eval_shape(lambda key: init_state(architecture, optimizer, key), jax.random.key(0))
    placed = mesh.state_shardings(state, where)
    whole = mesh.replicated(where)

    def at(tree, shardings):
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            shardings,
        )

    frozen = Frozen(params["encoder"], stats["encoder"])
    size, images = config.data.image_size, config.train.batch_size
    rows = mesh.batch_sharding(where)
    batch = {
        "image": jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=rows),
    }
    position = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, whole))
    arguments = at(state, placed), at(frozen, jax.tree.map(lambda _: whole, frozen)), batch
    return jitted.trace(*arguments, position)


def received_by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device receives in a step, by kind of collective."""
    totals: dict[str, float] = collections.defaultdict(float)
    for collective in found:
        totals[collective.kind] += collective.received
    return dict(totals)


def table_row(name: str, devices: int, found: list[Collective]) -> str:
    """A row of the table: counts, and MB (10^6 bytes) by kind."""
    totals = received_by_kind(found)
    cells = [f"{totals.get(kind, 0.0) / 1e6:,.1f}" for kind in KINDS]
    inner = sum(collective.computation != "main" for collective in found)
    return (
        f"| {name} | {devices} | {len(found)} | {' | '.join(cells)} | "
        f"{sum(totals.values()) / 1e6:,.1f} | {inner} |"
    )


HEADER = (
    f"| negatives | devices | collectives | {' | '.join(KINDS)} | MB received | not in main |\n"
    f"| :-- | {' | '.join(['--:'] * (len(KINDS) + 4))} |"
)


def config_of(devices: int, negatives: str, changes: list[str]) -> configs.ConfigDict:
    """The published recipe with 16 images on each device."""
    config = configs.read_config_file(ROOT / "configs/default.py")
    config.train.batch_size = 16 * devices
    config.loss.local.negatives = negatives
    for change in changes:
        key, _, value = change.partition("=")
        before = dict(configs.flatten(config))[key]
        config.update_from_flattened_dict({key: type(before)(value)})
    return config


def main(words: list[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", default="1,2,4,8,16,32,64")
    parser.add_argument("--negatives", default="batch,near")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], help="a setting, model.encoder=resnet18"
    )
    parser.add_argument("--programs", help="folder for the compiled programs")
    given = parser.parse_args(words)
    numbers = [int(n) for n in given.devices.split(",")]
    jax.config.update("jax_num_cpu_devices", max(numbers))
    print(HEADER, flush=True)
    for negatives in given.negatives.split(","):
        for devices in numbers:
            start = time.perf_counter()
            where = mesh.make_mesh(devices, given.shards if devices % given.shards == 0 else 1)
            text = compiled_step(config_of(devices, negatives, given.set), where).as_text()
            if given.programs:
                Path(given.programs, f"{negatives}-{devices}.txt").write_text(text)
            print(table_row(negatives, devices, list(collectives(text, devices))), flush=True)
            print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
