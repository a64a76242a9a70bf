"""Constants kept as values and indices."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.ir.mapped import PackedIntegers
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.sparse import CooTensor, MaskedTensor, thin


def coo(
    values: object, indices: object, dims: list[int], dtype: ir.DataType | None = None
) -> CooTensor:
    array = np.asarray(values, np.float32) if dtype is None else np.asarray(values)
    return CooTensor(
        ir.Tensor(array, dtype), ir.Tensor(np.asarray(indices, np.int64)), dims, name="w"
    )


@pytest.mark.parametrize("indices", [[1, 5], [[0, 1], [1, 2]]], ids=["linear", "by-axis"])
def test_both_index_layouts_give_the_same_dense_tensor(indices: object) -> None:
    tensor = coo([1.5, -2], indices, [2, 3])
    np.testing.assert_array_equal(tensor.numpy(), [[0, 1.5, 0], [0, 0, -2]])
    assert tensor.tobytes() == np.array([0, 1.5, 0, 0, 0, -2], "<f4").tobytes()
    assert (tensor.nnz, tensor.size, tensor.nbytes, tensor.shape) == (2, 6, 24, ir.Shape([2, 3]))


def test_no_values_make_a_tensor_of_zeros() -> None:
    np.testing.assert_array_equal(coo([], np.zeros(0), [2, 2]).numpy(), np.zeros((2, 2)))
    np.testing.assert_array_equal(coo([], np.zeros((0, 2)), [2, 2]).numpy(), np.zeros((2, 2)))


def test_indices_may_come_in_any_order() -> None:
    np.testing.assert_array_equal(coo([1, 2], [3, 0], [4]).numpy(), [2, 0, 0, 1])


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, np.int8, np.bool_, np.complex64, ml_dtypes.bfloat16]
)
def test_any_dtype_of_values(dtype: type) -> None:
    tensor = CooTensor(ir.Tensor(np.ones(1, dtype)), ir.Tensor(np.array([1])), [3])
    assert tensor.numpy().dtype == dtype
    assert tensor.numpy().tolist() == np.array([0, 1, 0]).astype(dtype).tolist()


def test_values_below_a_byte_are_packed_in_the_bytes() -> None:
    values = ir.Tensor(np.array([3, -1], ml_dtypes.int4), ir.DataType.INT4)
    tensor = CooTensor(values, ir.Tensor(np.array([0, 3])), [5])
    assert tensor.tobytes() == bytes([0x03, 0xF0, 0x00])
    assert tensor.nbytes == 3


def test_strings_are_empty_where_nothing_is_stored() -> None:
    tensor = CooTensor(ir.StringTensor([b"a"], shape=ir.Shape([1])), ir.Tensor(np.array([1])), [2])
    assert tensor.numpy().tolist() == [b"", b"a"]


def test_the_dense_form_is_shared_while_held_and_cannot_be_written() -> None:
    tensor = coo([1], [0], [4])
    dense = tensor.numpy()
    assert tensor.numpy() is dense
    with pytest.raises(ValueError, match="read-only"):
        dense[0] = 2
    del dense
    gc.collect()
    assert tensor._dense is not None
    assert tensor._dense() is None


def test_packed_indices_of_a_file_are_not_held_unpacked() -> None:
    at = np.arange(0, 90_000, 3)
    dense = np.zeros(90_000, np.float32)
    dense[at] = at
    held = CooTensor(
        ir.Tensor(dense[at], name="w"), ir.Tensor(at), [300, 300], name="w", packed=True
    )
    value = ir.Value(name="w", const_value=held)
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], name="g"), ir_version=8)
    data = model_to_bytes(model)
    tensor = load_model(data).graph.initializers["w"].const_value
    assert isinstance(tensor, CooTensor)
    assert isinstance(tensor.indices, PackedIntegers)
    assert tensor.indices._elements() is None
    elements = tensor.indices.numpy()
    assert tensor.indices.numpy() is elements
    assert elements.tolist() == at.tolist()
    assert tensor.indices.tobytes() == at.astype("<i8").tobytes()
    np.testing.assert_array_equal(tensor.numpy(), dense.reshape(300, 300))


def test_array_protocols_read_the_dense_form() -> None:
    tensor = coo([1], [0], [2])
    assert np.array(tensor, np.int64).tolist() == [1, 0]
    assert np.from_dlpack(tensor).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "indices", "dims", "says"),
    [
        ([1, 2], [0, 4], [4], "an index lies outside"),
        ([1, 2], [-1, 0], [4], "an index lies outside"),
        ([1, 2], [[0, 0], [0, 3]], [2, 3], "an index lies outside"),
        ([1, 2], [1, 1], [4], "an index occurs twice"),
        ([1, 2], [[1, 1], [1, 1]], [2, 2], "an index occurs twice"),
        ([1, 2], [1], [4], "indices are"),
        ([1, 2], [[0], [1]], [2, 2], "indices are"),
        ([[1, 2]], [0, 1], [4], "values have rank 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    values: object, indices: object, dims: list[int], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        coo(values, indices, dims)


def test_float_indices_are_refused() -> None:
    with pytest.raises(ModelError, match="indices are FLOAT, not INT64"):
        CooTensor(ir.Tensor(np.ones(1)), ir.Tensor(np.ones(1, np.float32)), [2])


class TestMasked:
    @pytest.mark.parametrize(
        "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8]
    )
    def test_keeps_every_bit(self, dtype: type) -> None:
        array: np.ndarray[Any, Any] = np.zeros((5, 7), dtype)
        array[1, 2], array[4, 6] = 3, -2
        if np.dtype(dtype).kind != "i":
            array[0, 0], array[2, 2] = -0.0, np.nan
        tensor = MaskedTensor(array, ir.DataType.from_numpy(np.dtype(dtype)), "w")
        assert tensor.tobytes() == array.tobytes()
        assert (tensor.name, tensor.dims, tensor.nbytes) == ("w", (5, 7), array.nbytes)
        assert tensor.held_bytes == 5 + (4 if np.dtype(dtype).kind != "i" else 2) * array.itemsize

    @pytest.mark.parametrize(
        ("share", "size", "kind"),
        [(0.9, 600, MaskedTensor), (0.2, 600, ir.Tensor), (0.9, 9, ir.Tensor)],
    )
    def test_large_arrays_with_many_zeros_are_held_without_them(
        self, share: float, size: int, kind: type
    ) -> None:
        array = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
        array[: int(share * size)] = 0
        tensor = thin(array, ir.DataType.FLOAT, "w")
        assert type(tensor) is kind
        assert tensor.tobytes() == array.tobytes()

    def test_the_dense_form_is_shared_while_held(self) -> None:
        tensor = MaskedTensor(np.eye(3, dtype=np.float32), ir.DataType.FLOAT, "w")
        dense = tensor.numpy()
        assert tensor.numpy() is dense
        with pytest.raises(ValueError, match="read-only"):
            dense[0] = 2
