"""The bytes that docs/scaling.md names: read rightly from a program, and as the formulas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccl_jax import mesh
from tests.reference import scaling_estimate as estimate
from tests.reference import traffic

PROGRAM = """HloModule jit_step, num_partitions=4

%region (a: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %a)
}

%body (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%region
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %whole = f32[8,8]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %both = (f32[10]{0}, bf16[6]{0}) all-reduce(%g, %h), replica_groups={{0,1,2,3}}, to_apply=%region
  %part = f32[2,8]{1,0} reduce-scatter(%whole), replica_groups={{0,1,2,3}}, to_apply=%region
  %next = u8[5]{0} collective-permute(%y), source_target_pairs={{0,3},{1,0},{2,1},{3,2}}
  %started = (f32[3]{0}, f32[12]{0}) all-gather-start(%z), replica_groups={{0,1,2,3}}
  %done = f32[12]{0} all-gather-done(%started)
  %lonely = f32[8]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%region
  %use = f32[8]{0} add(%all-reduce.1, %x)
}
"""


def test_collectives_of_a_program_are_read_with_their_bytes():
    found = list(traffic.collectives(PROGRAM, 4))
    assert [(c.kind, c.bytes, c.group, c.computation) for c in found] == [
        ("all-reduce", 32, 2, "body"),
        ("all-gather", 256, 4, "main"),
        ("all-reduce", 40 + 12, 4, "main"),
        ("reduce-scatter", 64, 4, "main"),
        ("collective-permute", 5, 4, "main"),
        ("all-gather", 48, 4, "main"),
    ]
    # A ring passes a sum round twice, a gather once; each time all parts but one's own.
    assert [c.received for c in found] == [32, 192, 78, 192, 5, 36]


def test_bytes_of_a_small_compiled_program_are_those_it_must_send():
    where = mesh.make_mesh(4)
    gather = jax.shard_map(
        lambda rows: jax.lax.psum((jax.lax.all_gather(rows, where.axis_names) ** 2).sum(0), "data"),
        mesh=where,
        in_specs=mesh.batch_spec(where),
        out_specs=jax.P(("shard",)),
    )
    rows = jnp.asarray(np.ones((8, 16), np.float32))
    text = jax.jit(gather).lower(rows).compile().as_text()
    totals = traffic.received_by_kind(list(traffic.collectives(text, 4)))
    assert totals == {"all-gather": 3 * 2 * 16 * 4, "all-reduce": 2 * 0.75 * 2 * 16 * 4}


@pytest.mark.slow
def test_step_sends_what_the_estimate_says_and_near_negatives_do_not_grow_with_the_devices():
    changes = ["model.encoder=resnet10", "data.image_size=64"]
    elements = sum((64 // stride) ** 2 * 16 * stride for stride in (4, 8, 16))

    def totals(devices, negatives):
        config = traffic.config_of(devices, negatives, changes)
        text = traffic.compiled_step(config, mesh.make_mesh(devices)).as_text()
        found = list(traffic.collectives(text, devices))
        assert {c.computation for c in found} == {"main"}  # none in a loop, where once is not once
        return traffic.received_by_kind(found)

    step = estimate.Step(0.0, elements, 512, 0)
    near = {devices: totals(devices, "near") for devices in (2, 4)}
    batch = totals(4, "batch")
    exact = estimate.EXACT / estimate.WIRE  # float32 here, bfloat16 there
    for devices, found in near.items():
        maps = estimate.received(step, devices, "near")["maps"] * exact
        assert found["collective-permute"] == maps
    assert "collective-permute" not in batch
    gathered = {kind: batch[kind] - near[4][kind] for kind in ("all-gather", "reduce-scatter")}
    maps = estimate.received(step, 4, "batch")["maps"] * exact
    assert gathered == {"all-gather": maps / 2, "reduce-scatter": maps / 2}
    codes = estimate.received(step, 4, "near")["codes"]
    labels = near[4]["all-gather"] + near[4]["reduce-scatter"] - codes
    assert 0 < labels <= 4 * 64 * 4  # the labels of 64 images, as often as the losses want them
