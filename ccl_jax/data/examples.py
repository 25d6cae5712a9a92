"""The records of prepared shards taken apart: tf.train.Example, described to protobuf here.

tensorflow-datasets, which writes them, is not asked to read them: while it is being imported,
`builtins.__import__` is another function, and what a second thread imports meanwhile is a stand-in
that cannot be called. The threads of an input pipeline, which all begin at once, met that.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_FIELD = descriptor_pb2.FieldDescriptorProto
_BYTES, _MESSAGE = _FIELD.TYPE_BYTES, _FIELD.TYPE_MESSAGE
_ONE, _MANY = _FIELD.LABEL_OPTIONAL, _FIELD.LABEL_REPEATED


def bytes_of(example: bytes, feature: str) -> bytes:
    """The first value of a feature of bytes in a serialised tf.train.Example.

    Raises:
        ValueError: These bytes are no Example, or it has no such feature.
    """
    try:
        features = _Example.FromString(example).features.feature
    except DecodeError as error:
        raise ValueError(f"no tf.train.Example: {error}") from error
    if feature not in features or not features[feature].bytes_list.value:
        raise ValueError(f"it holds {sorted(features)}, and no {feature!r}")
    value: bytes = features[feature].bytes_list.value[0]
    return value


def _message_class() -> Any:
    """The class of Example without its numbers, which stay unread.

    Field numbers: tensorflow/core/example/example.proto and feature.proto of TensorFlow.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name="ccl_jax/example.proto", package="ccl_jax", syntax="proto3"
    )
    _add_field(file.message_type.add(name="BytesList"), "value", _MANY, _BYTES)
    _add_field(file.message_type.add(name="Feature"), "bytes_list", _ONE, "BytesList")
    features = file.message_type.add(name="Features")
    _add_field(features, "feature", _MANY, "Features.FeatureEntry")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    _add_field(entry, "key", _ONE, _FIELD.TYPE_STRING)
    _add_field(entry, "value", _ONE, "Feature")
    _add_field(file.message_type.add(name="Example"), "features", _ONE, "Features")
    pool = descriptor_pool.DescriptorPool()  # of its own, whatever else describes Example
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ccl_jax.Example"))


def _add_field(message: Any, name: str, label: int, kind: int | str) -> None:
    """Adds the next field, of a scalar type or of the named message."""
    field = message.field.add(name=name, number=len(message.field) + 1, label=label)
    if isinstance(kind, str):
        field.type, field.type_name = _MESSAGE, f".ccl_jax.{kind}"
    else:
        field.type = kind


_Example = _message_class()
