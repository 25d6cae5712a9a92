"""Measured speed: what is timed, what is counted, and what the tables say of it."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_main import assert_fails, command

from ccl_jax import benchmark_job, mesh, settings
from ccl_jax import config as configs
from ccl_jax.augment import Recipe
from ccl_jax.benchmark import profile, published, step, table
from ccl_jax.benchmark.memory import Memory, memory_of, peak_memory
from ccl_jax.benchmark.metric_time import time_metrics
from ccl_jax.benchmark.reading import Source
from ccl_jax.benchmark.timing import Times, time_calls
from ccl_jax.benchmark.training import DIFFERENT, Training, random_batches
from ccl_jax.data import layouts
from ccl_jax.main import main
from ccl_jax.scoring import map_settings_of

ROOT = Path(__file__).parent.parent


class Work:
    """Calls that take seconds of a clock of their own, by number, and when each was made."""

    def __init__(self, seconds):
        self.seconds, self.now, self.log = seconds, 0.0, []

    def clock(self):
        return self.now

    def __call__(self, number):
        self.log.append(("called", number))
        work = self

        class Result:  # what jax.block_until_ready waits for
            def block_until_ready(self):
                work.now += work.seconds[number]
                work.log.append(("ended", number))

        return Result()


@pytest.mark.parametrize("ahead", [False, True])
def test_each_call_after_the_warm_up_is_timed_to_its_end(ahead):
    work = Work([100.0, 50.0, 1.0, 3.0, 2.0])
    times = time_calls(work, warm_up=2, repeats=3, ahead=ahead, clock=work.clock)
    assert times.seconds == (1.0, 3.0, 2.0)
    assert [number for what, number in work.log if what == "called"] == [0, 1, 2, 3, 4]


def test_next_call_is_made_before_the_last_has_ended_only_where_asked():
    work = Work([1.0] * 4)
    time_calls(work, warm_up=1, repeats=3, ahead=True, clock=work.clock)
    assert work.log[2:6] == [("called", 1), ("called", 2), ("ended", 1), ("called", 3)]
    work = Work([1.0] * 4)
    time_calls(work, warm_up=1, repeats=3, ahead=False, clock=work.clock)
    assert work.log[2:6] == [("called", 1), ("ended", 1), ("called", 2), ("ended", 2)]


def test_median_and_95th_percentile_of_times_worked_by_hand():
    times = Times(tuple(float(second) for second in [5, 1, 2, 4, 3]))
    assert (times.median, times.total) == (3.0, 15.0)
    assert times.p95 == pytest.approx(4.8)  # 95 % of the way over four gaps: 3.8 gaps from 1


class Analysis:
    argument_size_in_bytes, output_size_in_bytes = 100, 60
    temp_size_in_bytes, alias_size_in_bytes = 30, 40


def test_memory_is_what_the_device_reports_or_what_the_program_plans():
    reported = memory_of({"peak_bytes_in_use": 7}, Analysis())
    assert reported.bytes == 7 and "reported by the device" in reported.source
    for nothing in (None, {}):
        planned = memory_of(nothing, Analysis())
        assert planned.bytes == 100 + 60 + 30 - 40 and "planned" in planned.source
    assert memory_of(None, None) is None
    assert table.memory_row(None).value == "unknown"


def test_memory_of_a_donated_argument_counts_once():
    values = jnp.zeros(1024, jnp.float32)
    compiled = jax.jit(lambda a: a + 1, donate_argnums=0).lower(values).compile()
    device = jax.devices()[0]
    assert peak_memory(device, compiled).bytes < 2 * values.nbytes
    kept = jax.jit(lambda a: a + 1).lower(values).compile()
    assert peak_memory(device, kept).bytes >= 2 * values.nbytes


def span(name, ts, dur, pid=1, tid=1, **arguments):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": pid, "tid": tid} | (
        {"args": arguments} if arguments else {}
    )


def test_kernels_of_a_cpu_are_operations_less_what_they_call():
    events = [
        span("while", 0.0, 100.0, hlo_op="while"),
        span("dot", 10.0, 30.0, hlo_op="dot"),
        span("dot", 50.0, 30.0, hlo_op="dot"),
        span("tanh", 100.0, 5.0, hlo_op="tanh"),
        span("python", 0.0, 900.0),
    ]
    found = profile.kernels_of(events)
    assert [(k.name, k.calls) for k in found] == [("dot", 2), ("while", 1), ("tanh", 1)]
    np.testing.assert_allclose([k.seconds for k in found], [60e-6, 40e-6, 5e-6])


def test_kernels_of_a_gpu_are_those_in_its_streams():
    def meta(what, name, **where):
        return {"ph": "M", "name": what, "args": {"name": name}, "pid": 3, **where}

    events = [
        meta("process_name", "/device:GPU:0"),
        meta("thread_name", "Stream #13(Compute)", tid=13),
        meta("thread_name", "XLA Modules", tid=99),
        span("sgemm", 0.0, 8.0, pid=3, tid=13),
        span("jit_step", 0.0, 50.0, pid=3, tid=99),
        span("host op", 0.0, 70.0, hlo_op="dot"),
    ]
    (kernel,) = profile.kernels_of(events)
    assert kernel.name == "sgemm" and kernel.seconds == pytest.approx(8e-6)
    lines = profile.markdown_table([kernel], repeats=2).splitlines()
    assert lines[-1] == "| `sgemm` | 0.004 | 0.5 | 100.0% |"


def test_recorded_trace_names_the_operations_of_the_program(tmp_path):
    program = jax.jit(lambda a: jnp.tanh(a @ a))
    values = [jnp.full((64, 64), number, jnp.float32) for number in range(3)]
    program(values[0]).block_until_ready()
    kernels = profile.record(tmp_path, lambda number: program(values[number]), repeats=3)
    assert {kernel.calls for kernel in kernels} == {3}  # of a program of a few operations
    assert len(kernels) <= 3
    (written,) = tmp_path.rglob("*.trace.json.gz")
    assert json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]


def test_trace_without_kernels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no kernel"):
        profile.record(tmp_path, lambda number: number, repeats=1)


def rows_of(peak):
    training = Training(2.0, Times((0.5, 0.5)), 1e12, Memory(2**30, "planned"), None, None)
    found = table.training_rows(training, 16, devices=2, peak=peak, kind="cpu")
    return {row.what: row.value for row in found}


def test_training_rows_worked_by_hand():
    rows = rows_of(4e12)
    assert rows["training"] == "32 images/s"
    assert rows["MFU"] == "25.0%"  # 1 TFLOP over two devices in half a second, of 4 TFLOP/s
    assert rows["device memory at the peak"] == "1 GiB"
    assert rows_of(None)["MFU"] == "unknown peak"


def test_parts_leave_what_is_in_none_of_them():
    parts = {"losses": Times((0.2,)), "search": Times((0.1,)), "encoder": Times((0.3,))}
    rows = table.part_rows(parts, "search", Times((0.6,)))
    assert rows[-1].value == "100 ms"  # the search is within the losses
    assert rows[0].how.startswith("33.3% of the median step")
    assert table.part_rows(parts, "search", Times((0.4,)))[-1].value == "-100 ms"


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0125, "12.5 ms"), (3e-6, "3 µs")])
def test_times_have_units(seconds, text):
    assert table.in_words(seconds) == text


def test_batches_that_take_turns_differ_and_lie_over_all_devices():
    where = mesh.make_mesh(4)
    batches = random_batches(4, 32, classes=3, where=where, seed=0)
    assert len({batch["image"].tobytes() for batch in jax.device_get(batches)}) == DIFFERENT
    assert batches[0]["image"].shape == (4, 32, 32, 3)
    assert batches[0]["image"].sharding == mesh.batch_sharding(where)
    assert int(jnp.stack([batch["label"] for batch in batches]).max()) < 3


def test_metrics_of_random_maps_are_timed_also_where_the_last_batch_is_not_full():
    took = time_metrics(
        9,
        32,
        batch_size=4,
        classes=2,
        fpr_limit=0.3,
        where=mesh.make_mesh(1),
        key=jax.random.key(0),
    )
    assert took.counting > 0 and took.from_counts > 0
    assert took.total == took.counting + took.from_counts


def test_images_to_read_are_whole_batches_spread_over_all(photos):
    records = layouts.read_split(photos, layout="mvtec", dataset="tiny").train  # 8 images
    source = Source(records, 64, 3, 0, 1, 0, 2**20, True, "stop")
    assert source.some(1) == [records[0], records[3], records[7]]
    assert len(source.some(100)) == 6
    with source.batches(source.some(100)) as batches:
        assert next(batches)["image"].shape == (3, 64, 64, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_step_is_that_of_the_mvtec_config(dtype):
    config = configs.read_config_file(ROOT / "configs/mvtec.py")
    config.model.compute_dtype = dtype
    assert published.losses(dtype) == settings.loss_settings(config)
    assert Recipe(**config.augment.to_dict()) == published.RECIPE
    expected = {key: config.optimizer[key] for key in ("projector_lr", "lr", "betas", "clip_norm")}
    assert expected | {"decay_step": None} == published.OPTIMIZER
    assert config.optimizer.decay_at == 1.0
    assert config.model.projector == published.PROJECTOR
    assert config.model.noise_probability == published.NOISE_PROBABILITY
    assert config.model.norm_images == 0
    assert config.seed == published.SEED
    assert map_settings_of(config.to_dict()) == published.maps(config.data.image_size)
    given = step.arguments([])
    assert (given.batch, given.image_size) == (config.train.batch_size, config.data.image_size)
    assert given.encoder == config.model.encoder


@pytest.mark.parametrize(
    "words", [["--batch", "0"], ["--image-size", "100"], ["--dtype", "float16"], ["--steps", "x"]]
)
def test_step_names_the_argument_that_makes_no_sense(words, capsys):
    with pytest.raises(SystemExit) as ended:
        step.arguments(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_data_that_cannot_be_read_are_left_out_with_the_reason(tiny_config, tmp_path, capsys):
    tiny_config.data.root = str(tmp_path / "nowhere")
    split, reason = benchmark_job.readable_split(tiny_config)
    assert split is None and "nowhere" in reason
    assert reason in capsys.readouterr().out
    (row,) = benchmark_job.without_reading(reason).rows
    assert row.value == "left out" and reason in row.how


def test_benchmark_needs_a_folder_and_weights(tmp_path, capsys):
    assert_fails(capsys, ["main", "--job", "benchmark"], "--workdir", status=2)
    config = ["--config", str(ROOT / "configs/folder.py")]
    weights = {
        "encoder.weights": tmp_path / "no.pth",
        "run.devices": 1,
        "model.encoder": "resnet18",
    }
    words = [*command("benchmark", tmp_path / "run", **weights), *config]
    assert_fails(capsys, words, "no.pth")
    assert not (tmp_path / "run" / "benchmark.json").exists()


QUICK = {
    "data.image_size": 64,
    "encoder.weights": "random",
    "model.encoder": "resnet18",
    "model.projector": "depthwise",
    "train.batch_size": 4,
    "eval.batch_size": 4,
    "run.devices": 1,
    "run.progress": False,
    "benchmark.steps": 2,
    "benchmark.warm_up": 1,
    "benchmark.metric_images": 6,
}


@pytest.mark.slow
def test_benchmark_of_a_config_writes_table_numbers_and_page(photos, tmp_path, capsys, monkeypatch):
    page = tmp_path / "speed.md"
    settings = QUICK | {"data.root": photos, "benchmark.page": page}
    words = [*command("benchmark", tmp_path / "run", **settings)]
    words += ["--config", str(ROOT / "configs/folder.py")]
    page.write_text("# Speed\n\n## Elsewhere\n\nfast\n")
    monkeypatch.setattr(sys, "argv", words)  # whose command stands in the table
    assert main(words) == 0
    found = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    rows = {row["what"]: row["value"] for row in found["rows"]}
    assert len(found["step_seconds"]) == 2 and min(found["step_seconds"]) > 0
    assert found["step_flops"] > 1e9 and found["memory_bytes"] > 2**20
    assert rows["MFU"] == "unknown peak"
    assert "input pipeline, from memory" in rows and found["reading"]["images"] == 8
    assert 0 <= found["reading"]["input_wait"] <= 1
    names = " ".join(found["part_seconds"])
    for part in ("augmentation", "encoder", "projector", "neck and decoder", "losses", "optimizer"):
        assert part in names
    text = page.read_text()
    assert text.startswith("# Speed\n\n## Elsewhere\n\nfast\n\n## CPU, ")
    assert len(re.findall("^### ", text, re.MULTILINE)) == 1
    assert "seven metrics of 6 maps" in text and "--job benchmark" in text
    assert (tmp_path / "run" / "benchmark.md").read_text().strip() in text
    assert "| inference with score maps |" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_without_data_and_without_contrastive_losses(tmp_path, capsys):
    settings = QUICK | {"data.root": tmp_path / "nowhere"}
    words = [*command("benchmark", tmp_path / "run", **settings)]
    words += ["--config", f"{ROOT / 'configs/folder.py'}:rd"]
    words.remove("--config.model.projector=depthwise")
    assert main(words) == 0
    found = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert found["reading"] is None and "nowhere" in found["reading_left_out"]
    assert not any("augmentation" in part or "search" in part for part in found["part_seconds"])
    assert "| input pipeline | left out |" in capsys.readouterr().out


BLOCKED = ("grain", "ml_collections", "tensorflow_datasets", "array_record")
WITHOUT = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None  # importing it raises ImportError
from ccl_jax.benchmark import step
sys.exit(step.main(sys.argv[1:]))
"""
TINY = ["--encoder", "resnet18", "--image-size", "64", "--batch", "2", "--steps", "2"]


def alone(*words, **environment):
    """A program in a process of its own, with the compilation cache of these tests."""
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache or ""} | environment
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )


@pytest.mark.slow
def test_step_is_timed_without_what_gpu_images_lack(tmp_path):
    file = tmp_path / "step.json"
    run = alone(sys.executable, "-c", WITHOUT, *TINY, "--warm-up", "1", "--json", str(file))
    assert run.returncode == 0, run.stderr
    assert "| training |" in run.stdout and "unknown peak" in run.stdout
    found = json.loads(file.read_text())
    assert len(found["step_seconds"]) == 2 and found["device"] == "cpu"
    assert found["command"].startswith("python -m ccl_jax.benchmark.step --encoder resnet18")


def test_step_imports_nothing_that_gpu_images_lack():
    run = alone(sys.executable, "-c", WITHOUT, "--help")
    assert run.returncode == 0, run.stderr
    assert "--profile" in run.stdout


@pytest.mark.slow
def test_benchmark_script_runs_at_a_small_size_and_says_what_it_left_out(tmp_path):
    run = alone("launch/benchmark.sh", str(tmp_path / "out"), "--small", PYTHON=sys.executable)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "done: tests\n" in summary and "done: step-4-float32\n" in summary
    assert "done: job-4-bfloat16\n" in summary and "step-4-bfloat16" not in summary
    assert "batch 4, bfloat16" in (tmp_path / "out" / "benchmarks.md").read_text()
    assert "left out: kernels, because of --small\n" in summary
    assert "PyTorch" in summary or "done: torch\n" in summary
    log = (tmp_path / "out" / "step-4-float32.log").read_text()
    assert "| kernel | ms a step |" in log
    assert json.loads((tmp_path / "out" / "step-4-float32.json").read_text())["step_seconds"]


def small_run(tmp_path, failing):
    """The script with an interpreter that only fails, where its words hold `failing`."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\n[[ "$*" != *"{failing}"* ]]\n')
    python.chmod(0o755)
    run = alone("launch/benchmark.sh", str(tmp_path / "out"), "--small", PYTHON=str(python))
    return run, (tmp_path / "out" / "summary.txt").read_text()


def test_benchmark_script_goes_on_after_a_failure_and_ends_with_it(tmp_path):
    run, summary = small_run(tmp_path, "float32")
    assert run.returncode == 1
    assert "FAILED with status 1: step-4-float32" in summary
    assert "done: job-4-bfloat16" in summary


def test_benchmark_script_times_the_step_alone_where_the_job_lacks_its_packages(tmp_path):
    run, summary = small_run(tmp_path, "find_spec('grain')")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "done: step-4-float32\n" in summary and "done: step-4-bfloat16\n" in summary
    assert "packages that are not installed: grain\n" in summary and "done: job" not in summary


def test_benchmark_script_times_the_step_alone_where_the_job_fails(tmp_path):
    run, summary = small_run(tmp_path, "--job benchmark")
    assert run.returncode == 1
    assert "FAILED with status 1: job-4-bfloat16" in summary
    assert "done: step-4-bfloat16\n" in summary
