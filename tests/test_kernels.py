"""The table of single computations is made of what this package uses."""

import functools

import jax
import numpy as np
import pytest

from ccl_jax.models import layers
from ccl_jax.models.initial import Draws
from ccl_jax.scoring import convolutions_on_all_cores
from tests.reference import kernels


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "SCALES", {"a network": ((8, 6), (4, 5))})
    monkeypatch.setattr(kernels, "BLOCKS", (3, 32))
    monkeypatch.setattr(kernels, "CONVOLUTIONS", ((2, 3), (8, 2)))
    monkeypatch.setattr(kernels, "ENCODERS", (("resnet10", 64),))


def test_every_form_of_the_search_finds_the_same_matches(small):
    rows = list(kernels.searches(images=2, repeats=1))
    assert len(rows) == 6 and {row.what for row in rows} == {"search, a network, 2 images"}
    assert all(row.milliseconds > 0 for row in rows)
    assert all(" 0.00% other" in row.note for row in rows), rows


def test_the_page_gets_all_rows(small, tmp_path, capsys):
    page = tmp_path / "page.md"
    kernels.main(["--images=2", "--repeats=1", f"--page={page}"])
    text = page.read_text()
    assert "### Single computations" in text
    assert f"`python -m tests.reference.kernels --images=2 --repeats=1 --page={page}`" in text
    printed = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert (
        len(printed)
        == 4 + 4 + 2 + (4 if convolutions_on_all_cores() else 0) + 6
        == text.count(" | ") // 3 - 1
    )


@pytest.mark.parametrize(("side", "convolves"), [(4, False), (5, True), (8, True)])
def test_layers_take_products_of_patches_for_small_maps_as_the_table_says(side, convolves):
    conv = layers.Conv(2, 3, 3, dtype=None, draws=Draws(jax.random.key(0)))
    program = jax.make_jaxpr(conv)(np.zeros((1, side, side, 2), np.float32))
    assert ("conv_general_dilated" in str(program)) == convolves == (side > layers.SMALL)


def test_the_table_marks_the_convolution_that_layers_take(small):
    rows = list(kernels.convolutions(images=2, repeats=1))
    assert [row.form for row in rows if row.note == "taken"] == [
        "product of patches",
        "convolution",
    ]
    table = kernels.markdown([*rows, *kernels.precisions(repeats=1)])
    assert table.count("TFLOP/s") == 4 and table.count("\n") == 2 + 4 + 4


def test_both_forms_of_a_convolution_have_the_same_values_and_gradients():
    inputs = kernels.normal(0, 2, 8, 8, 3), kernels.normal(1, 3, 3, 3, 4)
    one, other = (
        jax.tree.leaves(kernels.forward_and_backward(form)(*inputs))
        for form in (
            kernels.convolution,
            functools.partial(layers.of_patches, stride=1),
        )
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
