"""Where arrays lie, on one device, on four, and over two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ccl_jax import mesh

TWO_PROCESSES = """
import json
import pathlib
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from ccl_jax import mesh

assert mesh.initialize_distributed()
where = mesh.make_mesh()
rows = np.arange(8.0, dtype=np.float32).reshape(4, 2) + 100 * jax.process_index()
image = mesh.put_batch({"image": rows}, where)["image"]
gram = jax.jit(lambda z: (z @ z.T).sum(), out_shardings=mesh.replicated(where))(image)
try:
    mesh.make_mesh(2)
except ValueError as error:
    assert "fewer processes" in str(error)
else:
    raise AssertionError("a mesh that leaves out a process was built")
process = jax.process_index()
totals = np.array([[2**62 + process, -5], [process, 2**33]], np.int64)
summed = mesh.sum_over_processes(totals)
assert summed.dtype == np.int64
wanted = sum(int(x) for x in [2**62, 2**62 + 1]) - 2**64  # wraps as int64 does
assert summed.tolist() == [[wanted, -10], [1, 2**34]], summed
assert mesh.from_first(11 + process) == 11
assert mesh.is_first() == (process == 0)
whole = mesh.on_every_host({"image": image}, where)["image"]
assert whole.shape == (8, 2) and whole[4:].min() >= 100, whole
same = mesh.put_replicated({"step": np.int32(3)}, where)["step"]
assert int(same) == 3 and same.is_fully_replicated
mesh.say("only the first says this")
mesh.barrier("end")
result = [jax.process_count(), where.size, list(image.shape), float(gram)]
pathlib.Path(sys.argv[1]).write_text(json.dumps(result))  # Gloo's threads write to stdout as well
"""


def test_mesh_takes_all_devices_by_default():
    where = mesh.make_mesh()
    assert dict(where.shape) == {"data": 4, "shard": 1}
    assert where.axis_types == (AxisType.Auto, AxisType.Auto)
    assert list(where.devices.flat) == jax.devices()


def test_mesh_takes_the_first_devices_when_told_how_many():
    assert list(mesh.make_mesh(3).devices.flat) == jax.devices()[:3]


@pytest.mark.parametrize("devices", [5, -1])
def test_more_devices_than_there_are_is_refused(devices):
    with pytest.raises(
        ValueError, match=rf"config.run.devices={devices}, but this run has 4 \(cpu"
    ):
        mesh.make_mesh(devices)


def test_shards_that_do_not_divide_the_devices_are_refused_with_those_that_do():
    with pytest.raises(
        ValueError,
        match=r"config.run.parameter_shards=3 does not divide the 4 devices; use one of 1, 2, 4, "
        r"e.g. --config.run.parameter_shards=2",
    ):
        mesh.make_mesh(4, 3)


def test_large_leaves_of_a_state_are_split_along_their_longest_axis_that_can_be():
    where = mesh.make_mesh(4, 2)
    assert dict(where.shape) == {"data": 2, "shard": 2}
    shapes = {"kernel": (3, 3, 64, 128), "odd": (3, 4099), "scale": (64,), "step": ()}
    state = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = jax.tree.map(lambda sharding: tuple(sharding.spec), mesh.state_shardings(state, where))
    assert specs == {"kernel": (None, None, None, "shard"), "odd": (), "scale": (), "step": ()}
    whole = mesh.state_shardings(state, mesh.make_mesh(4))
    assert {tuple(sharding.spec) for sharding in whole.values()} == {()}


def test_rows_of_a_batch_lie_in_the_order_of_the_devices_also_with_parameter_shards():
    rows = np.arange(8, dtype=np.int32)
    there = mesh.put_batch({"label": rows}, mesh.make_mesh(4, 2))["label"]
    order = {shard.device: shard.data.tolist() for shard in there.addressable_shards}
    assert [order[device] for device in jax.devices()] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_one_process_needs_no_agreement():
    totals = np.array([2**40, -1])
    assert mesh.sum_over_processes(totals) is totals
    assert mesh.from_first(7) == 7
    mesh.barrier("alone")
    where = mesh.make_mesh()
    there = mesh.put_batch({"label": np.arange(8)}, where)
    np.testing.assert_array_equal(mesh.on_every_host(there, where)["label"], np.arange(8))


def test_contrastive_gram_matrix_of_a_split_batch_compiles_and_is_right():
    rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    labels = np.arange(8, dtype=np.int32) % 3
    batch = mesh.put_batch({"image": rows, "label": labels}, mesh.make_mesh())
    assert batch["image"].sharding == mesh.batch_sharding(mesh.make_mesh())
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 3)}

    @jax.jit
    def gram(batch):
        same = batch["label"][:, None] == batch["label"][None, :]
        return jax.numpy.where(same, batch["image"] @ batch["image"].T, 0)

    want = np.where(labels[:, None] == labels[None, :], rows @ rows.T, 0)
    np.testing.assert_allclose(gram(batch), want, rtol=1e-5, atol=1e-6)


def test_images_stay_uint8_on_their_way():
    images = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
    there = mesh.put_batch({"image": images}, mesh.make_mesh())["image"]
    assert there.dtype == np.uint8
    np.testing.assert_array_equal(there, images)


def test_replicated_array_is_whole_on_every_device():
    where = mesh.make_mesh()
    array = jax.device_put(np.ones((3, 2)), mesh.replicated(where))
    assert [shard.data.shape for shard in array.addressable_shards] == [(3, 2)] * 4


def test_batch_that_cannot_be_split_is_refused_with_the_next_that_can():
    with pytest.raises(
        ValueError,
        match=r"config.train.batch_size=10 cannot be split over 4 devices; "
        r"use a multiple of 4, e.g. --config.train.batch_size=12",
    ):
        mesh.check_divisible(10, 4, "train.batch_size")
    mesh.check_divisible(12, 4, "train.batch_size")


CLUSTER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
)


@pytest.fixture
def joined(monkeypatch):
    """Arguments of the calls to jax.distributed.initialize, in an environment of one process."""
    for name in CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    return calls


def test_lone_process_joins_nobody(joined):
    assert not mesh.initialize_distributed()
    assert joined == []


def test_single_slurm_task_joins_nobody(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not mesh.initialize_distributed()


def test_slurm_step_leaves_the_rest_to_jax(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert mesh.initialize_distributed(heartbeat_seconds=30)
    assert joined == [{"cluster_detection_method": "slurm", "heartbeat_timeout_seconds": 30}]


@pytest.mark.parametrize(
    ("variable", "value", "cluster"),
    [("OMPI_COMM_WORLD_SIZE", "2", "ompi"), ("TPU_WORKER_HOSTNAMES", "a,b", "gketpu")],
)
def test_other_clusters_are_told_by_their_environment(
    joined, monkeypatch, variable, value, cluster
):
    monkeypatch.setenv(variable, value)
    assert mesh.initialize_distributed()
    assert joined[0]["cluster_detection_method"] == cluster


def test_named_cluster_is_taken_at_its_name(joined):
    assert mesh.initialize_distributed("k8s")
    assert joined[0]["cluster_detection_method"] == "k8s"


def test_process_that_is_to_run_alone_ignores_the_cluster(joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert not mesh.initialize_distributed("none")
    assert joined == []


def test_cluster_that_is_not_there_is_refused():
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    program = "from ccl_jax import mesh; mesh.initialize_distributed('slurm')"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={name: environment[name] for name in environment.keys() - set(CLUSTER_VARIABLES)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "ValueError: config.run.cluster='slurm': this process is not in such a" in run.stderr


def test_process_joins_the_coordinator_it_is_told(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert mesh.initialize_distributed()
    assert joined == [
        {
            "coordinator_address": "host:1234",
            "num_processes": 2,
            "process_id": 1,
            "cluster_detection_method": "deactivate",
            "heartbeat_timeout_seconds": 100,
        },
    ]


@pytest.mark.parametrize("wrong", ["", "two"])
def test_coordinator_without_a_process_number_is_refused(joined, monkeypatch, wrong):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", wrong)
    with pytest.raises(ValueError, match=rf"JAX_PROCESS_ID='{wrong}' is not a number"):
        mesh.initialize_distributed()
    assert joined == []


def test_two_processes_see_one_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, tmp_path / f"{number}.json"],
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number),
            },
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    rows = np.concatenate([np.arange(8.0).reshape(4, 2), np.arange(8.0).reshape(4, 2) + 100])
    assert ["only the first" in out for out, _ in outputs] == [True, False]
    for number, (process, (_, err)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, err
        result = json.loads((tmp_path / f"{number}.json").read_text())
        assert result == [2, 4, [8, 2], (rows @ rows.T).sum()]
