"""Calls of local functions: no circles, and an end in sight."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from graphopt.errors import ModelError
from graphopt.ir.calls import MAX_NODES
from graphopt.ir.model_file import load_model

HEAD = '<ir_version: 10, opset_import: ["" : 21, "l" : 1]> '
FUNCTION = '<domain: "l", opset_import: ["" : 21, "l" : 1]> '
MAIN = "g (float[N] x) => (float[N] y) { y = l.F(x) } "


def parse(main: str, *functions: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + main + " ".join(FUNCTION + each for each in functions))


def doubling(count: int) -> onnx.ModelProto:
    """A model of 2^count nodes, in as many functions."""
    functions = ["F0 (a) => (b) { b = Neg(a) }"]
    functions += [
        f"F{i} (a) => (b) {{ c = l.F{i - 1}(a) b = l.F{i - 1}(c) }}" for i in range(1, count + 1)
    ]
    return parse(MAIN.replace("l.F", f"l.F{count}"), *reversed(functions))


@pytest.mark.parametrize(
    ("functions", "circle"),
    [
        (["F (a) => (b) { b = l.F(a) }"], "l:F <- l:F"),
        (["F (a) => (b) { b = l.G(a) }", "G (a) => (b) { b = l.F(a) }"], "l:F <- l:G <- l:F"),
        (
            [
                "F (a) => (b) { c = Greater(a, a) b = If<then_branch = t () => (d) { d = l.F(a) },"
                " else_branch = e () => (h) { h = Neg(a) }>(c) }"
            ],
            "l:F <- l:F",
        ),
    ],
    ids=["itself", "each other", "in a branch"],
)
def test_functions_that_call_themselves_are_refused(functions: list[str], circle: str) -> None:
    with pytest.raises(
        ModelError, match=f"bytes: functions call one another in a circle: {circle}; "
    ):
        load_model(parse(MAIN, *functions).SerializeToString())


@pytest.mark.parametrize("count", [20, 60, 500])
def test_functions_without_end_are_refused(count: int) -> None:
    with pytest.raises(ModelError, match=f"more than {MAX_NODES} nodes, which no runtime can take"):
        load_model(doubling(count))


def test_functions_that_call_others_are_read() -> None:
    assert len(load_model(doubling(10)).functions) == 11


def test_an_overload_is_another_function() -> None:
    proto = parse(MAIN, "F (a) => (b) { b = l.F(a) }")
    proto.functions[0].overload = proto.graph.node[0].overload = "wide"
    other = proto.functions.add()
    other.CopyFrom(proto.functions[0])
    other.overload = ""
    other.node[0].op_type, other.node[0].domain = "Neg", ""
    assert len(load_model(proto).functions) == 2
