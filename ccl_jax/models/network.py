"""Encoder, projector, neck and decoder as one network, and the plain dicts it is made from.

Modules live inside a traced function only; what crosses `jax.jit` are nested dicts of arrays with
the top-level keys encoder, projector, neck and decoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ccl_jax.models.initial import Draws
from ccl_jax.models.layers import BatchNorm
from ccl_jax.models.layers import compute_dtype as dtype_of
from ccl_jax.models.projector import Projector
from ccl_jax.models.resnet import ResNetEncoder, Stage
from ccl_jax.models.reverse import Decoder, Neck

Maps = tuple[jax.Array, ...]  # one per scale, fine to coarse
Noise = tuple[tuple[jax.Array, jax.Array], ...]  # (noise, mask) per scale
Tree = dict[str, Any]


class ViewOutput(NamedTuple):
    """What the contrastive losses need of the augmented view; at least float32."""

    targets: Maps
    projected: Maps
    pooled: jax.Array


class NetworkOutput(NamedTuple):
    """Encoder maps, their rebuilt versions, projected maps and the pooled code; at least float32.

    Without a projector, `projected` holds the targets. `targets` pass no gradient.
    """

    targets: Maps
    rebuilt: Maps
    projected: Maps
    pooled: jax.Array
    augmented: ViewOutput | None


class Network(nnx.Module):
    """A frozen encoder, and the projector (or None), neck and decoder that learn to rebuild it."""

    def __init__(
        self, encoder: ResNetEncoder, projector: Projector | None, neck: Neck, decoder: Decoder
    ):
        self.encoder = encoder
        self.projector = projector
        self.neck = neck
        self.decoder = decoder

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        augmented: Float[Array, "b h w 3"] | None = None,
        *,
        train: bool,
        noise: Noise | None = None,
    ) -> NetworkOutput:
        """The maps of normalised images, and, where given, of their augmented views.

        `train` lets neck and decoder normalise by the batch and update their running statistics:
        the neck's twice where there is a second view (the clean one first), the decoder's once.
        `noise` (see draw_noise) is added to the projected clean maps; the losses see it.
        """
        targets, projected = self._encode(images)
        if noise is not None:
            projected = tuple(
                (maps + values * mask).astype(maps.dtype)
                for maps, (values, mask) in zip(projected, noise, strict=True)
            )
        code = self.neck(projected, train=train)
        view = None if augmented is None else self._second_view(augmented, train=train)
        rebuilt = self.decoder(code, train=train)
        return NetworkOutput(_exact(targets), _exact(rebuilt), _exact(projected), _pool(code), view)

    def map_shapes(self, images: Float[Array, "b h w 3"]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the encoder maps of these images: what draw_noise wants to know."""
        return jax.eval_shape(lambda batch: _exact(self._encode(batch)[0]), images)

    def _encode(self, images: jax.Array) -> tuple[Maps, Maps]:
        targets = lax.stop_gradient(self.encoder(images, train=False))
        return targets, targets if self.projector is None else self.projector(targets)

    def _second_view(self, images: jax.Array, *, train: bool) -> ViewOutput:
        targets, projected = self._encode(images)
        pooled = _pool(self.neck(projected, train=train))
        return ViewOutput(_exact(targets), _exact(projected), pooled)


def draw_noise(
    key: PRNGKeyArray,
    maps: Sequence[jax.Array | jax.ShapeDtypeStruct],
    probability: float | Float[Array, ""],
) -> Noise:
    """Per scale N(0, 1) noise, and its 0/1 mask that all channels of a position share.

    One draw decides for all scales: with `probability` a mask holds ones and zeros in equal
    shares, otherwise everything is zero. `maps` only tell shapes. Source: released code.
    """
    gate_key, values_key, mask_key = jax.random.split(key, 3)
    shapes = [tuple(scale.shape) for scale in maps]
    images = shapes[0][0]
    positions = [height * width for _, height, width, _ in shapes]
    elements = [height * width * channels for _, height, width, channels in shapes]

    def disturbed() -> Noise:
        # One draw for all scales: compiling a draw takes a second.
        values = jax.random.normal(values_key, (images, sum(elements)), jnp.float32)
        mask = jax.random.bernoulli(mask_key, 0.5, (images, sum(positions))).astype(jnp.float32)
        values_of = jnp.split(values, np.cumsum(elements)[:-1], axis=1)
        mask_of = jnp.split(mask, np.cumsum(positions)[:-1], axis=1)
        return tuple(
            (noise.reshape(shape), gate.reshape(*shape[:3], 1))
            for shape, noise, gate in zip(shapes, values_of, mask_of, strict=True)
        )

    def calm() -> Noise:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(disturbed))

    # A branch rather than a product: only the steps with noise pay for millions of draws.
    open_gate = jax.random.uniform(gate_key, dtype=jnp.float32) < probability
    return lax.cond(open_gate, disturbed, calm)


def build_network(
    *, family: str, encoder: str, projector: str, compute_dtype: str, rngs: nnx.Rngs
) -> Network:
    """A freshly initialised network.

    Raises:
        ValueError: for an unknown family, encoder, projector or dtype.
    """
    settings = {
        "family": family,
        "encoder": encoder,
        "projector": projector,
        "compute_dtype": compute_dtype,
    }
    counted = Draws(jax.random.key(0))
    nnx.eval_shape(lambda: _assemble(**settings, draws=counted))
    return _assemble(**settings, draws=Draws(rngs.params(), reserve=counted.used))


def abstract_network(
    *,
    family: str,
    encoder: str,
    projector: str,
    compute_dtype: str,
    norm_images: int = 0,
    remat: bool = False,
) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Structure, parameters and running statistics as shapes; allocates nothing.

    In training BatchNorm takes its statistics over groups of `norm_images` images; 0: over all.
    With `remat` the backward pass computes the maps within blocks and heads again.
    """
    network = nnx.eval_shape(
        lambda: _assemble(
            family=family,
            encoder=encoder,
            projector=projector,
            compute_dtype=compute_dtype,
            draws=Draws(jax.random.key(0)),
        )
    )
    for _, module in nnx.iter_modules(network):
        if isinstance(module, BatchNorm):
            module.images = norm_images
        if isinstance(module, Stage | Projector):
            module.remat = remat
    return split(network)


def split(network: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Structure, parameters and running statistics of a module: what `merge` takes."""
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    return nnx.graphdef(network), params, statistics(network)


def merge(graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree) -> Network:
    """The module of these values. Checks no names or shapes: compare loaded trees first."""
    return nnx.merge(graphdef, params, batch_stats)


def statistics(network: nnx.Module) -> Tree:
    """The running statistics of a module, as a nested dict."""
    return nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters of each part (top-level key)."""
    return {
        part: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
        for part, tree in params.items()
    }


def _assemble(
    *, family: str, encoder: str, projector: str, compute_dtype: str, draws: Draws
) -> Network:
    if family != "rd":
        raise ValueError(
            f'model.family={family!r} is not known; use "rd", e.g. --config.model.family=rd.'
        )
    dtype = dtype_of(compute_dtype)
    frozen = ResNetEncoder(encoder, dtype=dtype, draws=draws)
    head = None
    if projector != "none":
        head = Projector(frozen.channels, projector, dtype=dtype, draws=draws)
    neck = Neck(encoder, dtype=dtype, draws=draws)
    decoder = Decoder(encoder, dtype=dtype, draws=draws)
    return Network(frozen, head, neck, decoder)


def _exact(maps: Sequence[jax.Array]) -> Maps:
    """The maps in at least float32."""
    return tuple(scale.astype(jnp.promote_types(scale.dtype, jnp.float32)) for scale in maps)


def _pool(code: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """The spatial mean, in at least float32."""
    return code.astype(jnp.promote_types(code.dtype, jnp.float32)).mean((1, 2))
