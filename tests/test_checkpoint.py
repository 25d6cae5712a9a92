"""Checkpoints come back as they were, or one clear error says why not."""

import functools
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from ccl_jax import checksums, mesh
from ccl_jax.checkpoint import Checkpoints
from ccl_jax.mesh import make_mesh, replicated

# Two Adams behind a clip: an optimizer state nested as in a real run.
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(5.0),
    optax.partition(
        {"projector": optax.adam(1e-3), "rest": optax.adam(5e-3)},
        {"projector": "projector", "neck": "rest", "decoder": "rest"},
    ),
)


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState


PARTS = ("projector", "neck", "decoder")


@functools.partial(jax.jit, static_argnames=("width", "parts", "sharding"))
def build_state(step, *, width, parts, sharding):
    keys = iter(jax.random.split(jax.random.key(step), 9))
    params = {part: {} for part in PARTS}
    params |= {
        part: {"conv": {"kernel": jax.random.normal(next(keys), (3, width))}} for part in parts
    }
    statistics = {"neck": {"norm": {"mean": jax.random.normal(next(keys), (width,))}}}
    state = State(jnp.int32(step), params, statistics, OPTIMIZER.init(params))
    state = state.replace(opt_state=jax.tree.map(lambda a: a + step, state.opt_state))
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, sharding), state)


def make_state(step: int = 0, width: int = 6, parts: tuple = PARTS):
    """A state with values of its own for every step and leaf, on every device."""
    return build_state(step, width=width, parts=parts, sharding=replicated(make_mesh()))


def abstract(tree, sharding=None):
    sharding = sharding or replicated(make_mesh())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def save_steps(folder: Path, *steps: int, keep: int = 9) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step))


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a run, 100% #1 ") / "checkpoints"
    save_steps(folder, 10, 20, 30)
    return folder


def test_every_leaf_comes_back_bit_for_bit_where_the_target_wants_it(three_steps):
    with Checkpoints(three_steps) as checkpoints:
        restored = checkpoints.restore(20, abstract(make_state()))
    assert isinstance(restored, State)
    assert_same(restored, make_state(20))
    assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves(restored))


def test_checkpoint_of_four_devices_restores_on_one(three_steps):
    one = replicated(make_mesh(1))
    with Checkpoints(three_steps) as checkpoints:
        restored = checkpoints.restore(-1, abstract(make_state(), one))
    assert_same(restored, make_state(30))
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(restored))


def test_newest_checkpoints_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [3, 4]
        assert checkpoints.latest == 4
        assert checkpoints.choose(-1) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_saving_a_step_again_changes_nothing(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.save(5, make_state(5))
        assert not checkpoints.save(5, make_state(6))
        checkpoints.wait()
        assert_same(checkpoints.restore(5, abstract(make_state())), make_state(5))


def test_state_may_be_donated_right_after_saving(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            state = make_state(step, width=50_000)
            assert checkpoints.save(step, state)
            jax.block_until_ready(overwrite(state))
            assert state.params["neck"]["conv"]["kernel"].is_deleted()
        for step in (1, 2, 3):
            target = abstract(make_state(width=50_000))
            assert_same(checkpoints.restore(step, target), make_state(step, width=50_000))


def test_saving_returns_before_the_files_are_written(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, make_state(1, width=300_000))
        assert checkpoints._checkpointer.is_saving_in_progress()
        checkpoints.wait()
        assert not checkpoints._checkpointer.is_saving_in_progress()


def test_evaluation_reads_only_the_parts_it_asks_for(three_steps):
    want = make_state(30)
    parts = abstract({"params": want.params, "batch_stats": want.batch_stats})
    with Checkpoints(three_steps) as checkpoints:
        restored = checkpoints.restore_parts(30, parts)
    assert_same(restored, {"params": want.params, "batch_stats": want.batch_stats})


def test_part_without_parameters_is_restored_as_such(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = make_state(1, parts=("neck", "decoder"))
        checkpoints.save(1, state)
        assert_same(checkpoints.restore(1, abstract(state)), state)


def test_model_of_another_shape_is_refused_and_the_leaf_named(three_steps):
    wider = abstract(make_state(width=8))
    with Checkpoints(three_steps) as checkpoints:
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            checkpoints.restore(30, wider)
        with pytest.raises(ValueError, match="params/neck/conv/kernel"):
            checkpoints.restore_parts(30, {"params": wider.params})
    message = str(caught.value)
    assert str(three_steps / "30") in message
    assert "params/decoder/conv/kernel" in message
    assert "(3, 6)" in message and "(3, 8)" in message


def test_missing_and_unexpected_leaves_are_both_named(three_steps):
    state = make_state()
    params = dict(state.params, extra={"bias": jnp.zeros(3)})
    del params["neck"]
    with Checkpoints(three_steps) as checkpoints, pytest.raises(ValueError) as caught:
        checkpoints.restore(30, abstract(state.replace(params=params)))
    assert "params/extra/bias" in str(caught.value)
    assert "params/neck/conv/kernel" in str(caught.value)


def test_part_that_the_checkpoint_lacks_is_named(three_steps):
    wanted = {"averages": {"neck": jnp.zeros(3)}}
    with (
        Checkpoints(three_steps) as checkpoints,
        pytest.raises(ValueError, match="averages/neck"),
    ):
        checkpoints.restore_parts(30, abstract(wanted))


def test_unknown_step_lists_those_there(three_steps):
    with (
        Checkpoints(three_steps) as checkpoints,
        pytest.raises(ValueError, match=r"no checkpoint of step 25; there are steps 10, 20, 30"),
    ):
        checkpoints.restore(25, abstract(make_state()))


def test_reader_of_a_folder_without_checkpoints_says_so(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="no finished"):
        checkpoints.choose(-1)
    with pytest.raises(ValueError, match=r"nowhere does not exist.*--workdir"):
        Checkpoints(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_reader_cannot_write(three_steps):
    with Checkpoints(three_steps) as checkpoints, pytest.raises(ValueError, match="for reading"):
        checkpoints.save(40, make_state(40))


def test_reader_sees_what_another_writes_meanwhile(tmp_path):
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as reader:
        assert reader.steps() == [1]
        save_steps(tmp_path, 2)
        assert reader.steps() == [1, 2]
        assert_same(reader.restore(-1, abstract(make_state())), make_state(2))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


DAMAGES = {
    "data cut off": lambda step: [cut_in_half(f) for f in step.rglob("d/*") if f.is_file()],
    "data changed": lambda step: [flip_a_byte(f) for f in step.rglob("d/*") if f.is_file()],
    "data missing": lambda step: [shutil.rmtree(f) for f in [*step.rglob("d")]],
    "description missing": lambda step: [f.unlink() for f in step.rglob("_METADATA")],
    "description cut off": lambda step: [cut_in_half(f) for f in step.rglob("_METADATA")],
    "index missing": lambda step: [f.unlink() for f in step.rglob("manifest.ocdbt")],
    "all missing": lambda step: [shutil.rmtree(f) for f in step.iterdir() if f.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_still_loads(three_steps, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    assert DAMAGES[damage](folder / "30")
    target = abstract(make_state())
    with Checkpoints(folder) as checkpoints:
        for read in (
            lambda: checkpoints.restore(30, target),
            lambda: checkpoints.restore_parts(30, {"params": target.params}),
        ):
            with pytest.raises(ValueError, match="damaged or incomplete") as caught:
                read()
            assert f"mv {folder / '30'} {tmp_path / 'damaged-30'} (" in str(caught.value)
            assert "continues from step 20" in str(caught.value)
        assert_same(checkpoints.restore(20, target), make_state(20))
    (folder / "30").rename(tmp_path / "damaged-30")  # as the message says
    with Checkpoints(folder, keep=9) as checkpoints:
        assert checkpoints.latest == 20
        assert checkpoints.save(30, make_state(30))


def test_reader_of_the_newest_names_a_damaged_one_and_takes_the_one_before(
    three_steps, tmp_path, capsys
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    DAMAGES["data changed"](folder / "30")
    DAMAGES["index missing"](folder / "20")
    step = abstract({"step": jnp.int32(0)})
    with Checkpoints(folder) as checkpoints:
        assert int(checkpoints.restore_parts(-1, step)["step"]) == 10
        assert checkpoints.steps() == [10, 20, 30]  # a reader changes nothing
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert f"{folder / '30'} is damaged (ValueError: " in said[0]
    assert "is not what was written, by its sha256" in said[0]
    assert "manifest.ocdbt is missing); step 10 is used instead" in said[1]


def test_writer_puts_damaged_checkpoints_aside_and_saves_their_steps_again(
    three_steps, tmp_path, capsys
):
    folder = tmp_path / "checkpoints"
    for time in (1, 2):
        if time == 1:
            shutil.copytree(three_steps, folder)
        DAMAGES["data cut off"](folder / "30")
        with Checkpoints(folder, keep=9) as checkpoints:
            assert_same(checkpoints.restore(-1, abstract(make_state())), make_state(20))
            assert checkpoints.steps() == [10, 20]
            assert checkpoints.save(30, make_state(30))
        aside = tmp_path / ("damaged-30" if time == 1 else "damaged-30-2")
        assert aside.is_dir()
        assert f"moved to {aside}, and step 20 is used instead" in capsys.readouterr().out
    with Checkpoints(folder) as checkpoints:
        assert_same(checkpoints.restore(-1, abstract(make_state())), make_state(30))


def test_all_damaged_is_an_error_that_names_each_and_moves_none(three_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    for step in (10, 20, 30):
        DAMAGES["data missing"](folder / str(step))
    with (
        Checkpoints(folder, keep=9) as checkpoints,
        pytest.raises(ValueError, match=r"every checkpoint in .* is damaged") as caught,
    ):
        checkpoints.restore(-1, abstract(make_state()))
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:4]] == [
        "30",
        "20",
        "10",
    ]
    assert f"mv {folder} {folder}-damaged" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]


def test_checkpoint_without_checksums_is_read(three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "checkpoints")
    (tmp_path / "checkpoints/30/state" / checksums.NAME).unlink()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert_same(checkpoints.restore(-1, abstract(make_state())), make_state(30))


def test_checksums_are_what_sha256sum_reads(three_steps):
    state = three_steps / "30/state"
    listed = (state / checksums.NAME).read_text().splitlines()
    assert len(listed) == len([path for path in state.rglob("*") if path.is_file()]) - 1
    subprocess.run(["sha256sum", "--check", "--strict", checksums.NAME], cwd=state, check=True)


@pytest.mark.parametrize(("text", "why"), [("", "is empty"), ("ab" * 30 + "\n", "cut off")])
def test_checksums_that_are_cut_off_are_damage_too(tmp_path, text, why):
    (tmp_path / checksums.NAME).write_text(text)
    with pytest.raises(ValueError, match=why):
        checksums.check_checksums(tmp_path)


def evaluated(workdir: Path, step: int, text: str) -> None:
    folder = workdir / "evaluation" / str(step)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)


def test_newest_best_and_every_kth_are_kept(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    values = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: 0.9}
    with Checkpoints(folder, keep=2, keep_best="image_auroc", keep_every=4) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, make_state(step))
            if step in values:
                text = json.dumps({"mean": {"image_auroc": values[step]}})
                evaluated(tmp_path, step, text)
            elif step == 6:
                evaluated(tmp_path, step, '{"mean": {}}')
            if step == 4:
                assert checkpoints.steps() == [2, 3, 4]
        assert checkpoints.steps() == [4, 5, 7, 8]  # of two equally good ones the newer
        checkpoints.wait()
        assert sorted(path.name for path in folder.iterdir()) == ["4", "5", "7", "8"]
    said = capsys.readouterr().out
    assert "6/results.json cannot be read (KeyError('image_auroc')); step 6" in said


def test_remains_of_a_killed_write_are_ignored_by_readers_and_removed_by_the_next_writer(
    three_steps, tmp_path
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    remains = folder / "40.orbax-checkpoint-tmp"
    shutil.copytree(folder / "30", remains)
    with Checkpoints(folder) as reader:
        assert reader.steps() == [10, 20, 30]
        assert remains.exists()
    save_steps(folder, 40)
    assert not remains.exists()
    with Checkpoints(folder) as reader:
        assert_same(reader.restore(40, abstract(make_state())), make_state(40))


def test_failing_disk_is_reported_and_earlier_checkpoints_survive(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save_steps(folder, 1)
    with Checkpoints(folder, keep=3) as checkpoints:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._checkpointer, "save_async", full)
        with pytest.raises(OSError, match=r"could not be written .*No space left.*--workdir"):
            checkpoints.save(2, make_state(2))
    with Checkpoints(folder) as reader:
        assert_same(reader.restore(-1, abstract(make_state())), make_state(1))


def test_a_checkpoint_that_another_process_cannot_read_is_entered_by_none(tmp_path, monkeypatch):
    state = make_state()
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        reads, read, added = [], checkpoints._read, mesh.sum_over_processes

        def noted(step, load):
            reads.append(step)
            return read(step, load)

        monkeypatch.setattr(checkpoints, "_read", noted)
        monkeypatch.setattr(  # another process fails where this one has read the description
            mesh, "sum_over_processes", lambda totals: added(totals) + (len(reads) == 1)
        )
        for restore in (
            lambda: checkpoints.restore(1, abstract(state)),
            lambda: checkpoints.restore_parts(1, {"step": abstract(state).step}),
        ):
            reads.clear()
            with pytest.raises(ValueError, match=r"damaged or incomplete .*in 1 of the other"):
                restore()
            assert reads == [1], "the arrays were to be read without it"
