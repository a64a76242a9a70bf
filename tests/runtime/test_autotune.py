"""Measured choice: what is timed, what is kept, and what a measured loss does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import pytest
from graphopt_passes import activation

import graphopt
from graphopt.ir.shapes import Shapes
from graphopt.pipeline import RewritePass, run_pipeline
from graphopt.rewrite import Context, Options
from graphopt.runtime.autotune import Autotuner
from graphopt.targets import get_target
from tests.rewriting import parse

GELU = (
    "g (float[N,8] x) => (float[N,8] y) <float r = {1.4142135}, float one = {1.0}, float half = {0.5}>"
    " { u = Div(x, r) e = Erf(u) p = Add(e, one) h = Mul(x, half) y = Mul(h, p) }"
)


@dataclasses.dataclass
class Fixed:
    """A tuner that has an answer ready."""

    answer: float | None
    asked: int = 0

    def gain(
        self,
        before: Sequence[ir.Node],
        old: Sequence[ir.Value],
        after: Sequence[ir.Node],
        new: Sequence[ir.Value],
    ) -> float | None:
        self.asked += 1
        assert [node.op_type for node in before] == ["Div", "Erf", "Add", "Mul", "Mul"]
        assert [node.op_type for node in after] == ["Gelu"]
        assert len(old) == len(new) == 1
        return self.answer


def _run(tuner: object) -> Context:
    model = ir.from_proto(parse(GELU, opset=20))
    ctx = Context(model, get_target("cpu"), Options())
    ctx.tuner = tuner  # type: ignore[assignment]
    run_pipeline(model, (RewritePass("fuse", activation.RULES),), ctx)
    return ctx


@pytest.mark.parametrize(
    ("answer", "fuses"), [(2.0, True), (1.0, True), (None, True), (0.5, False)]
)
def test_a_measured_loss_keeps_the_parts(answer: float | None, fuses: bool) -> None:
    tuner = Fixed(answer)
    ctx = _run(tuner)
    assert tuner.asked
    assert bool(ctx.rewrites) == fuses
    assert any("measured on this machine: 0.50" in r.reason for r in ctx.remarks) != fuses


def test_results_are_kept_and_used_again(tmp_path: Path) -> None:
    """The file decides the second time: nothing is timed, and a loss written there is believed."""
    file = tmp_path / "deep" / "gains.json"
    proto = parse(GELU, opset=20)
    graphopt.optimize(proto, verify="off", autotune=file)
    known = json.loads(file.read_text())
    assert known
    assert all(gain > 0 for gain in known.values())
    file.write_text(json.dumps(dict.fromkeys(known, 0.25)))
    made = graphopt.optimize(proto, verify="off", autotune=file)
    assert [node.op_type for node in made.model.graph] != ["Gelu"]
    assert any("0.25 times" in remark.reason for remark in made.report.remarks)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_that_is_not_ours_is_as_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "gains.json"
    file.write_text(text)
    made = graphopt.optimize(parse(GELU, opset=20), verify="off", autotune=file)
    assert made.model.graph.num_nodes() > 0
    assert json.loads(file.read_text())


def test_nothing_is_timed_for_a_target_that_runs_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "gains.json"
    graphopt.optimize(parse(GELU, opset=20), verify="off", target="cuda", autotune=file)
    assert not file.exists()


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    made = graphopt.optimize(parse(GELU, opset=20), verify="off", autotune=blocked / "gains.json")
    assert made.model.graph.num_nodes() > 0


def test_a_place_that_cannot_run_alone_is_left_to_the_table(tmp_path: Path) -> None:
    """A subgraph, or a value of unknown rank."""
    model = ir.from_proto(
        parse(
            "g (bool c, float[2] x) => (float[2] y)"
            "{ y = If(c) <then_branch = a () => (float[2] p) { p = Neg(x) },"
            " else_branch = b () => (float[2] q) { q = Abs(x) }> }"
        )
    )
    ctx = Context(model, get_target("cpu"), Options())
    tuner = Autotuner(tmp_path / "gains.json", ctx)
    (node,) = model.graph
    assert isinstance(ctx.shapes, Shapes)
    assert tuner.gain([node], node.outputs, [node], node.outputs) is None
