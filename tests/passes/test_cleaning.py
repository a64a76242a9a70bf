"""All passes of cleaning and folding together, on generated graphs: valid, equal, settled, deterministic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest
from graphopt_passes import sequences, tidy
from graphopt_passes.cleanup import LiftConstants, RemoveDeadCode, UpgradeIr
from graphopt_passes.control_flow import InlineControlFlow
from graphopt_passes.dedupe import MergeCommonSubexpressions, MergeDuplicateConstants
from graphopt_passes.fold import FoldConstants
from graphopt_passes.functions import InlineFunctions
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir.check import violations
from graphopt.pipeline import Pass, Repeat, RewritePass, Step
from graphopt.rewrite import Context
from tests.rewriting import apply, run

PASSES: tuple[Pass, ...] = (
    UpgradeIr(),
    InlineFunctions(),
    LiftConstants(),
    RewritePass("tidy", tidy.RULES + sequences.RULES),
    FoldConstants(),
    InlineControlFlow(),
    MergeDuplicateConstants(),
    MergeCommonSubexpressions(),
    RemoveDeadCode(),
)
PIPELINE: tuple[Step, ...] = (Repeat(PASSES),)

UNARY = ("Identity", "Neg", "Abs", "Relu", "Transpose", "Dropout", "Exp")
BINARY = ("Add", "Mul", "Sub", "Max")


class Maker:
    """Draws a graph over float[A, 3] tensors, A being dynamic; inner graphs see what outer ones define."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def pick(self, items: list[str] | tuple[str, ...]) -> str:
        return items[int(self.rng.integers(len(items)))]

    def graph(
        self, size: int, seen: list[str], depth: int
    ) -> tuple[list[onnx.NodeProto], list[str]]:
        nodes: list[onnx.NodeProto] = []
        seen = list(seen)
        for _ in range(size):
            nodes += self.step(seen, depth)
            seen.append(nodes[-1].output[0])
        return nodes, seen

    def step(self, seen: list[str], depth: int) -> list[onnx.NodeProto]:
        kind = int(self.rng.integers(9 if depth < 2 else 7))
        x, out = self.pick(seen), self.name()
        if kind < 2:
            op = self.pick(UNARY)
            twice = [
                oh.make_node("Transpose", [x], [out + "t"]),
                oh.make_node("Transpose", [out + "t"], [out]),
            ]
            return twice if op == "Transpose" else [oh.make_node(op, [x], [out])]
        if kind == 2:
            return [oh.make_node(self.pick(BINARY), [x, self.pick(seen)], [out])]
        if kind == 3:
            return [
                *self.constant(out + "c"),
                oh.make_node(self.pick(BINARY), [x, out + "c"], [out]),
            ]
        if kind == 4:
            return [
                oh.make_node("Shape", [x], [out + "s"]),
                oh.make_node("Reshape", [x, out + "s"], [out]),
            ]
        if kind == 5:
            return [
                oh.make_node("Constant", [], [out + "p"], value_int=int(self.rng.integers(2))),
                oh.make_node("SequenceConstruct", [x, self.pick(seen)], [out + "q"]),
                oh.make_node("SequenceAt", [out + "q", out + "p"], [out]),
            ]
        if kind == 6:
            return [oh.make_node("f", [x, self.pick(seen)], [out], domain="l", slope=0.5)]
        return self.branch(out, seen, depth) if kind == 7 else self.loop(x, out, seen, depth)

    def constant(self, out: str) -> list[onnx.NodeProto]:
        data = np.full((1, 3), float(self.rng.integers(3)), np.float32)
        made = [oh.make_node("Constant", [], [out + "k"], value=nh.from_array(data))]
        return [*made, oh.make_node(self.pick(("Identity", "Sqrt", "Neg")), [out + "k"], [out])]

    def branch(self, out: str, seen: list[str], depth: int) -> list[onnx.NodeProto]:
        graphs = {}
        for side in ("then_branch", "else_branch"):
            nodes, inner = self.graph(2, seen, depth + 1)
            graphs[side] = oh.make_graph(nodes, side, [], [_info(inner[-1])])
        known = bool(self.rng.integers(2))
        made = [oh.make_node("Constant", [], [out + "b"], value=nh.from_array(np.array(known)))]
        condition = out + "b" if self.rng.integers(3) else "flag"
        return [*made, oh.make_node("If", [condition], [out], **graphs)]

    def loop(self, x: str, out: str, seen: list[str], depth: int) -> list[onnx.NodeProto]:
        i, c, v, d = (f"{out}{letter}" for letter in "icvd")
        nodes, inner = self.graph(2, [*seen, v], depth + 1)
        nodes.insert(0, oh.make_node("Identity", [c], [d]))
        inputs = [
            oh.make_tensor_value_info(i, 7, []),
            oh.make_tensor_value_info(c, 9, []),
            _info(v),
        ]
        body = oh.make_graph(
            nodes, "body", inputs, [oh.make_tensor_value_info(d, 9, []), _info(inner[-1])]
        )
        count = oh.make_node("Constant", [], [out + "n"], value_int=int(self.rng.integers(3)))
        return [count, oh.make_node("Loop", [out + "n", "", x], [out], body=body)]


def _info(name: str) -> onnx.ValueInfoProto:
    return oh.make_tensor_value_info(name, 1, [None, 3])


def generate(seed: int) -> onnx.ModelProto:
    """A model of 12 steps, with outputs in the middle and unused inputs."""
    maker = Maker(seed)
    nodes, seen = maker.graph(12, ["x", "z"], 0)
    made = [name for name in seen if name not in ("x", "z")]
    outputs = sorted({made[-1], made[len(made) // 2], made[0]})
    body = [
        oh.make_node("Add", ["a", "b"], ["c"]),
        oh.make_node("LeakyRelu", ["c"], ["d"]),
    ]
    body[1].attribute.append(onnx.AttributeProto(name="alpha", type="FLOAT", ref_attr_name="slope"))
    imports = [oh.make_opsetid("", 18)]
    function = oh.make_function("l", "f", ["a", "b"], ["d"], body, imports, ["slope"])
    inputs = [*map(_info, ("x", "z")), oh.make_tensor_value_info("flag", 9, [])]
    for info in inputs[:2]:
        info.type.tensor_type.shape.dim[0].dim_param = "A"
    graph = oh.make_graph(nodes, "g", inputs, [_info(name) for name in outputs])
    return oh.make_model(
        graph, functions=[function], opset_imports=[*imports, oh.make_opsetid("l", 1)], ir_version=9
    )


def feeds(seed: int) -> dict[str, npt.NDArray[np.generic]]:
    rng = np.random.default_rng(seed)
    made: dict[str, npt.NDArray[np.generic]] = {
        name: rng.standard_normal((1 + seed, 3)).astype(np.float32) for name in "xz"
    }
    return {**made, "flag": np.array(bool(seed))}


def settled(proto: onnx.ModelProto, steps: tuple[Step, ...]) -> tuple[onnx.ModelProto, Context]:
    model = ir.from_proto(proto)
    ctx = apply(steps, model)
    assert not list(violations(model))
    got = ir.to_proto(model)
    onnx.checker.check_model(got, full_check=True)
    return got, ctx


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_everything_together(seed: int) -> None:
    proto = generate(seed)
    got, _ = settled(proto, PIPELINE)
    assert got.SerializeToString() == settled(proto, PIPELINE)[0].SerializeToString()
    assert not settled(got, PIPELINE)[1].rewrites
    assert [v.name for v in got.graph.input] == [v.name for v in proto.graph.input]
    assert [v.name for v in got.graph.output] == [v.name for v in proto.graph.output]
    for feed in map(feeds, (0, 1)):
        for a, b in zip(run(proto, feed), run(got, feed), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("each", PASSES, ids=lambda each: each.name)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_each_pass_alone(each: Pass, seed: int) -> None:
    proto = generate(seed)
    got, _ = settled(proto, (each,))
    for feed in map(feeds, (0, 1)):
        for a, b in zip(run(proto, feed), run(got, feed), strict=True):
            np.testing.assert_array_equal(a, b)
