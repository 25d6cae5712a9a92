"""Coordinates, shapes and filtered noise that the kinds of procedural images are painted with."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ccl_jax.pretraining.lots import Lot

Plane = Float[Array, "s s"]


def bent_plane(own: Lot, size: int, *, turn: float, zoom: float) -> tuple[Plane, Plane]:
    """Coordinates x, y, about -1 to 1, moved, turned (radians), zoomed and bent by an image."""
    axis = (jnp.arange(size) + 0.5) * (2 / size) - 1
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    angle, scale = own.between(-turn, turn), jnp.exp(own.between(-zoom, zoom))
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    shift, bend = own.between(-0.6, 0.6, 2), own.between(0, 0.05, 2)
    speed, phase = own.between(2, 6, 2), own.between(0, 2 * math.pi, 2)
    u = cos * x - sin * y + shift[0]
    v = sin * x + cos * y + shift[1]
    return u + bend[0] * jnp.sin(speed[0] * v + phase[0]), v + bend[1] * jnp.sin(
        speed[1] * u + phase[1]
    )


def form_distance(u: Plane, v: Plane, form: jax.Array) -> Plane:
    """0 in the middle and 1 on the border of a unit disc (form 0), box (1) or triangle (2)."""
    disc = jnp.sqrt(u * u + v * v + 1e-6)
    box = jnp.maximum(jnp.abs(u), jnp.abs(v))
    triangle = jnp.maximum(v, jnp.abs(u) * 0.866 - 0.5 * v) * 1.5
    return jnp.where(form == 0, disc, jnp.where(form == 1, box, triangle))


def filtered_noise(
    law: Lot,
    key: Key[Array, ""],
    size: int,
    count: int,
    *,
    turn: float | Array = 0.0,
    zoom: float | Array = 1.0,
) -> Float[Array, "{count} {size} {size}"]:
    """Planes of noise with a spectrum of the class, of mean square 1: clouds, grains, fibres.

    The spectrum is turned by `turn` radians. Its frequencies count per 64 pixels, times `zoom`, so
    that a larger image shows more of it, and not larger.
    """
    angle = law.between(0, math.pi) + turn
    peak, width = law.between(0, 24) * zoom, law.between(1.5, 14) * zoom
    stretch, slope = jnp.exp(law.between(0, 1.8)), law.between(0, 1.6)
    fy, fx = jnp.fft.fftfreq(size)[:, None] * 64, jnp.fft.rfftfreq(size) * 64
    along = fx * jnp.cos(angle) + fy * jnp.sin(angle)
    across = (fy * jnp.cos(angle) - fx * jnp.sin(angle)) * stretch
    radius = jnp.sqrt(along**2 + across**2)
    response = jnp.exp(-0.5 * ((radius - peak) / width) ** 2) / (radius + 1) ** slope
    white = jax.random.normal(key, (count, size, size))
    planes = jnp.fft.irfft2(jnp.fft.rfft2(white) * response, (size, size))
    return planes / (jnp.sqrt(jnp.mean(planes**2)) + 1e-6)
