"""The comparisons of speed, with PyTorch and of metrics with exact routines: what they do."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax import anomaly_map, settings
from ccl_jax.config import read_config_file
from ccl_jax.metrics import scores as measures
from tests.reference import speed_metrics, speed_ours, speed_protocol, speed_torch
from tests.reference.speed_batches import make_batches, normalised
from tests.reference.speed_torch import FORMS, OURS, WHOLE, Row, Way
from tests.reference.views import PUBLISHED

ROOT = Path(__file__).parent.parent
ECHO = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.reference.speed_protocol import serve

options = json.loads(sys.argv[1])

def sleep(steps):
    print("noise between the answers")
    os.system("echo and of a compiler")
    time.sleep(0.02 * steps)
    return {{"terms": {{"loss": options["loss"]}}}}

def fail(steps):
    raise OSError("no compiler\\nat all")

def die(steps):
    sys.exit(3)

serve({{"platform": "cpu"}}, {{"sleep": sleep, "fail": fail, "die": die}})
"""


# --- the protocol ---


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """A worker that computes nothing."""
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.setattr(speed_protocol, "ROOT", tmp_path)
    with speed_protocol.Worker("echo", {"loss": 0.5}) as worker:
        yield worker


def test_a_worker_answers_whatever_its_libraries_print_and_outlives_a_job_that_fails(echo):
    assert echo.hello == {"platform": "cpu"}
    assert echo.ask("fail", 1) == {"error": "OSError: no compiler at all"}
    answer = echo.ask("sleep", 2)
    assert answer["terms"] == {"loss": 0.5}
    assert answer["seconds"] >= 0.02 and 0 <= answer["cpu_seconds"] < 0.5


def test_a_worker_that_ends_is_named_with_its_status(echo):
    with pytest.raises(RuntimeError, match="echo ended with status 3 and without an answer"):
        echo.ask("die", 1)


# --- the comparison ---


class Script:
    """A worker that answers from a script: seconds, or why it failed, by job."""

    def __init__(self, **jobs):
        self.jobs = {name.replace("_", ": "): said for name, said in jobs.items()}
        self.asked = []

    def ask(self, job, steps):
        self.asked.append((job, steps))
        said = self.jobs[job]
        if isinstance(said, str):
            return {"error": said}
        return {"seconds": said, "cpu_seconds": 2 * said, "terms": {"loss": said}}


WAY = Way(FORMS["tuned"], "a.module", {"images": 8})


def test_the_quickest_variant_that_works_is_measured_and_the_others_failures_are_kept():
    worker = Script(compiled_training="no compiler", plain_training=0.2, bfloat16_training=0.1)
    row = speed_torch.started(worker, WAY, "training", ["compiled", "plain", "bfloat16"])
    assert (row.variant, row.steps) == ("bfloat16", 10)
    assert row.failed == {"compiled": "no compiler"}
    speed_torch.measure(worker, row)
    assert worker.asked[-1] == ("bfloat16: training", 10)
    assert (row.seconds, row.cpu_seconds) == ([0.1], [0.2])
    assert speed_torch.failures([row]) == [
        "PyTorch tuned, compiled, training, 8 images: failed, no compiler"
    ]


def test_only_the_quicker_dtype_is_compiled():
    worker = Script()
    worker.jobs = {
        "float32, eager: training": 0.4,
        "bfloat16, eager: training": 0.2,
        "bfloat16, compiled: training": 0.1,
    }
    variants = [f"{t}, {how}" for how in ("eager", "compiled") for t in ("float32", "bfloat16")]
    assert speed_torch.started(worker, WAY, "training", variants).variant == "bfloat16, compiled"
    assert "float32, compiled: training" not in [job for job, _ in worker.asked]


def test_where_no_variant_works_the_row_says_so_and_nothing_is_measured():
    worker = Script(plain_training="out of memory")
    row = speed_torch.started(worker, WAY, "training", ["plain"])
    speed_torch.measure(worker, row)
    assert row.seconds == [] and math.isnan(row.step)
    assert "| training | 8 | PyTorch tuned | none works | nan | nan |" in speed_torch.table([row])


def test_a_variant_that_fails_later_stops_the_comparison():
    worker = Script(plain_training=0.5)
    row = speed_torch.started(worker, WAY, "training", ["plain"])
    worker.jobs["plain: training"] = "out of memory"
    with pytest.raises(RuntimeError, match="PyTorch tuned, training, plain: out of memory"):
        speed_torch.measure(worker, row)


@pytest.mark.parametrize(("seconds", "steps"), [(30.0, 1), (0.4, 2), (0.1, 10), (1e-6, 100)])
def test_a_measurement_takes_about_a_second(seconds, steps):
    assert speed_torch.steps_for(seconds) == steps


def row(way, task, seconds, *, images=8, variant="float32", **terms):
    return Row(
        way,
        task,
        images,
        variant,
        job="any",
        first_seconds=9.0,
        seconds=seconds,
        cpu_seconds=seconds,
        terms=terms,
    )


def test_ratios_are_of_medians_and_the_whole_step_is_held_against_training():
    rows = [
        row(FORMS["eager"], "training", [0.4, 0.5, 9.0]),
        row(FORMS["tuned"], "training", [0.25], variant="bfloat16, compiled"),
        row(OURS, "training", [0.1, 0.3, 0.2]),
        row(OURS, WHOLE, [0.25]),
        row(OURS, "training", [0.1], images=2),
    ]
    assert speed_torch.table(rows).splitlines()[2:] == [
        "| training | 8 | PyTorch as published | float32 | 500 | 16 | 1.00 | 0.50 | 9.0 |",
        "| training | 8 | PyTorch tuned | bfloat16, compiled | 250 | 32 | 2.00 | 1.00 | 9.0 |",
        "| training | 8 | this package | float32 | 200 | 40 | 2.50 | 1.25 | 9.0 |",
        "| whole step | 8 | this package | float32 | 250 | 32 | 2.00 | 1.00 | 9.0 |",
        "| training | 2 | this package | float32 | 100 | 20 | - | - | 9.0 |",
    ]


def test_other_work_is_not_compared():
    first = row(FORMS["eager"], "training", [1.0], local=2.0, cosine=1.0)
    score = row(FORMS["eager"], "inference", [1.0], score=0.5)
    same = row(OURS, "training", [1.0], local=2.001, cosine=1.0)
    rounded = row(OURS, "training", [1.0], local=2.2, cosine=1.0, variant="bfloat16")
    speed_torch.refuse_other_work([first, score, same, rounded])
    other = row(OURS, "training", [1.0], local=2.2, cosine=1.0)
    with pytest.raises(RuntimeError, match="do not compute the same in training"):
        speed_torch.refuse_other_work([first, score, other])


def test_an_unknown_form_is_named(capsys):
    with pytest.raises(SystemExit):
        speed_torch.parsed(["--forms", "eager,quick"])
    assert "--forms quick: use some of eager,tuned" in capsys.readouterr().err


# --- what is compared ---


def test_our_side_imports_nothing_that_gpu_images_lack():
    program = """
import importlib.abc, sys
LACKING = {"grain", "ml_collections", "tensorflow_datasets", "array_record"}
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in LACKING:
            raise ImportError(f"{name} is lacking")
sys.meta_path.insert(0, Blocker())
import tests.reference.speed_torch, tests.reference.speed_ours
assert not LACKING & set(sys.modules)
try:
    import grain
except ImportError:
    print("blocked")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "blocked\n", done.stderr


def test_the_settings_are_those_of_the_default_config():
    config = read_config_file(ROOT / "configs/default.py")
    assert settings.loss_settings(config) == speed_ours.published_losses("float32")
    assert config.model.noise_probability == speed_ours.NOISE_PROBABILITY
    assert config.augment.to_dict() == vars(PUBLISHED)
    params = {part: {"w": np.full(3, 2.0, np.float32)} for part in ("projector", "neck", "decoder")}
    theirs, ours = (
        optimizer.update(params, optimizer.init(params), params)[0]
        for optimizer in (settings.optimizer_of(config, 100), speed_ours.optimizer())
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, theirs, ours))


def test_every_image_of_a_batch_has_a_negative_of_another_class():
    first, second = make_batches(2, 3, 64)
    assert first.clean.shape == (3, 64, 64, 3) and not np.array_equal(first.clean, second.clean)
    assert not np.array_equal(first.clean, first.augmented)
    assert (first.labels[first.negatives] != first.labels).all()
    assert np.abs(normalised(first.clean).mean()) < 1 and normalised(first.clean).std() > 0.3
    with pytest.raises(ValueError, match="use at least 2"):
        make_batches(1, 1, 64)


# --- PyTorch's side ---


@pytest.fixture(scope="module")
def torch_side():
    """PyTorch, the twin's losses, and their quicker form."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[reference]'")
    names = ("twin_losses", "twin_fast", "twin_step")
    return torch, *(importlib.import_module(f"tests.reference.{name}") for name in names)


def test_the_quicker_losses_and_their_gradients_are_the_twins(torch_side):
    torch, plain, fast, _ = torch_side
    rng = np.random.default_rng(1)
    labels = torch.tensor([0, 1, 2, 0, 1])
    negatives = torch.tensor([[1, 0, 0, 4, 3], [2, 2, 1, 1, 0]])
    shapes = [(5, 7, 6, 6), (5, 9, 3, 3)]
    maps = [[torch.tensor(rng.normal(size=s)).requires_grad_() for s in shapes] for _ in range(4)]
    codes = [torch.tensor(rng.normal(size=(5, 8))).requires_grad_() for _ in range(2)]
    pairs = (
        (
            plain.local_contrastive(*maps, labels, negatives, temperature=0.05),
            fast.local_contrastive(*maps, negatives, temperature=0.05),
            [*maps[2], *maps[3]],
        ),
        (
            plain.global_two_view(*codes, labels, temperature=0.05),
            fast.global_two_view(*codes, labels, temperature=0.05),
            codes,
        ),
    )
    for want, got, inputs in pairs:
        assert got.item() == pytest.approx(want.item(), rel=1e-12)
        gradients = zip(
            torch.autograd.grad(want, inputs), torch.autograd.grad(got, inputs), strict=True
        )
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in gradients)


def test_the_twins_score_maps_are_ours(torch_side):
    torch, _, fast, _ = torch_side
    rng = np.random.default_rng(2)
    targets, rebuilt = (
        [rng.normal(size=(2, side, side, c)).astype(np.float32) for side, c in ((8, 5), (4, 7))]
        for _ in range(2)
    )
    arrays = ([jnp.asarray(x) for x in side] for side in (targets, rebuilt))
    ours = anomaly_map.score_map(*arrays, size=32, sigma=0.0, combine="add", distance="cosine")
    theirs = fast.summed_distances(
        *([torch.tensor(x.transpose(0, 3, 1, 2)) for x in side] for side in (targets, rebuilt)),
        (32, 32),
    )
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-6)


@pytest.mark.slow
def test_both_sides_are_timed_on_the_same_work(torch_side, tmp_path):
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    words = ["--encoder", "resnet10", "--image-size", "64", "--batches", "2", "--repeats", "1"]
    words.append("--parts")
    text = speed_torch.main([*words, "--json", str(found), "--page", str(page)])
    rows = json.loads(found.read_text())["rows"]
    measured = {(row["way"], row["task"]) for row in rows if row["seconds"][0] > 0}
    tasks = {*speed_torch.TASKS, *speed_torch.PARTS}
    ways = {OURS, *FORMS.values()}
    assert measured == {(way, task) for way in ways for task in tasks} | {(OURS, WHOLE)}
    assert not any(row["failed"] for row in rows)
    assert text.strip() in page.read_text()
    assert "python -m tests.reference.speed_torch --encoder resnet10 --image-size 64" in text


def test_parts_of_the_twin_are_timed_in_training_though_scoring_came_between(torch_side, tmp_path):
    theirs = importlib.import_module("tests.reference.speed_theirs")
    sizes = {"images": 2, "different": 1, "image_size": 32}
    weights = tmp_path / "weights.npz"
    twin = theirs.randomise(theirs.Twin("resnet10"), seed=0)
    np.savez(weights, **theirs.to_numpy(twin))
    timed = theirs.Timed(sizes | {"encoder": "resnet10", "weights": str(weights)}, tuned=False)
    part = timed.part(theirs.Variant(), "projector, neck, decoder")
    timed.infer(theirs.Variant())(1)
    before = timed.model.net_s.state_dict()
    before = {name: value.clone() for name, value in before.items() if "running_mean" in name}
    part(1)
    after = timed.model.net_s.state_dict()
    assert before and all(not theirs.torch.equal(value, after[n]) for n, value in before.items())


# --- metrics ---


def test_class_sizes_are_uneven_and_add_up():
    sizes = speed_metrics.class_sizes(1725, 15)
    assert sum(sizes) == 1725 and len(sizes) == 15 and sizes == sorted(sizes)
    assert 2.5 < sizes[-1] / sizes[0] < 3.5
    with pytest.raises(ValueError, match="5 images are too few for 2 classes; use 8"):
        speed_metrics.class_sizes(5, 2)


def test_the_loop_over_thresholds_nears_the_exact_aupro():
    images = speed_metrics.make_class(0, 8, 64)
    assert images.anomalous.tolist() == [bool(i % 4) for i in range(8)]
    assert (images.masks.any((1, 2)) == images.anomalous).all()
    exact = measures.aupro(images.maps, images.masks, fpr_limit=0.3)
    errors = [
        abs(speed_metrics.loop_aupro(images.maps, images.masks, n) - exact) for n in (20, 200)
    ]
    assert errors[1] < 2e-4 < errors[0] < 1e-2


def test_a_difference_is_not_lost_where_one_side_has_no_value():
    assert speed_metrics.difference(None, None) == 0
    assert speed_metrics.difference(0.5, 0.25) == 0.25
    assert math.isnan(speed_metrics.difference(0.5, None))


@pytest.mark.slow
def test_streaming_metrics_are_the_exact_ones_and_the_page_says_what_they_took(tmp_path):
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    words = ["--images", "24", "--exact", "12", "--classes", "3", "--size", "64"]
    text = speed_metrics.main([*words, "--json", str(found), "--page", str(page)])
    said = json.loads(found.read_text())
    assert {name: each["images"] for name, each in said.items() if name != "command"} == {
        speed_metrics.ALL: 24,
        speed_metrics.SAME: 12,
        speed_metrics.EXACT: 12,
    }
    ours, exact = said[speed_metrics.SAME]["values"], said[speed_metrics.EXACT]["values"]
    worst = speed_metrics.largest_differences(ours, exact)
    assert worst.keys() == set(measures.METRICS) and max(worst.values()) < 2e-3
    assert text.strip() in page.read_text() and "| streaming counts, all | 24 |" in text
