"""A paper estimate of a step on up to 256 chips: python -m tests.reference.scaling_estimate

Compute time from the FLOPs of the step's convolutions and products against the time of what the
devices send each other, by the formulas in docs/scaling.md, for the published recipe with 16 images
on each device, in bfloat16. Nothing of it is measured.
"""

import dataclasses

import jax

from ccl_jax import mesh
from ccl_jax.scoring import architecture_of
from ccl_jax.throughput import count_flops
from tests.reference.traffic import config_of, traced_step

IMAGES = 16  # on each device
REACH = 15  # images, config.loss.local.reach
WIRE = 2  # bytes of an element of a map: bfloat16
EXACT = 4  # bytes of a gradient, a statistic, a pooled code: float32
SHARE = 0.4  # of its peak that a device is taken to reach


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the makers state of a chip and its links."""

    name: str
    chips: int
    peak: float  # FLOP/s, bfloat16, dense
    together: float  # bytes/s that a chip receives when all of them sum or gather
    alone: float  # bytes/s from one other chip


# NVIDIA's H100 SXM data sheet: 989 TFLOP/s, NVLink 900 GB/s both ways together. DGX H100: a 400
# Gbit/s adapter for each GPU; all eight of a node carry a sum or a gather, whose parts cross once
# per node. Google's TPU v5e page: 197 TFLOP/s, 1600 Gbit/s between chips, over four links, both
# ways together.
MACHINES = (
    Machine("H100 node", 8, 989e12, 450e9, 450e9),
    Machine("H100 cluster", 256, 989e12, 400e9, 50e9),
    Machine("TPU v5e pod", 256, 197e12, 100e9, 25e9),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one device computes and what exists in a step."""

    flops: float  # of one device's images
    map_elements: int  # of an image, over the scales
    code: int  # elements of a pooled code
    gradients: int  # numbers that are summed over the devices


def received(step: Step, devices: int, negatives: str) -> dict[str, float]:
    """Bytes that a device receives, by purpose."""
    others = (devices - 1) / devices
    maps = devices - 1.0 if negatives == "batch" else REACH / IMAGES
    return {
        "gradients": 2 * others * step.gradients * EXACT,
        "maps": 2 * maps * IMAGES * step.map_elements * WIRE,
        "codes": 2 * (devices - 1) * IMAGES * 2 * step.code * EXACT,
    }


def published_step() -> Step:
    """The step of the published recipe."""
    config = config_of(1, "batch", [])
    _, params, _ = architecture_of(config.to_dict()).abstract()
    size = config.data.image_size
    maps = sum((size // stride) ** 2 * 64 * stride for stride in (4, 8, 16))  # 256 to 1024 channels
    flops = count_flops(traced_step(config, mesh.make_mesh(1)).jaxpr)
    # As compiled: each view's gradients of projector and neck are summed over the devices before
    # they are added.
    times = {"encoder": 0, "projector": 2, "neck": 2, "decoder": 1}
    number = sum(
        times[name] * leaf.size for name, tree in params.items() for leaf in jax.tree.leaves(tree)
    )
    return Step(flops, maps, 2048, number)


def table(step: Step) -> str:
    """A Markdown table: milliseconds of computing and of sending by machine and mode."""
    size = step.map_elements * WIRE / 1e6
    lines = [
        f"{step.flops / 1e12:.2f} TFLOP a step and device; maps of {size:.2f} MB an image; "
        f"{step.gradients / 1e6:.1f} M gradients\n",
        "| machine | chips | negatives | computing, ms | gradients, ms | maps, ms | codes, ms | "
        "sending / computing |",
        "| :-- | --: | :-- | --: | --: | --: | --: | --: |",
    ]
    for machine in MACHINES:
        computing = step.flops / (machine.peak * SHARE)
        for negatives in ("batch", "near"):
            parts = received(step, machine.chips, negatives)
            speed = dict.fromkeys(parts, machine.together)
            if negatives == "near":
                speed["maps"] = machine.alone
            sending = {name: size / speed[name] for name, size in parts.items()}
            cells = [f"{1e3 * seconds:.1f}" for seconds in (computing, *sending.values())]
            share = sum(sending.values()) / computing
            lines.append(
                f"| {machine.name} | {machine.chips} | {negatives} | {' | '.join(cells)} | "
                f"{share:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(published_step()))
