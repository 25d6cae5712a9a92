"""Files look down only, and each fast-moving library has one door (DESIGN section 6)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Layer of each module of ccl_jax, or of each of its packages.
LAYERS = {
    "atomic": -1,  # for all
    **dict.fromkeys(("collectives", "matching", "augment", "anomaly_map", "figures"), 0),
    **dict.fromkeys(("throughput", "progress", "whereabouts", "ending"), 0),
    **dict.fromkeys(("data", "metrics", "models"), 0),  # each may import itself
    **dict.fromkeys(("mesh", "checksums", "retention", "determinism", "compiled"), 0),
    **dict.fromkeys(("state", "checkpoint", "run_log", "workdir", "report"), 1),
    **dict.fromkeys(("losses", "provenance", "signals", "watch"), 1),
    **dict.fromkeys(("pseudo_labels", "evaluation_log"), 1),
    **dict.fromkeys(("scoring", "ahead", "objective"), 2),  # what evaluate, predict and train share
    "loop": 2,
    **dict.fromkeys(("train", "evaluate", "predict", "follow"), 3),
    **dict.fromkeys(("baseline", "compare", "pretraining"), 3),
    "benchmark": 3.5,  # times what a training does
    **dict.fromkeys(
        ("main", "config", "validation", "validation_pretraining", "problems", "settings"), 4
    ),
    **dict.fromkeys(("settle", "setup", "jobs", "data_jobs", "exchange", "datasets", "prepare"), 4),
    **dict.fromkeys(("notices", "validation_run"), 4),
    "benchmark_job": 4,
}
DOOR = 4

# Library: the only files that may import it.
ONLY_IN = {
    "orbax": ("ccl_jax/checkpoint.py",),
    "tensorstore": ("ccl_jax/checkpoint.py",),
    "grain": ("ccl_jax/data/pipeline.py",),
    "tensorflow_datasets": ("ccl_jax/data/builders.py",),
    "array_record": ("ccl_jax/data/manifest.py", "ccl_jax/data/shards.py"),
    "google.protobuf": ("ccl_jax/data/examples.py",),
    "fsspec": ("ccl_jax/data/remote.py",),
    "ml_collections": ("ccl_jax/config.py", "ccl_jax/main.py", "configs/*"),
    "jax.distributed": ("ccl_jax/mesh.py",),
    "tensorflow": (),
    "torch": (),
    "timm": (),
}
# Folder: what its files must not import, because worker processes start without it.
NEVER_IN = {"ccl_jax/data": ("jax", "flax", "optax", "orbax")}


def imported(path: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything that a file imports, also within functions."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"  # jax.distributed needs no import of its own


def is_within(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def library_violations(path: str, names: set[str]) -> Iterator[str]:
    for library, files in ONLY_IN.items():
        allowed = any(Path(path).match(pattern) for pattern in files)
        if not allowed and any(is_within(name, library) for name in names):
            yield f"{path} uses {library}; only {', '.join(files) or 'nobody'} may"
    for folder, libraries in NEVER_IN.items():
        for library in libraries:
            if path.startswith(folder + "/") and any(is_within(name, library) for name in names):
                yield f"{path} uses {library}; nothing in {folder} may"


def layer_violations(path: str, names: set[str]) -> Iterator[str]:
    own = path.removesuffix(".py").split("/")[1]
    if own == "__init__":
        own = "ccl_jax itself"  # imported by all, so it may import nobody
    elif own not in LAYERS:
        yield f"{path} is in no layer; add {own} to LAYERS and to DESIGN section 6"
        return
    mine = LAYERS.get(own, -1)
    for name in sorted(names):
        parts = name.split(".")
        if parts[0] != "ccl_jax" or len(parts) == 1 or parts[1] == own:
            continue
        other = LAYERS.get(parts[1])
        if other is None:
            yield f"{path} imports {name}, which is in no layer"
        elif other >= mine and mine != DOOR:
            yield f"{path} (layer {mine}) imports {parts[1]} (layer {other})"


def violations(path: str, source: str) -> list[str]:
    """What a file imports against the rules; `path` is relative to the root, with slashes."""
    names = set(imported(path, ast.parse(source)))
    found = list(library_violations(path, names))
    if path.startswith("ccl_jax/"):
        found += layer_violations(path, names)
    return found


def sources() -> list[Path]:
    return [path for folder in ("ccl_jax", "configs") for path in (ROOT / folder).rglob("*.py")]


def test_every_file_keeps_to_its_layer_and_libraries():
    assert len(sources()) > 10
    found = [
        violation
        for path in sources()
        for violation in violations(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert found == []


BAD = {
    "a lower file imports a higher one": ("ccl_jax/losses.py", "from ccl_jax import state"),
    "in a function": ("ccl_jax/augment.py", "def f():\n    import ccl_jax.models.resnet"),
    "relative": ("ccl_jax/models/network.py", "from ..data import records"),
    "relative, own name": ("ccl_jax/augment.py", "from . import state"),
    "neighbours": ("ccl_jax/train.py", "from ccl_jax.evaluate import evaluate"),
    "state files": ("ccl_jax/state.py", "import ccl_jax.run_log"),
    "metrics and data": ("ccl_jax/metrics/scores.py", "from ccl_jax.data.records import Record"),
    "package init": ("ccl_jax/__init__.py", "from ccl_jax.predict import load_detector"),
    "unknown file": ("ccl_jax/helpers.py", "x = 1"),
    "unknown import": ("ccl_jax/train.py", "from ccl_jax.helpers import x"),
    "orbax": ("ccl_jax/train.py", "from orbax.checkpoint import v1 as ocp"),
    "grain": ("ccl_jax/train.py", "import grain"),
    "tfds": ("ccl_jax/data/layouts/visa.py", "import tensorflow_datasets as tfds"),
    "ml_collections": ("ccl_jax/train.py", "from ml_collections import config_dict"),
    "jax in data": ("ccl_jax/data/records.py", "import jax.numpy as jnp"),
    "flax in data": ("ccl_jax/data/pipeline.py", "from flax import nnx"),
    "jax.distributed": ("ccl_jax/train.py", "import jax\njax.distributed.shutdown()"),
    "from jax": ("ccl_jax/main.py", "from jax import distributed"),
    "torch": ("ccl_jax/models/pretrained.py", "import torch"),
}


@pytest.mark.parametrize("case", BAD)
def test_file_against_the_rules_is_found(case):
    path, source = BAD[case]
    assert len(violations(path, source)) == 1


GOOD = {
    "checkpoint": ("ccl_jax/checkpoint.py", "from orbax.checkpoint import v1"),
    "pipeline": (
        "ccl_jax/data/pipeline.py",
        "import grain\nfrom ccl_jax.data.records import Record",
    ),
    "mesh": ("ccl_jax/mesh.py", "import jax\njax.distributed.initialize()"),
    "train": ("ccl_jax/train.py", "import jax\nfrom ccl_jax import losses, state\nx = jax.numpy"),
    "door": ("ccl_jax/main.py", "from ccl_jax import config, train, evaluate"),
    "config": ("configs/demo.py", "from ml_collections import config_dict"),
    "like a library": ("ccl_jax/losses.py", "import grained, torchless"),
    "own package": ("ccl_jax/models/network.py", "from . import resnet"),
}


@pytest.mark.parametrize("case", GOOD)
def test_file_within_the_rules_passes(case):
    path, source = GOOD[case]
    assert violations(path, source) == []
