"""Passes that do wrong, and models on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from graphopt.ir.build import Builder
from graphopt.numerics import Numerics
from graphopt.pipeline import RewritePass
from graphopt.pipeline.recipe import Recipe
from graphopt.rewrite import Context, Match, Op, Var, exact
from tests.rewriting import parse, run

HEAD = '<ir_version: 9, opset_import: ["" : 18]>\n'
PLAIN = "g (float[N,4] x) => (float[N,4] y) { a = Abs(x)  b = Identity(a)  c = Exp(b)  y = Neg(c) }"

x = Var()


@dataclasses.dataclass(frozen=True)
class Loose:
    """A pass as a user may write it: it does what `act` does, and says that it changed something."""

    name: str
    act: Callable[[ir.Model, Context], object]
    numerics: Numerics = Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        self.act(model, ctx)
        return True


def double(name: str, op_type: str) -> RewritePass:
    """A pass of one rule, `wrong`, that puts Mul(x, 2) where an operator was."""
    pattern = Op(op_type, x)

    @exact(pattern)
    def wrong(m: Match, g: Builder) -> ir.Value:
        return g.op("Mul", m[x], g.const(np.float32(2)))

    return RewritePass(name, (wrong,))


def only(*steps: Any) -> Recipe:
    """A recipe that runs nothing else."""
    return Recipe(pipeline=tuple(steps))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model with an Identity in the middle."""
    return put(tmp_path / "in" / "source.onnx", PLAIN)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to write."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "out.onnx"


def put(path: Path, text: str) -> Path:
    """Writes a model given in ONNX text."""
    path.parent.mkdir(exist_ok=True)
    onnx.save(parse(text), path)
    return path


def operators(path: Path | ir.Model) -> list[str]:
    if isinstance(path, ir.Model):
        return [node.op_type for node in path.graph]
    return [node.op_type for node in onnx.load(path).graph.node]


def same(before: Path, after: Path, feed: dict[str, npt.NDArray[Any]]) -> None:
    """Asserts that two files compute the same."""
    for one, other in zip(run(onnx.load(before), feed), run(onnx.load(after), feed), strict=True):
        np.testing.assert_array_equal(one, other)


def remove_identity(model: ir.Model) -> None:
    """Takes the first Identity out by hand."""
    node = next(n for n in model.graph if n.op_type == "Identity")
    (source,) = node.inputs
    assert source is not None
    node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
