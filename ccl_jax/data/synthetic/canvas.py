"""What every product is painted with: coordinates, noise, colours, surfaces and the camera.

Scenes are painted on [-1, 1] x [-1, 1] at twice the resolution of the picture, so that a benchmark
of another size shows the same products.
"""

import dataclasses
import functools

import numpy as np

SUPERSAMPLING = 2
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601 weights


@dataclasses.dataclass(frozen=True)
class Grid:
    """Coordinates of the painted samples, and the side of one pixel of the finished picture."""

    x: np.ndarray
    y: np.ndarray
    pixel: float


@functools.lru_cache(maxsize=2)
def make_grid(image_size: int) -> Grid:
    """Sample coordinates in (-1, 1), x to the right and y down."""
    samples = image_size * SUPERSAMPLING
    line = (np.arange(samples, dtype=np.float32) + 0.5) * np.float32(2 / samples) - 1
    x, y = np.meshgrid(line, line)
    return Grid(x, y, 2 / image_size)


@dataclasses.dataclass(frozen=True)
class Flaw:
    """One kind of defect at a strength from 0 (subtle) to 1 (gross), with its own randomness."""

    kind: str
    strength: float
    rng: np.random.Generator

    def grade(self, subtle: float, gross: float) -> float:
        """The value for this flaw's strength, between those for a subtle and a gross one."""
        return subtle + (gross - subtle) * self.strength


def no_flaw() -> Flaw:
    """The flaw of a normal product: no painter knows its kind."""
    return Flaw("", 0.0, np.random.default_rng(0))


@dataclasses.dataclass
class Surface:
    """A painted scene: colour in [0, 1], height in scene units, and where the product is solid."""

    colour: np.ndarray
    height: np.ndarray
    solid: np.ndarray

    def tint(self, weight: np.ndarray, colour: np.ndarray) -> None:
        """Mixes a colour (one, or one per sample) in by weights in [0, 1]."""
        self.colour = mix(self.colour, colour, weight)


def mix(under: np.ndarray, over: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Colours [h, w, 3] between two colours (or colour planes), by weights [h, w]."""
    return under + (over - under) * weight[..., None]


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in [0, 1] of a hue in turns, a saturation and a value in [0, 1]."""
    ramp = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return np.float32(value) * (1 - np.float32(saturation) * (1 - ramp.clip(0, 1))).astype("f4")


def jittered_hsv(
    rng: np.random.Generator, hue: float, saturation: float, value: float, *, spread: float = 1.0
) -> np.ndarray:
    """A product's colour as it differs from sample to sample."""
    jitter = rng.uniform(-1, 1, 3) * spread
    return hsv(
        hue + 0.01 * jitter[0],
        float(np.clip(saturation * (1 + 0.1 * jitter[1]), 0, 1)),
        float(np.clip(value * (1 + 0.06 * jitter[2]), 0, 1)),
    )


def with_luminance(colour: np.ndarray, luminance: float) -> np.ndarray:
    """The colour scaled to a luminance in [0, 1]: a defect need not be darker or lighter."""
    return (colour * np.float32(luminance / max(float(colour @ _LUMINANCE), 1e-3))).clip(0, 1)


def luminance(colour: np.ndarray) -> np.ndarray:
    """Luminance in [0, 1] of colours in the last axis."""
    return np.asarray(colour @ _LUMINANCE)


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a direction, given as an angle in radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def step(value: np.ndarray, width: float) -> np.ndarray:
    """0 below -width/2, 1 above width/2, a smooth step between."""
    t = np.clip(value * np.float32(1 / width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def noise(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth value noise in [-1, 1] with one independent value per unit of u and v."""
    lattice = rng.uniform(-1, 1, (64, 64)).astype(np.float32).ravel()
    floor_u, floor_v = np.floor(u), np.floor(v)
    fu, fv = u - floor_u, v - floor_v
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    iu, iv = floor_u.astype(np.int32), floor_v.astype(np.int32)
    u0, u1 = (iu & 63) << 6, ((iu + 1) & 63) << 6
    v0, v1 = iv & 63, (iv + 1) & 63
    near = lattice[u0 | v0]
    near += (lattice[u0 | v1] - near) * fv
    far = lattice[u1 | v0]
    far += (lattice[u1 | v1] - far) * fv
    return near + (far - near) * fu


def fractal(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, octaves: int) -> np.ndarray:
    """Sum of noises in about [-1, 1], each twice as fine and about half as strong as the last."""
    total = noise(rng, u, v)
    for octave in range(1, octaves):
        total += noise(rng, u * 2**octave, v * 2**octave) * np.float32(0.55**octave)
    return total * np.float32(0.7)


def cells(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, *, jitter: float = 0.8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the nearest and second nearest of one scattered point per unit, and its number.

    The number, in 0..4095, stands for the cell: use it to look up a random property.
    """
    points = (0.5 + rng.uniform(-0.5, 0.5, (2, 4096)) * jitter).astype(np.float32)
    floor_u, floor_v = np.floor(u), np.floor(v)
    fu, fv = u - floor_u, v - floor_v
    iu, iv = floor_u.astype(np.int32), floor_v.astype(np.int32)
    nearest = np.full(u.shape, 9, np.float32)
    second = nearest.copy()
    number = np.zeros(u.shape, np.int32)
    for du in (-1, 0, 1):
        row = ((iu + du) & 63) << 6
        for dv in (-1, 0, 1):
            index = row | ((iv + dv) & 63)
            off_u = points[0][index] + du - fu
            off_v = points[1][index] + dv - fv
            distance = off_u * off_u + off_v * off_v
            closer = distance < nearest
            second = np.minimum(second, np.maximum(distance, nearest))
            nearest = np.minimum(nearest, distance)
            number = np.where(closer, index, number)
    return np.sqrt(nearest), np.sqrt(second), number


@dataclasses.dataclass(frozen=True)
class Camera:
    """One photograph's light and lens; the same for a product with and without its defect."""

    light: tuple[float, float]
    relief: float
    gain: np.ndarray
    ramp: tuple[float, float]
    vignette: float
    blur: float
    grain: float


def draw_camera(rng: np.random.Generator) -> Camera:
    """Light from roughly the upper left, uneven, of varying brightness and colour."""
    angle = rng.uniform(-0.25, 0.25) + 0.25 * np.pi
    direction, ramp = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.08)
    exposure, balance = rng.uniform(0.92, 1.08), rng.uniform(0.985, 1.015, 3)
    return Camera(
        light=(float(np.cos(angle)), float(np.sin(angle))),
        relief=rng.uniform(0.35, 0.55),
        gain=(exposure * balance).astype(np.float32),
        ramp=(float(ramp * np.cos(direction)), float(ramp * np.sin(direction))),
        vignette=rng.uniform(0, 0.06),
        blur=rng.uniform(0.3, 0.6),
        grain=rng.uniform(0.006, 0.012),
    )


def photograph(grid: Grid, surface: Surface, camera: Camera) -> np.ndarray:
    """The picture in [0, 1] before the sensor's noise, at the finished size."""
    from scipy import ndimage  # here: a start that generates nothing need not wait for it

    slope_y, slope_x = np.gradient(surface.height, np.float32(grid.pixel / SUPERSAMPLING))
    facing = slope_x * np.float32(camera.light[0]) + slope_y * np.float32(camera.light[1])
    shade = 1 + np.float32(camera.relief) * np.tanh(facing)
    shade *= 1 + np.float32(camera.ramp[0]) * grid.x + np.float32(camera.ramp[1]) * grid.y
    shade *= 1 - np.float32(camera.vignette) * (grid.x**2 + grid.y**2)
    lit = surface.colour * shade[..., None]
    size = lit.shape[0] // SUPERSAMPLING
    lit = lit.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))
    lit = ndimage.gaussian_filter(lit, (camera.blur, camera.blur, 0), truncate=3)
    lit *= camera.gain
    return 1 - np.exp(-lit * (1 + lit))  # a film's shoulder: highlights roll off, nothing clips


def develop(rng: np.random.Generator, picture: np.ndarray, camera: Camera) -> np.ndarray:
    """The picture as uint8, with the sensor's noise (stronger where it is brighter)."""
    sensor = rng.standard_normal(picture.shape, np.float32) * np.float32(camera.grain)
    noisy = picture + sensor * (0.5 + picture)
    return np.rint(noisy * 255).clip(0, 255).astype(np.uint8)
