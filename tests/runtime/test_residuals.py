"""Sums of residual blocks, against a session that adds and rectifies one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.runtime import residuals
from graphopt.runtime.observing import Observer, block_size
from graphopt.runtime.residuals import Blocked, fuse_sums
from graphopt.runtime.session import Session, SessionOptions
from tests.rewriting import parse

SIZE = block_size()
BLOCK = f"""
g (float[n,{SIZE},6,5] x) => (float[n,{SIZE},6,5] y)
<float[{SIZE},{SIZE},3,3] v, float[{SIZE},{SIZE},1,1] u, float[{SIZE}] c> {{
  s = Conv<pads=[1,1,1,1]>(x, v)  r = Relu(s)  t = Conv(r, u, c)
  o = Add(t, r)  p = Relu(o)  q = Conv(p, u)  m = Add(q, p)  y = Relu(m)
}}"""
NAMES = ("r", "t", "p", "q", "y")
RNG = np.random.default_rng(0)


def test_sums_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def seen(graph: onnx.GraphProto, known: Any, block: int) -> None:
        fuse_sums(graph, known, block)
        made.append([node.op_type for node in graph.node])

    monkeypatch.setattr("graphopt.runtime.observing.fuse_sums", seen)
    model = parse(BLOCK, opset=13).SerializeToString()
    observer = Observer(model, NAMES)
    for count in (1, 2):
        feeds = {"x": RNG.normal(size=(count, SIZE, 6, 5)).astype(np.float32)}
        wanted = Session(model, options=SessionOptions(extra_outputs=NAMES)).run(feeds)
        for name, value in observer.run(feeds).items():
            np.testing.assert_allclose(value.plain, wanted[name], rtol=1e-4, atol=1e-4)
    assert all("Add" not in types for types in made)


def graph_of(text: str) -> onnx.GraphProto:
    return onnx.parser.parse_graph(text)


SUM = "g (float[n,8,h,w] t, float[n,8,h,w] r) => (float[n,8,h,w] y) {{ s = Add(t, r) {} }}"
KNOWN = {"t": Blocked(8, ("n", 8, 4, 4)), "r": Blocked(8, ("n", 8, 4, 4))}


def types(text: str, known: dict[str, Blocked]) -> list[str]:
    graph = graph_of(text)
    fuse_sums(graph, known, 8)
    return [node.op_type for node in graph.node]


def test_an_add_before_a_relu_becomes_a_convolution_by_channel() -> None:
    graph = graph_of(SUM.format("y = Relu(s)"))
    fuse_sums(graph, KNOWN, 8)
    (node,) = graph.node
    assert (node.op_type, node.domain) == ("Conv", residuals.NCHWC)
    assert list(node.input) == ["t", graph.initializer[0].name, "", "r"]
    assert list(node.output) == ["y"]


@pytest.mark.parametrize(
    ("rest", "known"),
    [
        ("y = Sigmoid(s)", KNOWN),
        ("z = Relu(s)  y = Mul(z, s)", KNOWN),  # the sum is read twice
        ("y = Relu(s)", {"t": KNOWN["t"]}),  # the other operand lies as ONNX says
        ("y = Relu(s)", KNOWN | {"r": Blocked(8, ("n", 8, 1, 1))}),  # broadcast
        ("y = Relu(s)", {name: Blocked(6, ("n", 6, 4, 4)) for name in "tr"}),  # padded
    ],
)
def test_other_sums_stay(rest: str, known: dict[str, Blocked]) -> None:
    assert types(SUM.format(rest), known)[0] == "Add"


def test_a_sum_that_is_an_output_stays() -> None:
    text = SUM.format("y = Relu(s)").replace("=> (", "=> (float[n,8,h,w] s, ")
    assert types(text, KNOWN) == ["Add", "Relu"]
