"""Questions about values: is it constant, what does it hold, how large is it.

A value is constant when no feed can change it: an initializer that is not also a graph input, or
the output of a `Constant` node. Every question looks at the size before it touches the data, so
that asking whether a mapped weight of 100 MB is the scalar 1.0 costs nothing.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

Array: TypeAlias = np.ndarray[Any, Any]
Number: TypeAlias = float | int | bool

_CHUNK = (
    1 << 16
)  # elements compared at a time: the first difference ends the reading of a mapped weight


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a value that no feed can change, or None.

    An initializer that is also a graph input is a default, not a constant (ONNX IR version 4 and
    later).
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain:
        return None
    return _constant_of_node(node)


def is_constant(value: ir.Value | None) -> bool:
    """Whether no feed can change the value."""
    return constant(value) is not None


def array(value: ir.Value | None) -> Array | None:
    """The elements of a constant value, or None; ml_dtypes for bfloat16, float8, int4 and so on.

    The array may be a read-only view of the file: copy before writing. Strings come as an object
    array of bytes.
    """
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> Number | None:
    """The one element of a constant numeric or boolean value of any rank, or None."""
    tensor = constant(value)
    return None if tensor is None else tensor_scalar(tensor)


def tensor_scalar(tensor: ir.TensorProtocol) -> Number | None:
    """The only element of a tensor as a Python number; None if several, string or complex."""
    if tensor.size != 1 or not _is_real(tensor.dtype):
        return None
    element = tensor.numpy().reshape(())[()]
    if tensor.dtype == ir.DataType.BOOL:
        return bool(element)
    return int(element) if tensor.dtype.is_integer() else float(element)


def is_filled_with(value: ir.Value | None, number: Number, *, signed_zero: bool = False) -> bool:
    """Whether every element of a constant value equals `number`; False for an empty tensor.

    NaN equals NaN. With `signed_zero`, 0.0 and -0.0 differ.
    """
    tensor = constant(value)
    if tensor is None or tensor.size == 0 or not _is_real(tensor.dtype):
        return False
    elements = tensor.numpy().reshape(-1)
    chunks = (elements[i : i + _CHUNK] for i in range(0, elements.size, _CHUNK))
    # The first element alone settles nearly every question: read that page before any other.
    return _all_equal(elements[:1], number, signed_zero) and all(
        _all_equal(chunk, number, signed_zero) for chunk in chunks
    )


def fill(value: ir.Value | None) -> float | None:
    """The number that every element of a constant value equals (0.0 and -0.0 differ), or None."""
    tensor = constant(value)
    if tensor is None or tensor.size == 0 or not _is_real(tensor.dtype):
        return None
    first = tensor.numpy().reshape(-1)[0]
    number = float(first)
    if tensor.size == 1:  # most that are asked about
        same = int(number) == int(first) if first.dtype.kind in "iub" else not math.isnan(number)
        return number if same else None
    filled = not math.isnan(number) and is_filled_with(value, number, signed_zero=True)
    return number if filled else None


def size_bytes(tensor: ir.TensorProtocol) -> int:
    """Bytes that the elements take in a file, without reading them (strings: total length)."""
    return int(tensor.nbytes)


def _constant_of_node(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a `Constant` node."""
    for name, attribute in node.attributes.data.items():
        return None if attribute.is_ref() else constant_of_attribute(name, attribute)
    return None


def constant_of_attribute(name: str, attribute: ir.Attr) -> ir.TensorProtocol | None:
    """The tensor that an attribute of a `Constant` node gives it, or None for another attribute.

    Args:
        name: how the node calls the attribute: value, value_int, value_floats, …
        attribute: what it holds.
    """
    if name in ("value", "sparse_value"):
        # The type says it: asking a runtime-checkable protocol takes a third of a millisecond.
        return attribute.value if attribute.type == ir.AttributeType.TENSOR else None
    if name in ("value_float", "value_floats"):
        return ir.Tensor(np.asarray(attribute.value, dtype=np.float32))
    if name in ("value_int", "value_ints"):
        return ir.Tensor(np.asarray(attribute.value, dtype=np.int64))
    if name == "value_string":
        return ir.StringTensor([attribute.as_string().encode()], shape=ir.Shape([]))
    if name == "value_strings":
        texts = [text.encode() for text in attribute.as_strings()]
        return ir.StringTensor(texts, shape=ir.Shape([len(texts)]))
    return None


def _is_real(dtype: ir.DataType) -> bool:
    """Whether the elements are numbers or booleans with an order."""
    return dtype not in (
        ir.DataType.UNDEFINED,
        ir.DataType.STRING,
        ir.DataType.COMPLEX64,
        ir.DataType.COMPLEX128,
    )


def _all_equal(elements: Array, number: Number, signed_zero: bool) -> bool:
    """Whether all elements equal a number, in float64 or, for integers, exactly."""
    exact = elements.dtype.kind in "iub"
    wide = elements if exact else elements.astype(np.float64)
    if isinstance(number, float) and math.isnan(number):
        return not exact and bool(np.isnan(wide).all())
    if exact and isinstance(number, float) and not number.is_integer():
        return False
    number = int(number) if exact else number  # NumPy would compare int64 with float in float64
    if not bool((wide == number).all()):
        return False
    if number == 0 and signed_zero and not exact:
        return bool((np.signbit(wide) == (math.copysign(1.0, number) < 0)).all())
    return True
