import os
import subprocess
import sys
from pathlib import Path

import filelock
import jax
import pytest

from ccl_jax import compiled
from ccl_jax.compiled import keep_compiled

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
