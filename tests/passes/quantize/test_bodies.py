"""Static integers within If, Loop and Scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphopt_passes.quantize.static import QuantizeStatic

from graphopt.emit import finalize
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, save_model, to_proto
from graphopt.rewrite import Calibration, Context, Options, name_of
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.targets import get_target
from tests.passes.quantize.test_static import varied
from tests.rewriting import run

RNG = np.random.default_rng(5)
CONV = "Conv<pads=[1,1,1,1]>"
BRANCHES = """g (bool c, float[1,8,10,10] x) => (float[1,8,10,10] y) <float[8,8,3,3] w, float[8] b, float[8,8,1,1] v> {
 p = Relu(x)
 y = If (c) <
  then_branch = t () => (float[1,8,10,10] a) { k = CONV(p, w, b)  r = Relu(k)  a = Conv(r, v) },
  else_branch = e () => (float[1,8,10,10] d) { d = Conv(p, v) }> }""".replace("CONV", CONV)
LOOP = """g (float[1,8,10,10] x) => (float[1,8,10,10] y) <float[8,8,3,3] w, int64 count = {3}> {
 y = Loop (count, , x) <body = t (int64 i, bool k, float[1,8,10,10] s) => (bool l, float[1,8,10,10] n)
  { l = Identity(k)  m = CONV(s, w)  h = Relu(m)  q = CONV(h, w)  n = Tanh(q) }> }""".replace(
    "CONV", CONV
)
SCAN = """g (float[1,16] h, float[5,1,16] x) => (float[1,16] y, float[5,1,16] z) <float[16,16] w, float[16,16] v> {
 y, z = Scan<num_scan_inputs=1, body = t (float[1,16] s, float[1,16] e) => (float[1,16] n, float[1,16] o)
  { a = MatMul(s, w)  f = Tanh(a)  b = MatMul(e, v)  c = Mul(f, b)  n = Tanh(c)  o = Identity(n) }> (h, x) }"""
NESTED = """g (bool c, float[1,8,10,10] x) => (float[1,8,10,10] y) <float[8,8,3,3] w, int64 count = {2}> {
 y = Loop (count, , x) <body = t (int64 i, bool k, float[1,8,10,10] s) => (bool l, float[1,8,10,10] n)
  { l = Identity(k)
    n = If (c) <then_branch = u () => (float[1,8,10,10] a) { m = CONV(s, w)  a = Relu(m) },
                else_branch = e () => (float[1,8,10,10] b) { b = Neg(s) }> }> }""".replace(
    "CONV", CONV
)


def image(**more: Any) -> dict[str, Any]:
    return {"x": RNG.normal(size=(1, 8, 10, 10)).astype(np.float32), **more}


def tokens() -> dict[str, Any]:
    return {
        "h": RNG.normal(size=(1, 16)).astype(np.float32),
        "x": RNG.normal(size=(5, 1, 16)).astype(np.float32),
    }


FEEDS = {
    BRANCHES: [image(c=np.array(i % 2 == 0)) for i in range(6)],
    LOOP: [image() for _ in range(6)],
    SCAN: [tokens() for _ in range(6)],
    NESTED: [image(c=np.array(True)) for _ in range(6)],
}


def context(model: Any, feeds: list[dict[str, Any]], **options: Any) -> Context:
    given = Options(calibration=Calibration(feeds), **{"force": True, **options})
    return Context(model, get_target("cpu"), given, pass_name="quantize-static")


def calm(text: str) -> onnx.ModelProto:
    """The model with weights that keep turns of a loop from running away."""
    proto = varied(text)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array / 2, tensor.name))
    return proto


def changed(text: str, **options: Any) -> tuple[onnx.ModelProto, onnx.ModelProto, Context]:
    proto = calm(text)
    model = load_model(proto)
    ctx = context(model, FEEDS[text], **options)
    QuantizeStatic(style="x86-avx2").run(model, ctx)
    finalize(model, get_target("cpu"))
    assert not list(violations(model))
    after = to_proto(model)
    onnx.checker.check_model(after)
    return proto, after, ctx


def bodies_of(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    own = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return own + [inner for body in own for inner in bodies_of(body)]


def kinds(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize(("text", "counts"), [
    (BRANCHES, {"t": 2, "e": 1}), (LOOP, {"t": 2}), (SCAN, {"t": 1}), (NESTED, {"t": 0, "u": 1, "e": 0}),
])  # fmt: skip
def test_products_in_bodies_run_on_integers(
    text: str, counts: dict[str, int], tmp_path: Path
) -> None:
    proto, after, _ = changed(text, budget="sqnr>=20")
    for feed in FEEDS[text][:2]:
        for ours, theirs in zip(run(proto, feed), run(after, feed), strict=True):
            assert 0 < ((ours - theirs) ** 2).sum() < 1e-2 * (ours**2).sum()
    path, read = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    path.write_bytes(after.SerializeToString())
    Session(path, level=OptimizationLevel.EXTENDED, options=SessionOptions(optimized_path=read))
    found = {}
    for body in bodies_of(onnx.load(read).graph):
        found[body.name] = sum(k in ("QLinearConv", "MatMulIntegerToFloat") for k in kinds(body))
    assert found == counts


def test_what_the_main_graph_stores_is_read_inside() -> None:
    """A value outside that is stored in 8 bits, and read by a body that stores it by itself."""
    text = BRANCHES.replace(
        "p = Relu(x)", f"o = {CONV}(x, w, b)  p = Relu(o)  f = Conv(p, v)"
    ).replace("=> (float[1,8,10,10] y)", "=> (float[1,8,10,10] y, float[1,8,10,10] f)", 1)
    FEEDS[text] = FEEDS[BRANCHES]
    proto, after, _ = changed(text)
    assert "QuantizeLinear" in kinds(after.graph)
    assert all("QuantizeLinear" in kinds(body) for body in bodies_of(after.graph))
    for feed in FEEDS[text][:2]:
        for ours, theirs in zip(run(proto, feed), run(after, feed), strict=True):
            assert ((ours - theirs) ** 2).sum() < 1e-3 * (ours**2).sum()


def test_a_body_that_no_sample_reaches_stays_float() -> None:
    none = "count = {3}"
    text = LOOP.replace(none, "count = {0}")
    FEEDS[text] = FEEDS[LOOP]
    _, after, ctx = changed(text)
    assert "QuantizeLinear" not in kinds(bodies_of(after.graph)[0])
    assert any("no sample reached this body" in remark.reason for remark in ctx.remarks)


@pytest.mark.parametrize("text", [LOOP, NESTED])
def test_a_loop_of_too_many_turns_is_called_so(text: str) -> None:
    long = text.replace("count = {3}", "count = {65}").replace("count = {2}", "count = {65}")
    FEEDS[long] = FEEDS[text]
    _, after, ctx = changed(long)
    assert not any("QuantizeLinear" in kinds(body) for body in bodies_of(after.graph))
    told = {remark.reason for remark in ctx.remarks if "stays float" in remark.reason}
    assert "stays float: its loop takes more than 64 turns, the most that are followed" in told
    assert "stays float: no sample reached this body" not in told


def test_samples_that_reach_a_body_may_come_late() -> None:
    """Batches are taken apart: the samples of the first would be all that are looked at."""
    text = LOOP.replace("float[1,", "float[N,").replace("g (", "g (int64 count, ")
    text = text.replace(", int64 count = {3}", "")
    feeds = [
        {"count": np.int64(turns), "x": RNG.normal(size=(40, 8, 10, 10)).astype(np.float32)}
        for turns in (0, 2)
    ]
    model = load_model(calm(text))
    ctx = context(model, feeds, budget="sqnr>=10")
    assert QuantizeStatic().run(model, ctx)


def test_a_body_out_of_budget_stays_float() -> None:
    _, after, ctx = changed(LOOP, budget="sqnr>=90")
    assert "QuantizeLinear" not in kinds(bodies_of(after.graph)[0])
    assert any("in 8 bits this body brings the model to" in remark.reason for remark in ctx.remarks)


def test_what_the_runtime_would_not_fuse_in_a_body_is_taken_out() -> None:
    """A product and a sum of two axes become a Gemm before anything looks at Q and DQ."""
    text = SCAN.replace("c = Mul(f, b)", "c = Add(f, b)")
    FEEDS[text] = FEEDS[SCAN]
    _, after, ctx = changed(text, budget="sqnr>=20")
    body = bodies_of(after.graph)[0]
    assert kinds(body).count("QuantizeLinear") == 1
    told = {remark.node: remark.reason for remark in ctx.remarks}
    assert "the runtime does not fuse it: it became FusedGemm" in told["b"]


def test_nodes_in_bodies_can_be_left_out() -> None:
    model = load_model(calm(LOOP))
    assert QuantizeStatic(style="x86-avx2", skip_nodes=("m",)).run(
        model, context(model, FEEDS[LOOP], budget="sqnr>=15")
    )
    body = model.graph[0].attributes["body"].as_graph()
    first = next(node for node in body if name_of(node) == "m")
    assert first.inputs[0] is body.inputs[2]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for index in range(2):
        model = load_model(calm(LOOP))
        QuantizeStatic(style="x86-avx2").run(model, context(model, FEEDS[LOOP], budget="sqnr>=20"))
        save_model(model, tmp_path / f"{index}.onnx")
        made.append((tmp_path / f"{index}.onnx").read_bytes())
    assert made[0] == made[1]


def test_tensorrt_keeps_bodies_in_float() -> None:
    model = load_model(calm(LOOP))
    ctx = context(model, FEEDS[LOOP])
    assert not QuantizeStatic("tensorrt").run(model, ctx)
    assert "bodies of If, Loop and Scan, which stay float" in ctx.remarks[0].reason
