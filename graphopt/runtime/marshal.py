"""Values between Python and ONNX Runtime, for the dtypes that NumPy does not know as well.

NumPy arrays cover most dtypes. bfloat16, float8, float4 and the sub-byte integers travel as `OrtValue`s
whose memory is written and read as bytes; in Python they are `ml_dtypes` arrays, one element an item.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.runtime import onnxruntime_api

_D = ir.DataType
EXOTIC = frozenset(
    (
        _D.BFLOAT16,
        _D.FLOAT8E4M3FN,
        _D.FLOAT8E4M3FNUZ,
        _D.FLOAT8E5M2,
        _D.FLOAT8E5M2FNUZ,
        _D.FLOAT8E8M0,
        _D.FLOAT4E2M1,
        _D.INT4,
        _D.UINT4,
        _D.INT2,
        _D.UINT2,
    )
)
"""Dtypes that ONNX Runtime 1.31 neither takes from nor gives to NumPy as what they are."""


def to_runtime(array: np.ndarray[Any, Any], dtype: ir.DataType) -> Any:  # noqa: ANN401
    """An `OrtValue` that owns a copy of the array; `array` holds one element an item."""
    value = onnxruntime_api.runtime().OrtValue.ortvalue_from_shape_and_type(
        list(array.shape), int(dtype)
    )
    payload = _packed(array, dtype)
    if payload:
        ctypes.memmove(value.data_ptr(), payload, len(payload))
    return value


def from_runtime(value: Any) -> np.ndarray[Any, Any]:  # noqa: ANN401
    """The array that a tensor `OrtValue` holds, copied."""
    dtype = ir.DataType(value.element_type())
    if dtype not in EXOTIC:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.zeros(shape, dtype.numpy())
    payload = ctypes.string_at(value.data_ptr(), -(-count * dtype.bitwidth // 8))
    return ir.Tensor(_unpacked(payload, dtype, count).reshape(shape), dtype=dtype).numpy()


def _packed(array: np.ndarray[Any, Any], dtype: ir.DataType) -> bytes:
    contiguous = np.ascontiguousarray(array)
    return bytes(ir.Tensor(contiguous.astype(dtype.numpy(), copy=False), dtype=dtype).tobytes())


def _unpacked(payload: bytes, dtype: ir.DataType, count: int) -> np.ndarray[Any, Any]:
    """Elements of a little-endian payload; the first element of a byte sits in its low bits."""
    bits = dtype.bitwidth
    if bits >= 8:
        return np.frombuffer(payload, dtype.numpy(), count)
    data = np.frombuffer(payload, np.uint8)
    lanes = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    codes = np.stack(lanes, axis=-1).reshape(-1)[:count]
    if dtype in {_D.INT4, _D.INT2}:
        half = 1 << (bits - 1)
        return ((codes.astype(np.int8) ^ half) - half).astype(dtype.numpy())
    if dtype in {_D.UINT4, _D.UINT2}:
        return codes.astype(dtype.numpy())
    return codes.view(dtype.numpy())
