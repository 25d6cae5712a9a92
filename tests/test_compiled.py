import os
import subprocess
import sys
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest

from ccl_jax import compiled, scoring
from ccl_jax.compiled import keep_compiled
from ccl_jax.state import Architecture

ROOT = Path(__file__).parent.parent

PROGRAM = """
import logging, sys, warnings
import jax
from ccl_jax import compiled

compiled.WORTH_SECONDS = 0.0
compiled.keep_compiled(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.rsplit("/", 1)[-1]))
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    print(float(jax.jit(lambda x: x * 3 + 1)(2.0)))
print("hits", hits.count("cache_hits"), "misses", hits.count("cache_misses"), "warned", len(heard))
"""


def start(folder):
    """What a new process prints that uses the folder: a result, then hits and misses."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_second_start_takes_the_program_from_the_folder_and_damage_only_costs_time(tmp_path):
    folder = tmp_path / "new" / "folder"
    result, first = start(folder)
    assert result == "7.0" and first.startswith("hits 0 misses") and first.endswith("warned 0")
    result, second = start(folder)
    assert result == "7.0" and "misses 0 warned 0" in second and "hits 0" not in second
    entries = list(folder.glob("*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(
            entry.read_bytes()[: entry.stat().st_size // 2]
        )  # as after a fault of the disk
    result, third = start(folder)
    assert result == "7.0" and not third.endswith("warned 0")


def test_a_program_whose_writing_was_cut_off_is_written_again(tmp_path):
    """Otherwise JAX could store no other one, and refused it at every start once it was read."""
    start(tmp_path)
    (entry,) = tmp_path.glob("*-cache")
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()  # it is written last
    said, *rest = start(tmp_path)
    assert said.startswith("removed 1 compiled programs")
    assert rest == ["7.0", "hits 0 misses 1 warned 0"]
    assert start(tmp_path) == ["7.0", "hits 1 misses 0 warned 0"]


@pytest.fixture
def no_folder(monkeypatch):
    """JAX without a folder; what it had comes back."""
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def asked_anew():
    """Lets the options be asked for, and forgets them again."""
    compiled.convolutions_on_all_cores.cache_clear()
    yield
    compiled.convolutions_on_all_cores.cache_clear()


def is_by_ynnpack(options):
    def convolve(maps, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(maps, kernel, (1, 1), "SAME", dimension_numbers=layout)

    arrays = np.ones((8, 32, 32, 64), np.float32), np.ones((3, 3, 64, 64), np.float32)
    program = jax.jit(convolve, compiler_options=dict(options) or None).lower(*arrays).compile()
    return "__ynn_fusion" in program.as_text()


def test_the_options_take_a_convolution_from_the_library_that_leaves_cores_idle(asked_anew):
    options = compiled.convolutions_on_all_cores()
    if not options or not is_by_ynnpack(()):
        pytest.skip("this XLA computes convolutions in another way")
    assert not is_by_ynnpack(options)


def test_options_that_xla_does_not_know_are_not_used(asked_anew, monkeypatch):
    monkeypatch.setattr(compiled, "EIGEN", (("xla_cpu_no_such_option", "1"),))
    assert compiled.convolutions_on_all_cores() == ()


def test_other_devices_get_no_options_of_cpus(asked_anew, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiled.convolutions_on_all_cores() == ()


def test_a_folder_that_jax_has_already_stays(no_folder, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    keep_compiled(str(tmp_path / "other"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (tmp_path / "other").exists()


def test_an_empty_name_keeps_nothing(no_folder):
    keep_compiled("")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_another_keeps_locked_is_used_all_the_same(
    no_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compiled, "LOCK_SECONDS", 0.1)
    with filelock.FileLock(tmp_path / ".lockfile"):
        keep_compiled(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert "not looked through for damage" in capsys.readouterr().out


def test_a_home_folder_is_found(no_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled("~/programs")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")


def test_a_folder_that_cannot_be_written_is_named_and_not_used(no_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    keep_compiled(str(tmp_path / "file" / "programs"))
    assert jax.config.jax_compilation_cache_dir is None
    assert "--config.run.compilation_cache=FOLDER" in capsys.readouterr().out


SLOW_TO_IMPORT = (
    "sklearn",
    "matplotlib",
    "tensorflow_datasets",
    "scipy.stats",
    "tensorboardX",
    "jinja2",
)


def test_a_start_imports_nothing_heavy_that_its_first_step_does_not_need():
    program = "import sys, ccl_jax.main; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "ccl_jax.train" in done.stdout.split()
    assert not set(SLOW_TO_IMPORT) & set(done.stdout.split())


@pytest.mark.parametrize(("encoder", "narrow"), [("resnet18", True), ("resnet50", False)])
def test_scoring_takes_the_options_for_encoders_of_few_channels(monkeypatch, encoder, narrow):
    monkeypatch.setattr(scoring, "compiled_scoring", lambda options: lambda *_, **__: options)
    _, params, stats = Architecture("rd", encoder, "plain", "float32").abstract()
    settings = scoring.MapSettings(64, 4.0, "add", "cosine", 1)
    images = np.zeros((1, 64, 64, 3), np.uint8)
    plain = getattr(scoring.score_images, "__wrapped__", scoring.score_images)  # no check of types
    taken = plain(None, params, stats, images, settings=settings)
    assert taken == (compiled.convolutions_on_all_cores() if narrow else ())
