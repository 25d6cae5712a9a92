"""The figures of a run, worked by hand; the FLOPs of a program, against XLA's own count."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ccl_jax import mesh
from ccl_jax.throughput import (
    ENOUGH,
    Goodput,
    Throughput,
    count_flops,
    device_peak,
    peak_flops,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_throughput_worked_by_hand():
    clock = Clock()
    meter = Throughput(8, clock, devices=2, peak=1e12)
    clock.now = 100.0  # compilation
    meter.begin(flops=5e12)
    for _ in range(4):
        meter.waited(0.5)
        with meter.saving():
            clock.now += 0.25
        clock.now += 1.75
        meter.step()
    assert meter.figures() == {
        "images_per_second": 4.0,
        "images_per_second_per_device": 2.0,
        "input_wait": 0.25,
        "checkpoint_stall": 0.125,
        "mfu": 1.25,  # 4 steps of 5 TFLOP on 2 devices in 8 s: 1.25 TFLOP/s of 1
    }
    assert meter.step_seconds == 8.0 - 2.0 - 1.0
    assert meter.figures() == {}


def test_throughput_without_a_begin_leaves_the_first_step_out():
    clock = Clock()
    meter = Throughput(8, clock)
    clock.now = 100.0  # the first step, with compilation
    meter.step()
    for _ in range(4):
        clock.now += 2.0
        meter.step()
    figures = meter.figures()
    assert figures["images_per_second"] == 4.0
    assert "mfu" not in figures, "unknown, as on CPUs"


def test_throughput_leaves_pauses_out():
    clock = Clock()
    meter = Throughput(8, clock)
    meter.step()
    clock.now += 2.0
    with pytest.raises(KeyError), meter.paused():
        clock.now += 50.0
        raise KeyError
    meter.step()
    assert meter.figures()["images_per_second"] == 4.0
    assert meter.step_seconds == 2.0


def test_throughput_of_one_step_is_unknown():
    meter = Throughput(8, Clock())
    assert meter.figures() == {}
    meter.step()
    assert meter.figures() == {}


def test_a_slow_step_says_where_its_time_went_and_an_evaluation_makes_none():
    clock = Clock()
    meter = Throughput(8, clock)
    meter.begin()

    def steps(number, seconds):
        found = []
        for _ in range(number):
            clock.now += seconds
            found.append(meter.step())
        return found

    assert steps(ENOUGH - 1, 1.0) + steps(1, 50.0) == [None] * ENOUGH, "no median yet"
    assert steps(1, 9.9) == [None]
    meter.waited(2.0)
    with meter.saving():
        clock.now += 3.0
    (slow,) = steps(1, 7.0)
    assert (slow.seconds, slow.median) == (10.0, 1.0)
    assert (slow.waiting, slow.saving, slow.computing) == (2.0, 3.0, 5.0)
    assert "10 times the median of 1 s: 2 s waiting for input, 3 s saving, 5 s comp" in str(slow)
    with meter.paused():
        clock.now += 100.0
    assert steps(1, 1.0) == [None]


def test_goodput_divides_by_the_time_since_the_very_first_start(tmp_path):
    clock = Clock()
    clock.now = 1000.0
    file = tmp_path / "goodput.json"
    goodput = Goodput(file, 0.0, clock)
    clock.now += 100.0
    assert goodput.figures(40.0) == {"step_seconds": 40.0, "goodput": 0.4}
    again = Goodput(file, 30.0, clock)  # of the 40 s, a kill undid 10
    clock.now += 100.0
    assert again.figures(50.0) == {"step_seconds": 80.0, "goodput": 0.4}
    assert again.elapsed == 200.0
    assert json.loads(file.read_text()) == {"first_start": 1000.0, "starts": 2}


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "float32", 378),
        ("NVIDIA A100-SXM4-40GB", "float32", 156),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("TPU v5 lite", "float32", 197),
        ("TPU v5", "bfloat16", 459),
    ],
)
def test_the_peak_goes_by_the_kind_of_device_and_the_dtype(kind, dtype, tflops):
    assert peak_flops(kind, dtype) == tflops * 1e12


def test_the_peak_of_other_devices_is_unknown_unless_it_is_set():
    assert peak_flops("NVIDIA L4000", "float32") is None
    where = mesh.make_mesh(1)
    assert device_peak(where, "float32", 0.0) is None, "a CPU"
    assert device_peak(where, "float32", 1.5) == 1.5e12


def convolve(x, w, **options):
    return jax.lax.conv_general_dilated(
        x, w, padding=((0, 0), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def products(x, w, a, b):
    """Matrix products and convolutions, also in a loop and with their gradients."""

    def loss(w, a):
        y = convolve(x, w, window_strides=(1, 1)).mean((1, 2))
        z, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ a), None), y, length=3)
        return (z @ b).sum()

    return jax.grad(loss, argnums=(0, 1))(w, a)


def test_flops_are_those_that_xla_counts_over_all_devices():
    shapes = ((8, 9, 9, 4), (3, 3, 4, 16), (16, 16), (16, 5))
    by_devices = {}
    for devices in (1, 4):
        where = mesh.make_mesh(devices)
        whole, rows = mesh.replicated(where), mesh.batch_sharding(where)
        arguments = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows if n == 0 else whole)
            for n, shape in enumerate(shapes)
        ]
        traced = jax.jit(products, out_shardings=whole).trace(*arguments)
        xla = traced.lower().compile().cost_analysis()["flops"]
        by_devices[devices] = (count_flops(traced.jaxpr), xla)
    assert by_devices[1][0] == by_devices[4][0]
    # The compiled program counts for one device, and what is added besides; loops once.
    assert by_devices[4][1] == pytest.approx(by_devices[1][1] / 4, rel=0.25)
    convolution = 2 * 8 * 7 * 7 * 16 * 3 * 3 * 4
    product = 2 * 8 * 16 * 16
    # Forwards, then backwards: to the kernel (the image needs no gradient), to both sides of each
    # product in the loop, and to one side of the last.
    expected = 2 * convolution + 3 * 3 * product + 2 * (2 * 8 * 16 * 5)
    assert by_devices[1][0] == expected
    assert by_devices[1][1] == pytest.approx(expected, rel=0.2)


def test_flops_of_grouped_and_transposed_convolutions_leave_inserted_zeros_out():
    x = jnp.zeros((2, 9, 9, 8))
    grouped = jax.make_jaxpr(
        lambda w: convolve(x, w, window_strides=(2, 2), feature_group_count=8)
    )(jnp.zeros((3, 3, 1, 8)))
    assert count_flops(grouped) == 2 * (2 * 4 * 4 * 8) * 9
    transposed = jax.make_jaxpr(
        lambda w: convolve(x, w, window_strides=(1, 1), lhs_dilation=(2, 2))
    )(jnp.zeros((2, 2, 8, 3)))
    assert count_flops(transposed) == 2 * (2 * 16 * 16 * 3) * (4 * 8) / 4


def test_flops_of_a_branch_are_those_of_its_costliest_side():
    a = jnp.zeros((4, 4))
    program = jax.make_jaxpr(lambda go: jax.lax.cond(go, lambda: a @ a @ a, lambda: a @ a))(True)
    assert count_flops(program) == 2 * 2 * 64


def test_flops_within_shard_map_count_for_every_device():
    where = mesh.make_mesh(4)
    rows = PartitionSpec(where.axis_names)

    def product(x):
        return jax.shard_map(lambda x: x @ x.T, mesh=where, in_specs=rows, out_specs=rows)(x)

    x = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=NamedSharding(where, rows))
    assert count_flops(jax.make_jaxpr(product)(x)) == 4 * 2 * 2 * 2 * 3
