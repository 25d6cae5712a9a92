"""What the forms of single computations cost on the devices at hand, and why one was chosen.

    python -m tests.reference.kernels [--images 8] [--repeats 9] [--page docs/benchmarks.md]

Times, each jitted alone: the search for best matches (argmax or the first largest, block sizes,
maps rounded to bfloat16), 3x3 convolutions as such and as products of patches, the encoder on two
views one after the other and together, and with its convolutions by each library that XLA has for
CPUs, and what a product and a convolution gain by bfloat16. The search is on random maps of the
sizes of a ResNet-18's for 128 pixels and of a WideResNet-50-2's for 256; two views share smooth
values, and each has noise of its own.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ccl_jax import matching
from ccl_jax.benchmark.page import machine, replace_part
from ccl_jax.benchmark.table import circumstances, heading
from ccl_jax.benchmark.timing import time_calls
from ccl_jax.models import layers
from ccl_jax.models import network as networks
from ccl_jax.scoring import convolutions_on_all_cores, options_for
from ccl_jax.state import Architecture

TURNS = 2  # inputs that take turns
BLOCKS = (32, 128, 256, 1024)
# Side and channels of a network's maps: ResNet-18's for 128 pixels, WideResNet-50-2's for 256.
SCALES = {
    "resnet18, 128 pixels": ((32, 64), (16, 128), (8, 256)),
    "wide_resnet50_2, 256 pixels": ((64, 256), (32, 512), (16, 1024)),
}
CONVOLUTIONS = ((1, 512), (2, 512), (4, 512), (8, 256), (16, 128), (32, 64))  # side and channels
ENCODERS = (("resnet18", 128), ("wide_resnet50_2", 256))  # and pixels
FLOPS_OF_A_PRODUCT = 2 * 2048 * 2304 * 256


class Row(NamedTuple):
    """One measured form."""

    what: str
    form: str
    milliseconds: float
    note: str = ""


def milliseconds(call: Callable[..., Any], inputs: list[tuple], repeats: int) -> float:
    """The median time of the compiled call, on inputs that take turns."""
    times = time_calls(
        lambda number: call(*inputs[number % len(inputs)]),
        warm_up=2,
        repeats=repeats,
        ahead=False,
    )
    return 1e3 * times.median


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Random numbers of mean 0 and variance 1."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def by_argmax(queries: jax.Array, keys: jax.Array, *, block: int) -> tuple[jax.Array, jax.Array]:
    """`matching.best_matches` with `jnp.argmax` over the cosines of unit vectors."""
    queries, keys = matching.unit(queries), matching.unit(keys)
    images, _, _, channels = queries.shape
    rows, keys = (maps.reshape(images, -1, channels) for maps in (queries, keys))

    def match(query: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosines = jnp.einsum("bc,bnc->bn", query, keys, precision=matching.EXACT)
        return jnp.argmax(cosines, axis=1), jnp.max(cosines, axis=1)

    index, cosine = lax.map(match, rows.swapaxes(0, 1), batch_size=block)
    return index.T, cosine.T


def pairs_of_maps(scales: tuple, images: int, seed: int) -> tuple[list, list]:
    """Maps of a view and of another, in values that bfloat16 holds.

    Both are the same smooth maps, each with noise of half their spread, so matches are near ties.
    """
    clean, other = [], []
    for number, (side, channels) in enumerate(scales):
        small = normal(seed + number, images, side // 4, side // 4, channels)
        smooth = jax.image.resize(small, (images, side, side, channels), "linear")
        for maps, own in ((clean, 1000), (other, 2000)):
            noise = normal(seed + own + number, images, side, side, channels)
            maps.append((smooth + noise / 2).astype(jnp.bfloat16).astype(jnp.float32))
    return clean, other


def searches(images: int, repeats: int) -> Iterator[Row]:
    """The forms of the search, each over all scales of a network."""
    for network, scales in SCALES.items():
        inputs = [pairs_of_maps(scales, images, 10 * turn) for turn in range(TURNS)]
        forms: dict[str, Callable] = {
            f"argmax, blocks of {block}": functools.partial(by_argmax, block=block)
            for block in BLOCKS
        }
        for dtype in (None, jnp.bfloat16):
            for block in BLOCKS:
                held = "float32" if dtype is None else "rounded to bfloat16"
                forms[f"first largest, {held}, blocks of {block}"] = functools.partial(
                    matching.best_matches, block=block, maps_dtype=dtype
                )

        def over_scales(form: Callable, clean: list, other: list) -> list:
            return [form(*pair) for pair in zip(clean, other, strict=True)]

        reference = None
        for name, form in forms.items():
            call = jax.jit(functools.partial(over_scales, form)).lower(*inputs[0]).compile()
            spent = milliseconds(call, inputs, repeats)
            found = np.concatenate([index.ravel() for index, _ in call(*inputs[0])])
            reference = found if reference is None else reference
            plan = call.memory_analysis()
            yield Row(
                f"search, {network}, {images} images",
                name,
                spent,
                f"{plan.temp_size_in_bytes / 2**20:.0f} MiB, "
                f"{np.mean(found != reference):.2%} other matches than the first row's",
            )


def forward_and_backward(form: Callable) -> Callable[..., Any]:
    """The output of a convolution and the gradients of half its squares."""

    def call(maps: jax.Array, kernel: jax.Array) -> Any:
        out, back = jax.vjp(form, maps, kernel)
        return out, back(out)

    return call


def convolution(maps: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """XLA's own, with zeros around the maps."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        maps, kernel, (1, 1), "SAME", dimension_numbers=layout, **options
    )


def convolutions(images: int, repeats: int) -> Iterator[Row]:
    """3x3 convolutions of as many channels as they take, forward and backward."""
    forms = {
        "convolution": convolution,
        "product of patches": functools.partial(layers.of_patches, stride=1),
    }
    for side, channels in CONVOLUTIONS:
        inputs = [
            (
                normal(turn, images, side, side, channels),
                normal(turn + 7, 3, 3, channels, channels) / 48,
            )
            for turn in range(TURNS)
        ]
        for name, form in forms.items():
            yield Row(
                f"3x3, {channels} channels, {images} maps of {side}x{side}, forward and backward",
                name,
                milliseconds(jax.jit(forward_and_backward(form)), inputs, repeats),
                "taken" if (side <= layers.SMALL) == (name != "convolution") else "",
            )


def encoder_of(name: str) -> tuple[Callable[[jax.Array], networks.Maps], Any]:
    """An encoder with random weights, and its parameters."""
    architecture = Architecture("rd", name, "plain", "float32")
    graphdef, params, stats = architecture.abstract()
    encoder = jax.jit(architecture.random_encoder)(jax.random.key(0))
    rest = {name: tree for name, tree in params.items() if name != "encoder"}
    rest_stats = {name: tree for name, tree in stats.items() if name != "encoder"}

    def encode(views: jax.Array) -> networks.Maps:
        trees = {"encoder": encoder[0], **rest}, {"encoder": encoder[1], **rest_stats}
        return networks.merge(graphdef, *trees).encoder(views, train=False)

    return encode, encoder[0]


def over_views(encode: Callable[[jax.Array], networks.Maps]) -> Callable[..., list]:
    """The encoder on each of its arguments."""
    return lambda *views: [encode(view) for view in views]


def encoders(images: int, repeats: int) -> Iterator[Row]:
    """A ResNet-18 on two views of 128x128, one by one as the network does it, and as one batch."""
    encode, _ = encoder_of("resnet18")
    forms = {
        "one after the other": lambda first, second: (encode(first), encode(second)),
        "as one batch": lambda first, second: encode(jnp.concatenate([first, second])),
    }
    inputs = [
        tuple(normal(10 * turn + view, images, 128, 128, 3) for view in range(2))
        for turn in range(TURNS)
    ]
    for name, form in forms.items():
        what = f"encoder, resnet18, two views of {images} images of 128x128"
        note = "taken" if name == "one after the other" else ""
        yield Row(what, name, milliseconds(jax.jit(form), inputs, repeats), note)


def libraries(images: int, repeats: int) -> Iterator[Row]:
    """Encoders on one view and on two, their convolutions by each library of XLA for CPUs."""
    options = convolutions_on_all_cores()
    if not options:  # another device, or an XLA that computes convolutions in one way only
        return
    for name, side in ENCODERS:
        encode, params = encoder_of(name)
        inputs = [
            tuple(normal(10 * turn + view, images, side, side, 3) for view in range(2))
            for turn in range(TURNS)
        ]
        for views, uses in ((1, "scoring"), (2, "training")):
            given = [pair[:views] for pair in inputs]
            for library, its in (("YNNPACK", ()), ("Eigen", options)):
                call = jax.jit(over_views(encode), compiler_options=dict(its) or None)
                taken = its == (options_for(params) if uses == "scoring" else ())
                yield Row(
                    f"encoder, {name}, {views} x {images} images of {side}x{side}",
                    f"convolutions of {library}",
                    milliseconds(call, given, repeats),
                    f"taken in {uses}" if taken else "",
                )


def precisions(repeats: int) -> Iterator[Row]:
    """A product and a convolution of the same FLOPs, summed in float32."""

    def product(maps: jax.Array, kernel: jax.Array) -> jax.Array:
        rows, columns = maps.reshape(2048, -1), kernel.reshape(-1, 256)
        return lax.dot(rows, columns, preferred_element_type=jnp.float32)

    added = functools.partial(convolution, preferred_element_type=jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        for name, form, shape in (
            ("product of 2048x2304 and 2304x256", product, (2048, 2304)),
            ("3x3 convolution, 256 channels, 8 maps of 16x16", added, (8, 16, 16, 256)),
        ):
            inputs = [
                (normal(turn, *shape, dtype=dtype), normal(turn + 3, 3, 3, 256, 256, dtype=dtype))
                for turn in range(TURNS)
            ]
            spent = milliseconds(jax.jit(form), inputs, repeats)
            rate = f"{FLOPS_OF_A_PRODUCT / spent / 1e9:.3f} TFLOP/s"
            yield Row(name, jnp.dtype(dtype).name, spent, rate)


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = ["| what | form | ms | |", "|---|---|---:|---|"]
    lines += [f"| {row.what} | {row.form} | {row.milliseconds:.1f} | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> None:
    """Prints a row as soon as it is known, and writes all to the page where one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8, help="of a batch")
    parser.add_argument("--repeats", type=int, default=9, help="calls that are timed")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page to write the table to")
    chosen = parser.parse_args(words)
    rows = []
    for part in (
        precisions(chosen.repeats),
        convolutions(chosen.images, chosen.repeats),
        encoders(chosen.images, chosen.repeats),
        libraries(chosen.images, chosen.repeats),
        searches(chosen.images, chosen.repeats),
    ):
        for row in part:
            rows.append(row)
            print(" | ".join(map(str, row)), flush=True)
    if chosen.page is not None:
        found = circumstances("tests.reference.kernels", words)
        body = f"{heading(found)}\nMedians of {chosen.repeats}.\n\n{markdown(rows)}"
        replace_part(chosen.page, machine(), "Single computations", body)


if __name__ == "__main__":
    main(sys.argv[1:])
