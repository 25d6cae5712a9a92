import numpy as np
import pytest
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.features import feature
from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example

from ccl_jax.data.examples import bytes_of


def serialised(**features):
    example = tf_example.Example()
    for name, values in features.items():
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}[type(values[0])]
        getattr(example.features.feature[name], kind).value.extend(values)
    return example.SerializeToString()


def test_bytes_are_found_beside_features_of_every_kind():
    example = serialised(image=[b"\0png", b"second"], label=[3, 4], crop=[0.5], mask=[b""])
    assert bytes_of(example, "image") == b"\0png"
    assert bytes_of(example, "mask") == b""


def test_an_example_of_the_serializer_is_read():
    spec = {"image": feature.TensorInfo((), np.object_), "label": feature.TensorInfo((), np.int64)}
    serializer = example_serializer.ExampleSerializer(spec)
    assert bytes_of(serializer.serialize_example({"image": b"png", "label": 7}), "image") == b"png"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (serialised(mask=[b"m"]), r"it holds \['mask'\], and no 'image'"),
        (serialised(image=[1]), r"it holds \['image'\], and no 'image'"),
        (b"", r"it holds \[\], and no 'image'"),
        (serialised(image=[b"png"])[:-1], "no tf.train.Example"),
    ],
)
def test_what_holds_no_such_bytes_is_refused(example, message):
    with pytest.raises(ValueError, match=message):
        bytes_of(example, "image")
