"""Models run from memory give what their files give; weights are lent, not copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.ir.model_file import load_model, save_model
from graphopt.runtime.in_memory import model_session
from graphopt.runtime.session import Session

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
TEXT = "g (float[n,64] x, bool c) => (float[n,64] y) { m = MatMul(x, w) y = If (c) <{}> }"
BRANCHES = """then_branch = t () => (float[n,64] p) { p = Add(m, w0) },
              else_branch = e () => (float[n,64] q) { q = Identity(m) }"""


def model() -> ir.Model:
    made = ir.from_proto(onnx.parser.parse_model(HEAD + TEXT.replace("{}", BRANCHES)))
    rng = np.random.default_rng(0)
    for name, shape in (("w", (64, 64)), ("w0", (64,)), ("unused", (64, 64))):
        value = next((v for v in _captured(made) if v.name == name), ir.Value(name=name))
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        made.graph.register_initializer(value)
    return made


def _captured(made: ir.Model) -> list[ir.Value]:
    nodes = [*made.graph, *(n for n in ir.traversal.RecursiveGraphIterator(made.graph))]
    return [value for node in nodes for value in node.inputs if value is not None]


@pytest.mark.parametrize("way", [True, False])
def test_a_model_in_memory_is_its_file(tmp_path: Path, *, way: bool) -> None:
    feed = {"x": np.ones((3, 64), np.float32), "c": np.array(way)}
    path = save_model(model(), tmp_path / "m.onnx")[0]
    held = load_model(path)
    session = model_session(held, ["m"])
    ours, theirs = session.run(feed), Session(path).run(feed)
    np.testing.assert_array_equal(ours["y"], theirs["y"])
    assert ours["m"].shape == (3, 64)


def test_what_the_runtime_refuses_is_said() -> None:
    made = ir.from_proto(
        onnx.parser.parse_model(HEAD + "g (float[2] x) => (float[2] y) { y = Abs(x) }")
    )
    next(iter(made.graph)).op_type = "Nonsense"
    with pytest.raises(ModelError, match="Nonsense"):
        model_session(made)
