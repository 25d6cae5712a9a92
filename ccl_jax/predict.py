"""The trained detector as an object: images in, scores and score maps out.

from ccl_jax.predict import load_detector
detector = load_detector("runs/demo")
prediction = detector.predict(["a.png", "b.png"])
prediction.scores      # higher is more anomalous
prediction.maps        # the same per pixel
"""

import csv
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ccl_jax import mesh
from ccl_jax.data.layouts import plain_images
from ccl_jax.data.records import as_rgb, read_image
from ccl_jax.scoring import (
    Scorer,
    architecture_of,
    load_scorer,
    map_settings_of,
    read_config,
)

Picture = str | Path | np.ndarray | Image.Image


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Scores of n images, in the order given; higher is more anomalous."""

    scores: np.ndarray  # float32 [n]: the maximum of each (pooled) map
    maps: np.ndarray  # float32 [n, size, size]: cosine distances, 0 where perfectly rebuilt


class Detector:
    """A trained detector. Make one with `load_detector`."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def __repr__(self) -> str:
        return f"Detector(step={self.step}, size={self.size})"

    @property
    def size(self) -> int:
        """Side in pixels of the square that images are resized to, and of the score maps."""
        return self._scorer.settings.size

    @property
    def step(self) -> int:
        """The training step of the checkpoint in use."""
        return self._scorer.step

    def predict(self, images: Picture | Sequence[Picture], *, batch_size: int = 8) -> Prediction:
        """Scores one image or many, of any size; they are resized as in training.

        An image is a path, a PIL image, or a uint8 array [h, w, 3] or [h, w] (grayscale); an array
        [n, h, w, 3] holds n images. Raises ValueError for another kind of array, and for a file
        that is no readable image, naming it.
        """
        pictures = as_list(images)
        devices = self._scorer.mesh.size
        batch_size = min(batch_size, max(len(pictures), 1))
        batch_size = -(-batch_size // devices) * devices
        scores, maps = [], []
        for first in range(0, len(pictures), batch_size):
            some = pictures[first : first + batch_size]
            batch = np.zeros((batch_size, self.size, self.size, 3), np.uint8)
            for row, picture in enumerate(some):
                batch[row] = as_pixels(picture, self.size)
            found = self._scorer(mesh.put_batch({"image": batch}, self._scorer.mesh)["image"])
            found = jax.device_get(found._replace(codes=None))
            scores.append(found.images[: len(some)])
            maps.append(found.maps[: len(some)])
        if not pictures:
            return Prediction(
                np.zeros(0, np.float32), np.zeros((0, self.size, self.size), np.float32)
            )
        return Prediction(np.concatenate(scores), np.concatenate(maps))


def as_list(images: Picture | Sequence[Picture]) -> list[Picture]:
    """One image or many, as a list."""
    if isinstance(images, str | Path | Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    return list(images)


def as_pixels(picture: Picture, size: int) -> np.ndarray:
    """The picture as uint8 [size, size, 3], converted and resized as `read_image` says.

    Raises ValueError for a file that is no readable image, and for an array that is none.
    """
    if isinstance(picture, str | Path):
        return read_image(Path(picture), size)
    if isinstance(picture, Image.Image):
        return as_rgb(picture, size)
    array = np.asarray(picture)
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image; pass uint8 "
            f"[h, w, 3] in RGB order or [h, w], e.g. (255 * x).astype(np.uint8) for x in 0..1."
        )
    return as_rgb(Image.fromarray(array), size)


def load_detector(workdir: str | Path, *, step: int = -1, devices: int = 1) -> Detector:
    """Loads a trained detector from its workdir alone; `step` -1 takes the newest checkpoint.

    Raises ValueError, naming file and reason, where the workdir is none, lacks a checkpoint, or
    holds one that does not fit. `devices` 0 uses all of them.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    return Detector(scorer_of(workdir, config, step=step, devices=devices))


def scorer_of(workdir: Path, config: dict[str, Any], *, step: int, devices: int) -> Scorer:
    """The scorer that a resolved config, as plain dicts, describes."""
    return load_scorer(
        workdir,
        architecture=architecture_of(config),
        settings=map_settings_of(config),
        step=step,
        devices=devices,
    )


def predict_files(
    detector: Detector, source: Path, output: Path, *, batch_size: int
) -> tuple[Path, int]:
    """Scores an image file or a folder of them; writes scores.csv and an overlay per image.

    Overlays share one colour scale, from 0 to the highest value of all score maps. An unreadable
    file among others gets a row without a score and with the reason. Overlays have the size of
    the score maps. Returns the CSV's path and how many files could not be read.
    Raises ValueError where there is no image, or none that can be read.
    """
    from ccl_jax import figures  # matplotlib, which whoever wants only scores need not wait for

    paths = plain_images(source)
    root = source if source.is_dir() else source.parent
    names = [str(path.relative_to(root)) for path in paths]
    overlays = [f"overlays/{name}.png" for name in names]
    scores = np.full(len(paths), np.nan)
    errors: dict[int, str] = {}
    with tempfile.TemporaryFile() as scratch:  # the colour scale is known only after the last image
        maps = np.memmap(scratch, np.float32, shape=(len(paths), detector.size, detector.size))
        for first in range(0, len(paths), batch_size):
            chunk = range(first, min(first + batch_size, len(paths)))
            readable, images = read_some(paths, chunk, detector.size, errors)
            if readable:
                found = detector.predict(images, batch_size=batch_size)
                scores[readable], maps[readable] = found.scores, found.maps
        if len(errors) == len(paths):
            raise ValueError(f"none of the {len(paths)} files can be read; first: {errors[0]}")
        highest = float(maps.max())
        for i in sorted(set(range(len(paths))) - errors.keys()):
            file = output / overlays[i]
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = figures.overlay(
                read_image(paths[i], detector.size), np.asarray(maps[i]), 0.0, highest
            )
            Image.fromarray(picture).save(file)
        del maps
    table = output / "scores.csv"
    with table.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "score", "overlay", "error"])
        for i, name in enumerate(names):
            done = i not in errors
            score, overlay = (f"{scores[i]:.8g}", overlays[i]) if done else ("", "")
            writer.writerow([name, score, overlay, errors.get(i, "")])
    return table, len(errors)


def read_some(
    paths: list[Path], chunk: range, size: int, errors: dict[int, str]
) -> tuple[list[int], list[np.ndarray]]:
    """Returns (indices, images) of a chunk, and notes unreadable files in `errors`."""
    readable, images = [], []
    for i in chunk:
        try:
            images.append(read_image(paths[i], size))
            readable.append(i)
        except ValueError as error:
            errors[i] = str(error)
    return readable, images
