"""The idiom of every rewrite test: `before` becomes `after`, or stays and says why; always valid, idempotent, equal.

    check(conv.RULES,
        before="g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, float[4] s, …> { k = Conv(x, w)  y = … }",
        after="g (float[2,3,8,8] x) => (float[2,4,6,6] y) <float[4,3,3,3] w, float[4] b> { y = Conv(x, w, b) }")

A constant declared in `<…>` without data is filled from a seed.  Float inputs include NaN, infinities and signed zeros
when the rules call themselves exact.  Both sides run in ONNX Runtime with optimisations off: otherwise it would fuse
them alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from graphopt.ir import operators, values
from graphopt.ir.check import violations
from graphopt.numerics import Numerics
from graphopt.pipeline import RewritePass, Step, run_pipeline
from graphopt.rewrite import Context, Options, RemarkKind, Rule
from graphopt.targets import Target, get_target

HEADER = '<ir_version: 9, opset_import: ["" : {opset}]>\n'
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
SPECIALS = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, -1.0], np.float32)


def parse(text: str, *, opset: int = 18, seed: int = 0) -> onnx.ModelProto:
    """Parses a snippet; a declared constant without data gets seeded values in [0.5, 1.5)."""
    full = text if text.lstrip().startswith("<") else HEADER.format(opset=opset) + text
    proto = onnx.parser.parse_model(full)
    made = {name for node in proto.graph.node for name in node.output}
    made |= {tensor.name for tensor in proto.graph.initializer}
    rng = np.random.default_rng(seed)
    for info in [v for v in proto.graph.value_info if v.name not in made]:
        kind = info.type.tensor_type
        dims = [d.dim_value for d in kind.shape.dim]
        data = rng.uniform(0.5, 1.5, dims)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.asarray(data, dtype), info.name)
        )
        proto.graph.value_info.remove(info)
    return proto


def structure(model: ir.Model) -> list[str]:
    """The model with values numbered by definition; constants by dtype, shape and, for integers, data."""
    names: dict[ir.Value | None, str] = {None: "_"}
    lines: list[str] = []

    def name(value: ir.Value | None) -> str:
        tensor = values.constant(value)
        if tensor is None:
            return names.setdefault(value, f"%{len(names)}")
        small = tensor.size <= 64 and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        data = f"={tensor.numpy().reshape(-1).tolist()}" if small else ""
        return f"{tensor.dtype}{list(tensor.shape)}{data}"

    def show(graph: ir.Graph, pad: str) -> None:
        lines.append(f"{pad}in " + ", ".join(name(v) for v in graph.inputs))
        for node in graph:
            if node.op_type == "Constant" and not node.domain:
                continue
            plain = [a for a in node.attributes.values() if a.type not in GRAPHS]
            shown = {a.name: _attribute(a) for a in sorted(plain, key=lambda a: a.name)}
            ins = ", ".join(name(v) for v in node.inputs)
            outs = ", ".join(name(v) if v.name else "_" for v in node.outputs)
            kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            lines.append(f"{pad}{outs} = {kind}({ins}) {shown}")
            for inner in operators.subgraphs(node):
                show(inner, pad + "  ")
        lines.append(f"{pad}out " + ", ".join(name(v) for v in graph.outputs))

    show(model.graph, "")
    return lines


def _attribute(attribute: ir.Attr) -> object:
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.FLOAT:
        return f"{attribute.as_float():.6g}"
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().numpy().tolist()
    return attribute.value


def run(proto: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Outputs of ONNX Runtime on the CPU, graph optimisations off, one thread."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[npt.NDArray[Any]] = session.run(None, dict(feeds))
    return outputs


def make_feeds(
    proto: onnx.ModelProto, seed: int, *, dim: int = 3, specials: bool = False
) -> dict[str, npt.NDArray[Any]]:
    """Random inputs; unknown dims are `dim`, integers lie in [0, 2)."""
    rng = np.random.default_rng(seed)
    held = {tensor.name for tensor in proto.graph.initializer}
    feeds: dict[str, npt.NDArray[Any]] = {}
    for info in proto.graph.input:
        if info.name in held:
            continue
        kind = info.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else dim for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if np.dtype(dtype).kind in "biu":
            feeds[info.name] = np.asarray(rng.integers(0, 2, dims), dtype)
            continue
        data = np.asarray(rng.standard_normal(dims), dtype)
        if specials and data.size:
            flat = data.reshape(-1)
            with np.errstate(over="ignore"):  # half floats have no 3e38
                flat[rng.integers(0, flat.size, 3)] = rng.choice(SPECIALS, 3).astype(dtype)
        feeds[info.name] = data
    return feeds


def apply(
    steps: Sequence[Step] | Sequence[Rule],
    model: ir.Model,
    *,
    target: str | Target = "cpu",
    options: Options | None = None,
) -> Context:
    """Runs rules or passes over `model` in place; returns the context with remarks and rewrites."""
    chosen = get_target(target) if isinstance(target, str) else target
    ctx = Context(model, chosen, options or Options())
    rules = tuple(step for step in steps if isinstance(step, Rule))
    passes = tuple(step for step in steps if not isinstance(step, Rule))
    if rules:
        passes = (RewritePass("rules", rules), *passes)
    run_pipeline(model, passes, ctx)
    return ctx


def check(
    steps: Sequence[Step] | Sequence[Rule],
    before: str,
    after: str | None = None,
    *,
    missed: str = "",
    opset: int = 18,
    target: str | Target = "cpu",
    feeds: Iterable[Mapping[str, npt.NDArray[Any]]] | None = None,
    dims: Sequence[int] = (3, 1),
    tolerance: float = 2e-6,
) -> Context:
    """Asserts that `before` becomes `after` (itself if None), valid, idempotent, and equal in value.

    Args:
        steps: rules or passes.
        before: model or graph in ONNX text.
        after: what it must become, up to names; None when nothing may change.
        missed: a text that one of the missed remarks must contain.
        opset: ai.onnx opset of snippets without a header.
        target: target to rewrite for.
        feeds: inputs to compare on; random ones, with each size of `dims` for unknown dims, if None.
        dims: sizes to try for unknown dims.
        tolerance: of max|d| / RMS, where the rewrites made are not exact.
    """
    proto = parse(before, opset=opset)
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(proto)
    ctx = apply(steps, model, target=target)
    assert not list(violations(model))
    got = ir.to_proto(model)
    onnx.checker.check_model(got, full_check=True)
    assert structure(model) == structure(ir.from_proto(parse(after or before, opset=opset)))
    reasons = [r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED]
    assert not missed or any(missed in reason for reason in reasons), reasons
    assert not apply(steps, model, target=target).rewrites, "not idempotent"
    if feeds is None:
        specials = ctx.numerics is Numerics.EXACT
        feeds = [
            make_feeds(proto, s, dim=d, specials=specials) for s, d in enumerate((*dims, *dims))
        ]
    for feed in feeds:
        compare(run(proto, feed), run(got, feed), ctx.numerics, tolerance)
    return ctx


def compare(
    expected: Sequence[Any], seen: Sequence[Any], numerics: Numerics, tolerance: float
) -> None:
    """Asserts equal dtypes and shapes, and bits or numbers within `tolerance` of the RMS."""
    for a, b in zip(expected, seen, strict=True):
        if not isinstance(a, np.ndarray):
            assert type(a) is type(b)
            compare(list(a or ()), list(b or ()), numerics, tolerance)
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if numerics is Numerics.EXACT or a.dtype.kind not in "fc":
            np.testing.assert_array_equal(a, b)
            if a.dtype.kind == "f":
                finite = ~np.isnan(a)
                np.testing.assert_array_equal(np.signbit(a[finite]), np.signbit(b[finite]))
        elif a.size:
            wide = a.astype(np.float64)
            rms = np.sqrt(np.mean(wide**2)) or 1.0
            assert np.max(np.abs(wide - b.astype(np.float64))) / rms <= tolerance
