import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError

from ccl_jax.models.trees import (
    check_same_tree,
    flatten,
    load_tree,
    read_made,
    save_tree,
    unflatten,
)

TREE = {"a": {"kernel": np.zeros((2, 3), np.float32), "bias": np.ones(3, np.float32)}}


def test_equal_trees_pass_whatever_holds_them():
    check_same_tree(TREE, {"a": {key: jnp.asarray(leaf) for key, leaf in TREE["a"].items()}}, "It")


def test_all_differences_are_listed_at_once():
    got = {
        "a": {"kernel": np.zeros((3, 2), np.float32), "weight": np.ones(3, np.float32)},
        "b": np.zeros(1, np.int32),
    }
    with pytest.raises(
        ValueError, match=r"^The file .* \(4 differences, the model has 2"
    ) as caught:
        check_same_tree(TREE, got, "The file")
    message = str(caught.value)
    assert "missing    a/bias ((3,), 'float32')" in message
    assert "unexpected a/weight" in message
    assert "unexpected b ((1,), 'int32')" in message
    assert "differs    a/kernel: want ((2, 3), 'float32'), got ((3, 2), 'float32')" in message


def test_other_dtype_of_the_same_shape_is_a_difference():
    got = {"a": TREE["a"] | {"bias": np.ones(3, np.float64)}}
    with pytest.raises(ValueError, match=r"a/bias.*float64"):
        check_same_tree(TREE, got, "The file")


def test_flat_names_lead_back_to_the_tree():
    assert set(flatten(TREE)) == {"a/kernel", "a/bias"}
    assert unflatten(flatten(TREE)) == TREE


def test_saved_tree_reads_back_whatever_its_memory_order(tmp_path):
    tree = {"a": {"turned": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}, "b": jnp.int32(4)}
    save_tree(tmp_path / "tree.safetensors", tree)
    again = load_tree(tmp_path / "tree.safetensors")
    np.testing.assert_array_equal(again["a"]["turned"], tree["a"]["turned"])
    assert again["b"].shape == ()
    assert again["b"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["tree.safetensors"]


def test_file_says_how_it_was_made_in_the_same_bytes_each_time(tmp_path):
    made = {"steps": 3, "kinds": ["a", "b"], "nothing": None}
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in files:
        save_tree(path, TREE, made)
        assert read_made(path) == made
    assert files[0].read_bytes() == files[1].read_bytes()


def test_files_of_other_programs_say_nothing(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "b", metadata={"format": "pt"})
    (tmp_path / "no.pth").write_bytes(b"no such file")
    assert read_made(tmp_path / "b") == read_made(tmp_path / "no.pth") == {}


def test_failed_save_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "tree.safetensors"
    save_tree(path, TREE)
    with pytest.raises(SafetensorError, match="dtype"):
        save_tree(path, {"text": np.array(["no"])})
    assert set(flatten(load_tree(path))) == set(flatten(TREE))
    assert [file.name for file in tmp_path.iterdir()] == ["tree.safetensors"]


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "tree.safetensors"
    save_tree(path, TREE)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tree\.safetensors cannot be read"):
        load_tree(path)
