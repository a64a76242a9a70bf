"""`onnx.checker` without the weights: the same verdict as with them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper as helper
import pytest

from graphopt.emit import check_model
from graphopt.ir.model_file import load_model
from tests.rewriting import parse

LARGE = np.zeros((64, 64), np.float32)
PLAIN = "g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }"


def large(text: str) -> onnx.ModelProto:
    proto = parse(text)
    proto.graph.initializer.append(helper.from_array(LARGE, "w"))
    return proto


def test_a_sound_model_passes() -> None:
    assert check_model(load_model(large(PLAIN))) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAIN.replace("MatMul(x, w)", "MatMul(x, w, w)"), "MatMul"),
        (PLAIN.replace("MatMul(x, w)", "MatMul<alpha = 1>(x, w)"), "alpha"),
        (PLAIN.replace("=> (float[N,64] y)", "=> (float[N,63] y)"), "63"),
    ],
    ids=["arity", "attribute", "shape"],
)
def test_a_fault_is_told_in_one_line(text: str, words: str) -> None:
    fault = check_model(load_model(large(text)))
    assert fault is not None
    assert words in fault
    assert "\n" not in fault


def test_an_overridable_default_stays_an_input() -> None:
    proto = large("g (float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul(x, w) }")
    assert check_model(load_model(proto)) is None


def test_weights_in_constant_nodes_and_branches() -> None:
    proto = parse("""g (bool c, float[N,64] x) => (float[N,64] y) {
        y = If (c) <then_branch = a () => (float[N,64] p) { p = MatMul(x, v) },
                    else_branch = b () => (float[N,64] q) { k = Constant<value = float[1] {0}>()  q = MatMul(x, k) }>
    }""")
    branches = {attribute.name: attribute.g for attribute in proto.graph.node[0].attribute}
    branches["then_branch"].initializer.append(helper.from_array(LARGE, "v"))
    constant = branches["else_branch"].node[0]
    constant.attribute[0].t.CopyFrom(helper.from_array(LARGE, "value"))
    onnx.checker.check_model(proto, full_check=True)
    assert check_model(load_model(proto)) is None


def test_a_dtype_of_the_future_is_told() -> None:
    proto = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.elem_type = 99
    assert check_model(load_model(proto)) == "Invalid tensor data type 99."
