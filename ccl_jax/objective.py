"""What a training minimises: the loss terms of a batch, on one device or over a mesh."""

import dataclasses
from collections.abc import Callable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from ccl_jax import losses, mesh
from ccl_jax.models import network as networks

Scalars = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The three terms of the training loss; a weight of 0 leaves a term out."""

    cosine_weight: float
    cosine_flat: bool  # cosine of a whole flattened map, or mean over positions
    local_weight: float
    local_temperature: float
    local_window: int | None  # side of the matching window in positions; None: the whole map
    local_same_class: bool  # matching candidates also from another image of the class
    local_reach: int | None  # negatives from the next so many images; None: from the whole batch
    global_weight: float
    global_temperature: float
    global_form: str  # "two_view" (first release) or "second_release"
    maps_dtype: str = "float32"  # the network's: maps travel, and are searched for matches, in it

    @property
    def contrastive(self) -> bool:
        """Whether any term needs the second view."""
        return self.local_weight > 0 or self.global_weight > 0

    @property
    def narrow_dtype(self) -> DTypeLike | None:
        """The dtype of the maps where it is narrower than that of `NetworkOutput`, else None."""
        return None if self.maps_dtype == "float32" else self.maps_dtype


def loss_terms(
    out: networks.NetworkOutput,
    labels: Array,
    key: Key[Array, ""],
    settings: LossSettings,
    *,
    negatives: Array | None = None,
    axis: losses.Axis = None,
) -> Scalars:
    """The unweighted loss terms that have a weight, by name; `key` draws missing `negatives`.

    With `axis` each device has its own images' `out` and `labels`, and all get the same terms.
    """
    terms = {}
    if settings.cosine_weight > 0:
        terms["cosine"] = losses.cosine_distillation_loss(
            out.targets, out.rebuilt, flat=settings.cosine_flat, axis=axis
        )
    if settings.local_weight > 0:
        assert out.augmented is not None  # `contrastive` made the second view
        terms["local"] = losses.local_contrastive_loss(
            out.targets,
            out.augmented.targets,
            out.projected,
            out.augmented.projected,
            labels,
            key,
            temperature=settings.local_temperature,
            window=settings.local_window,
            same_class_candidates=settings.local_same_class,
            negatives=negatives,
            reach=settings.local_reach,
            axis=axis,
            maps_dtype=settings.narrow_dtype,
        )
    if settings.global_weight > 0:
        terms["global"] = global_term(out, labels, settings, axis)
    return terms


def global_term(
    out: networks.NetworkOutput, labels: Array, settings: LossSettings, axis: losses.Axis
) -> Array:
    """The global contrastive loss on the pooled neck codes, in the chosen release's form."""
    temperature = settings.global_temperature
    if settings.global_form == "second_release":
        return losses.second_release_contrastive_loss(
            out.pooled, labels, temperature=temperature, axis=axis
        )
    assert out.augmented is not None  # `contrastive` made the second view
    return losses.two_view_supervised_contrastive_loss(
        out.pooled, out.augmented.pooled, labels, temperature=temperature, axis=axis
    )


def sharded_loss_terms(where: jax.sharding.Mesh | None) -> Callable[..., Scalars]:
    """`loss_terms` of images that lie over the devices of a mesh; None, or one device: as it is.

    By `shard_map`, so that matching stays on each image's own device, and only what the losses
    send travels; left alone, XLA moves whole maps about.
    """
    if where is None or where.size == 1:
        return loss_terms
    rows, whole = mesh.batch_spec(where), jax.P()

    def terms(
        out: networks.NetworkOutput,
        labels: Array,
        key: Key[Array, ""],
        settings: LossSettings,
        *,
        negatives: Array | None = None,
    ) -> Scalars:
        return jax.shard_map(
            lambda out, labels, key, negatives: loss_terms(
                out, labels, key, settings, negatives=negatives, axis=where.axis_names
            ),
            mesh=where,
            in_specs=(rows, rows, whole, whole),
            out_specs=whole,
        )(out, labels, key, negatives)

    return terms
