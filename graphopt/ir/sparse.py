"""Constants kept as (values, indices): what ONNX calls a sparse tensor."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir.mapped import HeldTensor, Notes
from graphopt.ir.spill import Spill

_INDEX_TYPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT16, ir.DataType.INT8)


class CooTensor(HeldTensor):
    """A tensor of `dims`, zero except at `indices`; the dense form is made on demand and not kept alive.

    `values`: [NNZ], any dtype. `indices`: integer, [NNZ] into the flattened tensor or [NNZ, rank]; both
    are written back as they came. `packed`: the indices stand in the file as packed integers (`int64_data`), one byte
    for every 7 bits, in place of eight bytes each. `in_node`: it was read from a Constant
    node. `nbytes` is that of the dense form, as for any tensor of this shape.
    Source: SparseTensorProto of onnx.proto. Indices narrower than int64 are not in the standard, but ONNX
    Runtime writes them.
    """

    __slots__ = ("_dense", "in_node", "indices", "packed", "values")

    def __init__(
        self,
        values: ir.TensorProtocol,
        indices: ir.TensorProtocol,
        dims: Sequence[int],
        *,
        name: str | None = None,
        packed: bool = False,
    ) -> None:
        """Checks that the parts fit together.

        Raises:
            ModelError: a shape or dtype does not fit, an index lies outside `dims` or occurs twice.
        """
        super().__init__(values.dtype, dims, Notes(name=name), (values, indices))
        self.values = values
        self.indices = indices
        self.packed = packed
        self.in_node = False
        self._dense: weakref.ref[np.ndarray[Any, Any]] | None = None
        self._check()

    @property
    def nnz(self) -> int:
        """The number of stored elements."""
        return int(self.values.size)

    def positions(self) -> np.ndarray[Any, Any]:
        """[NNZ] int64: where in the flattened dense tensor each value belongs."""
        indices = self.indices.numpy().astype(np.int64, copy=False)
        if indices.ndim == 1:
            return indices
        dims = self.dims
        strides = np.array([math.prod(dims[axis + 1 :]) for axis in range(len(dims))], np.int64)
        return np.asarray(indices @ strides, np.int64)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The dense elements, read-only; shared while somebody holds them."""
        dense = self._dense() if self._dense is not None else None
        if dense is None:
            dense = np.zeros(self.size, self.dtype.numpy())
            if self.dtype == ir.DataType.STRING:
                dense[:] = b""
            dense[self.positions()] = self.values.numpy()
            dense = dense.reshape(self.dims)
            dense.flags.writeable = False
            self._dense = weakref.ref(dense)
        return dense

    def tobytes(self) -> bytes:
        """The dense elements in the form of `raw_data`."""
        return ir.Tensor(self.numpy(), self.dtype).tobytes()

    def _check(self) -> None:
        dims, nnz = self.dims, self.values.size
        if len(self.values.shape) != 1:
            raise self._misfit(f"values have rank {len(self.values.shape)}, not 1")
        if self.indices.dtype not in _INDEX_TYPES:
            raise self._misfit(f"indices are {self.indices.dtype}, not INT64")
        if self.indices.shape.numpy() not in ((nnz,), (nnz, len(dims))):
            raise self._misfit(
                f"indices are {self.indices.shape}, not [{nnz}] or [{nnz},{len(dims)}]"
            )
        indices = self.indices.numpy()
        bounds = np.array(dims if indices.ndim == 2 else [self.size], np.int64)
        if nnz and bool(((indices < 0) | (indices >= bounds)).any()):
            raise self._misfit(
                f"an index lies outside {list(bounds)}: {int(indices.min())}..{int(indices.max())}"
            )
        steps = np.diff(self.positions())
        if not bool((steps > 0).all()) and np.unique(self.positions()).size != nnz:
            raise self._misfit("an index occurs twice, so the element has no one value")

    def _misfit(self, what: str) -> ModelError:
        return ModelError(
            f"sparse tensor {self.name!r} of dims {list(self.dims)} with {self.values.size} values: {what}; "
            "write the tensor again with one int64 index per value"
        )


MASKED_BYTES = 1 << 20
"""Arrays of this size are kept as a mask and values where that takes at most three quarters of the bytes."""


def thin(array: np.ndarray[Any, Any], dtype: ir.DataType, name: str | None) -> ir.TensorProtocol:
    """The array as a tensor in memory, the zeros of large ones not held; of a dtype whose elements fill whole bytes."""
    if array.nbytes >= MASKED_BYTES:
        flat = np.ascontiguousarray(array).reshape(-1)
        kept = np.count_nonzero(flat.view(f"u{flat.dtype.itemsize}"))
        if kept * flat.dtype.itemsize + flat.size / 8 <= 0.75 * array.nbytes:
            return MaskedTensor(array, dtype, name)
    return ir.Tensor(array, dtype, name=name)


class MaskedTensor(HeldTensor):
    """A tensor that is mostly zero, out of the way: one bit an element and the values that are not +0.0, spilled.

    For models in the making: a file never sees it.  The dense form is made on demand and not kept alive.
    """

    __slots__ = ("_dense", "_spill", "held_bytes")

    def __init__(self, array: np.ndarray[Any, Any], dtype: ir.DataType, name: str | None) -> None:
        """Keeps what is needed of `array`, of which elements fill whole bytes."""
        super().__init__(dtype, array.shape, Notes(name=name), None)
        flat = np.ascontiguousarray(array).reshape(-1)
        kept = flat.view(f"u{flat.dtype.itemsize}") != 0
        parts = (np.packbits(kept), flat[kept])
        self.held_bytes = sum(part.nbytes for part in parts)
        """What it takes, in a file or in memory."""
        self._spill = Spill(parts)
        self._dense: weakref.ref[np.ndarray[Any, Any]] | None = None

    def numpy(self) -> np.ndarray[Any, Any]:
        """The dense elements, read-only; shared while somebody holds them."""
        dense = self._dense() if self._dense is not None else None
        if dense is None:
            bits, values = self._spill.arrays()
            dense = np.zeros(self.size, values.dtype)
            dense[np.unpackbits(bits, count=self.size).astype(bool)] = values
            self._spill.rest()
            dense = dense.reshape(self.dims)
            dense.flags.writeable = False
            self._dense = weakref.ref(dense)
        return dense

    def tobytes(self) -> bytes:
        """The dense elements in the form of `raw_data`."""
        return ir.Tensor(self.numpy(), self.dtype).tobytes()
