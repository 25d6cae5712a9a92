"""What each part of a training step costs, timed as a program of its own."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from ccl_jax import mesh
from ccl_jax.augment import Recipe, normalize, second_view, to_unit
from ccl_jax.benchmark.timing import Times, time_calls
from ccl_jax.benchmark.training import Batch
from ccl_jax.loop import put_number
from ccl_jax.matching import best_matches
from ccl_jax.models import network as networks
from ccl_jax.objective import LossSettings, sharded_loss_terms
from ccl_jax.state import Frozen, TrainState, join, purpose_key

Part = tuple[str, Callable[[int], Any]]
TURNS = 2  # inputs of a part that take turns: feature maps of a batch are large
SEARCH = "best-match search"  # is within the losses


class Parts:
    """The parts of the step of a recipe, each with inputs like those that it has in the step."""

    def __init__(
        self,
        graphdef: Any,
        state: TrainState,
        frozen: Frozen,
        *,
        losses: LossSettings,
        recipe: Recipe,
        optimizer: optax.GradientTransformation,
        root: Key[Array, ""],
        where: jax.sharding.Mesh,
    ) -> None:
        self._graphdef, self._state, self._frozen = graphdef, state, frozen
        self._losses, self._recipe, self._optimizer = losses, recipe, optimizer
        self._root, self._where = root, where

    def time(
        self, batches: Sequence[Batch], *, warm_up: int, repeats: int, ahead: bool
    ) -> dict[str, Times]:
        """The times of each part that the recipe has, by its name."""
        return {
            name: time_calls(call, warm_up=warm_up, repeats=repeats, ahead=ahead)
            for name, call in self._each(batches[:TURNS])
        }

    def _each(self, batches: Sequence[Batch]) -> Iterator[Part]:
        """The parts one by one, so that the inputs of only one are on the devices."""
        views = [self._views(batch["image"], self._number(n)) for n, batch in enumerate(batches)]
        if self._losses.contrastive:
            yield (
                "augmentation (second view)",
                lambda n: self._augmented(batches[n % TURNS]["image"], self._number(n)),
            )
        yield "encoder, all views", lambda n: self._encoder(self._frozen, views[n % TURNS])
        weights = self._state.params, self._state.batch_stats, self._frozen
        targets = [self._encoder(self._frozen, images) for images in views]
        if "projector" in self._state.params:
            yield (
                "projector, forward and backward",
                lambda n: self._projector(*weights, targets[n % TURNS]),
            )
        projected = [self._projected(*weights, maps) for maps in targets]
        del targets
        yield (
            "neck and decoder, forward and backward",
            lambda n: self._neck_and_decoder(*weights, projected[n % TURNS]),
        )
        del projected
        outputs = [self._output(*weights, images) for images in views]
        labels = [batch["label"] for batch in batches]
        within = f" (with {SEARCH})" if self._losses.local_weight > 0 else ""
        yield (
            f"losses, forward and backward{within}",
            lambda n: self._loss(outputs[n % TURNS], labels[n % TURNS], self._number(n)),
        )
        if self._losses.local_weight > 0:
            yield SEARCH, lambda n: self._search(outputs[n % TURNS])
        del outputs, views
        yield "optimizer update", self._optimizer_calls()

    def _number(self, number: int) -> Array:
        return put_number(number, self._where)

    def _merge(self, params: PyTree, stats: PyTree, frozen: Frozen) -> networks.Network:
        return networks.merge(self._graphdef, *join(frozen, params, stats))

    @functools.cached_property
    def _augmented(self) -> Callable[..., Array]:
        def augmented(images: Array, number: Array) -> Array:
            key = purpose_key(self._root, "second view", number)
            return normalize(second_view(key, to_unit(images), self._recipe))

        return jax.jit(augmented)

    @functools.cached_property
    def _views(self) -> Callable[..., tuple[Array, ...]]:
        """The views of the images, normalised: one, or two with contrastive losses."""

        def views(images: Array, number: Array) -> tuple[Array, ...]:
            clean = normalize(to_unit(images))
            if not self._losses.contrastive:
                return (clean,)
            return clean, self._augmented(images, number)

        return jax.jit(views)

    @functools.cached_property
    def _encoder(self) -> Callable[..., tuple[networks.Maps, ...]]:
        params, stats = self._state.params, self._state.batch_stats

        def encoder(frozen: Frozen, views: tuple[Array, ...]) -> tuple[networks.Maps, ...]:
            network = self._merge(params, stats, frozen)  # of the trained parts nothing is used
            return tuple(network.encoder(images, train=False) for images in views)

        return jax.jit(encoder)

    @functools.cached_property
    def _projected(self) -> Callable[..., tuple[networks.Maps, ...]]:
        def projected(
            params: PyTree, stats: PyTree, frozen: Frozen, targets: tuple[networks.Maps, ...]
        ) -> tuple[networks.Maps, ...]:
            projector = self._merge(params, stats, frozen).projector
            return targets if projector is None else tuple(projector(maps) for maps in targets)

        return jax.jit(projected)

    @functools.cached_property
    def _projector(self) -> Callable[..., PyTree]:
        def projector(params: PyTree, *rest: Any) -> PyTree:
            return jax.grad(
                lambda own: half_square(self._projected({**params, "projector": own}, *rest))
            )(params["projector"])

        return jax.jit(projector)

    @functools.cached_property
    def _neck_and_decoder(self) -> Callable[..., PyTree]:
        def pass_through(
            params: PyTree, stats: PyTree, frozen: Frozen, views: tuple[networks.Maps, ...]
        ) -> PyTree:
            def energy(own: PyTree, views: tuple[networks.Maps, ...]) -> tuple[Array, PyTree]:
                network = self._merge({**params, **own}, stats, frozen)
                clean, *augmented = (network.neck(maps, train=True) for maps in views)
                rebuilt = network.decoder(clean, train=True)
                return half_square((rebuilt, augmented)), networks.statistics(network)

            own = {part: params[part] for part in ("neck", "decoder")}
            by = (0, 1) if "projector" in params else 0  # which passes its gradient on
            return jax.grad(energy, by, has_aux=True)(own, views)

        return jax.jit(pass_through)

    @functools.cached_property
    def _output(self) -> Callable[..., networks.NetworkOutput]:
        def output(
            params: PyTree, stats: PyTree, frozen: Frozen, views: tuple[Array, ...]
        ) -> networks.NetworkOutput:
            return self._merge(params, stats, frozen)(*views, train=True)

        return jax.jit(output)

    @functools.cached_property
    def _loss(self) -> Callable[..., PyTree]:
        terms_of = sharded_loss_terms(self._where)
        weights = {
            "cosine": self._losses.cosine_weight,
            "local": self._losses.local_weight,
            "global": self._losses.global_weight,
        }

        def loss(out: networks.NetworkOutput, labels: Array, number: Array) -> PyTree:
            key = purpose_key(self._root, "negatives", number)

            def total(out: networks.NetworkOutput) -> Array:
                terms = terms_of(out, labels, key, self._losses)
                return sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))

            return jax.value_and_grad(total)(out)

        return jax.jit(loss)

    @functools.cached_property
    def _search(self) -> Callable[..., PyTree]:
        def search(out: networks.NetworkOutput) -> PyTree:
            assert out.augmented is not None  # the local loss made the second view
            find = functools.partial(
                best_matches,
                window=self._losses.local_window,
                maps_dtype=self._losses.narrow_dtype,
            )
            return [
                find(clean, augmented)
                for clean, augmented in zip(out.targets, out.augmented.targets, strict=True)
            ]

        rows = mesh.batch_spec(self._where)
        return jax.jit(jax.shard_map(search, mesh=self._where, in_specs=rows, out_specs=rows))

    def _optimizer_calls(self) -> Callable[[int], Array]:
        """Updates of a copy of the parameters, by gradients that take turns."""

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params: PyTree, state: PyTree, gradients: PyTree) -> tuple:
            updates, state = self._optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, optax.tree.norm(gradients)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._state.params)

        @functools.partial(jax.jit, out_shardings=shardings)
        def draw(params: PyTree, number: Array) -> PyTree:
            return optax.tree.random_like(purpose_key(self._root, "gradients", number), params)

        gradients = [draw(self._state.params, self._number(n)) for n in range(TURNS)]
        kept = jax.tree.map(jnp.copy, (self._state.params, self._state.opt_state))

        def call(number: int) -> Array:
            nonlocal kept
            *now, norm = update(*kept, gradients[number % TURNS])
            kept = (now[0], now[1])
            return norm

        return call


def half_square(arrays: PyTree) -> Array:
    """Half the sum of all squares: a loss whose gradient is the array itself."""
    squares = [jnp.sum(jnp.square(a.astype(jnp.float32))) for a in jax.tree.leaves(arrays)]
    return 0.5 * sum(squares, jnp.zeros(()))
