"""Four fake devices for every test, absl flags parsed so that grain workers start, tiny data."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Tests run few steps of much that they compile; without XLA's optimisation that takes half as long.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_num_cpu_devices", 4)

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    help = "folder of recorded numbers to compare with, instead of tests/golden"
    parser.addoption("--golden", metavar="FOLDER", help=help)


def pytest_configure(config):
    from absl import flags

    golden = config.getoption("golden")
    if golden:
        if not Path(golden, "index.json").is_file():
            raise pytest.UsageError(f"--golden={golden} holds no index.json, so no recordings")
        os.environ["CCL_JAX_GOLDEN"] = golden
    flags.FLAGS.mark_as_parsed()
    # A shell starts what it puts into the background with SIGINT ignored, which children inherit,
    # and then no script of theirs can hear it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A training step compiles for 20 seconds; tests that need the same one compile it once.
    cache = getattr(config, "cache", None)  # absent under -p no:cacheprovider
    if cache is not None:
        folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        jax.config.update("jax_compilation_cache_dir", folder)  # and that of processes they start
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def write_photos(root, *, classes=("bolt", "felt"), train=4, test=2, masks=True, size=(70, 50)):
    """A folder in the MVTec AD layout: stripes of another width per class, a square as defect."""
    rng = np.random.default_rng(0)

    def picture(number, defect=False):
        x = np.arange(size[0])[None, :, None] * np.ones((size[1], 1, 3))
        pixels = 120 + 60 * np.sin(x / (2 + 3 * number)) + rng.normal(0, 8, x.shape)
        if defect:
            pixels[10:30, 20:40] = rng.uniform(0, 255, 3)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def save(image, *parts):
        path = Path(root).joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    for number, name in enumerate(classes):
        for i in range(train):
            save(picture(number), name, "train", "good", f"{i:03}.png")
        for i in range(test):
            save(picture(number), name, "test", "good", f"{i:03}.png")
            save(picture(number, defect=True), name, "test", "square", f"{i:03}.png")
            if masks:
                mask = np.zeros((size[1], size[0]), np.uint8)
                mask[10:30, 20:40] = 255
                save(Image.fromarray(mask), name, "ground_truth", "square", f"{i:03}_mask.png")
    return Path(root)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two classes, four training images each, with masks."""
    return write_photos(tmp_path_factory.mktemp("photos"))


def make_tiny_config(photos):
    """The smallest training that uses everything: ResNet-10, 64 pixels, four images a step."""
    from ccl_jax import config as configs  # needs ml_collections, which GPU images often lack

    config = configs.read_config_file(ROOT / "configs/folder.py")
    config.name = "tiny"
    config.data.root = str(photos)
    config.data.name = "tiny"
    config.data.image_size = 64
    config.encoder.weights = "random"
    config.model.encoder = "resnet10"
    config.model.projector = "depthwise"
    config.train.batch_size = 4
    config.train.steps = 4
    config.train.log_every = 2
    config.train.checkpoint_every = 2
    config.eval.batch_size = 4
    config.eval.every_steps = 2
    config.eval.figures_per_class = 1
    config.run.devices = 1
    config.run.tensorboard = False
    config.run.progress = False
    config.run.compilation_cache = ""  # but the tests' own, see above
    return config


@pytest.fixture
def tiny_config(photos):
    """A tiny config of one's own, to change."""
    return make_tiny_config(photos)


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """A workdir after four steps and an evaluation; tests must leave it as it is."""
    from ccl_jax import jobs

    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert jobs.train_job(make_tiny_config(photos), workdir) == 0
    return workdir
