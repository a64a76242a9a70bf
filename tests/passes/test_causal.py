"""Causal attention: what a mask lets through, read off constants and computations, and told to the operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphopt_passes import causal

from graphopt.ir.model_file import model_to_bytes
from tests.rewriting import apply, check, make_feeds, parse, run

IN = "float[2,4,16] q, float[2,4,16] k, float[2,4,16] v"
OUT = "=> (float[2,4,16] y)"
HEADS = "q_num_heads=2, kv_num_heads=2"
TRIANGLE = "{1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}"
WINDOW = "{1,0,0,0, 1,1,0,0, 0,1,1,0, 0,0,1,1}"
MS = '<ir_version: 9, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
LENGTHS = "int32[2] last = {3,3}, int32 keys = {4}"
GROUPED = "com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=2"


def _check(before: str, after: str | None = None, **options: object) -> None:
    options.setdefault("tolerance", 1e-5)
    check(causal.RULES, before, after, opset=23, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (f"bool[4,4] m = {TRIANGLE}", ""),
        (f"bool[1,1,4,4] m = {TRIANGLE}", ""),
        (f"bool[4,4] m = {WINDOW}", ", local_window_size=2"),
        (
            "float[4,4] m = {0,-1e30,-1e30,-1e30, 0,0,-1e30,-1e30, 0,0,0,-1e4, 0,0,0,0}",
            "",
        ),
    ],
)
def test_constant_masks_become_grouped_attention_on_the_cpu(mask: str, window: str) -> None:
    _check(
        f"g ({IN}) {OUT} <{mask}> {{ y = Attention<{HEADS}, scale=0.5>(q, k, v, m) }}",
        f"{MS}g ({IN}) {OUT} <{LENGTHS}> {{ y = {GROUPED}, scale=0.5{window}>(q, k, v, , , last, keys) }}",
    )


def test_an_attention_that_is_causal_already() -> None:
    _check(
        f"g ({IN}) {OUT} {{ y = Attention<{HEADS}, is_causal=1>(q, k, v) }}",
        f"{MS}g ({IN}) {OUT} <{LENGTHS}> {{ y = {GROUPED}>(q, k, v, , , last, keys) }}",
    )


def test_lengths_are_computed_where_they_are_unknown_and_an_empty_batch_is_refused() -> None:
    """The kernel would divide by zero: with no batch there are no keys, which it says."""
    io = "(float[B,S,16] q, float[B,S,16] k, float[B,S,16] v) => (float[B,S,16] y)"
    before = f"g {io} {{ y = Attention<{HEADS}, is_causal=1>(q, k, v) }}"
    _check(
        before,
        f"{MS}g {io} <int32[1] one = {{1}}, int64[1] axis = {{0}}> {{"
        " rows = Shape<start=0, end=1>(q) size = Shape<start=1, end=2>(q) s = Cast<to=6>(size)"
        " less = Sub(s, one) last = Expand(less, rows) b = Cast<to=6>(rows) some = Min(b, one)"
        f" many = Mul(s, some) keys = Squeeze(many, axis) y = {GROUPED}>(q, k, v, , , last, keys) }}",
    )
    model = ir.from_proto(parse(before, opset=23))
    apply(causal.RULES, model)
    session = ort.InferenceSession(model_to_bytes(model), providers=["CPUExecutionProvider"])
    ort.set_default_logger_severity(4)
    empty = {name: np.zeros((0, 3, 16), np.float32) for name in "qkv"}
    with pytest.raises(Exception, match="must be positive"):
        session.run(None, empty)
    ort.set_default_logger_severity(2)


RANGES = (
    "n = Shape<start=1, end=2>(q) flat = Squeeze(n, zero) r = Range(start, flat, step)"
    " i = Unsqueeze(r, one) j = Unsqueeze(r, zero)"
)
NUMBERS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64 start = {0}, int64 step = {1}, int64 two = {2},"
    " int64[2] both = {0,1}, int64[2] corner = {0,0}, int64[2] axes = {2,3}, float none = {0},"
    " float low = {-3.4028235e38}, bool[1,1,9,9] far, bool[1] true = {1}, float[1] flag = {1}"
)


@pytest.mark.parametrize(
    ("body", "window"),
    [
        ("m = LessOrEqual(j, i)", None),
        ("m = GreaterOrEqual(i, j)", None),
        ("c = Greater(j, i) m = Not(c)", None),
        ("a = Add(i, step) m = Less(j, a)", None),
        ("a = LessOrEqual(j, i) d = Sub(i, j) b = Less(d, two) m = And(a, b)", 2),
        ("x = Transpose<perm=[1,0]>(j) m = LessOrEqual(j, x)", None),
        ("f = Cast<to=1>(i) h = Cast<to=1>(j) m = LessOrEqual(h, f)", None),
        ("c = LessOrEqual(j, i) m = Where(c, none, low)", None),
        ("c = Greater(j, i) m = Where(c, low, none)", None),
        # as torch's TorchScript exporter spells is_causal
        (
            "s = Concat<axis=0>(n, n) o = Expand(flag, s) t = Trilu<upper=0>(o) e = Equal(t, none)"
            " m = Where(e, low, t)",
            None,
        ),
        ("c = Greater(j, i) f = Cast<to=1>(c) m = Mul(f, low)", None),
        ("s = Concat<axis=0>(n, n) o = Expand(true, s) m = Trilu<upper=0>(o)", None),
        ("s = Concat<axis=0>(n, n) o = Expand(low1, s) m = Trilu<upper=1>(o, oner)", None),
    ],
)
def test_computed_masks(body: str, window: int | None) -> None:
    """Comparisons of two Range, triangles and what chooses by them are read; the model stays equal."""
    held = f"{NUMBERS}, float[1] low1 = {{-1e30}}, int64 oner = {{1}}".replace(
        "bool[1,1,9,9] far, ", ""
    )
    io = "(float[2,S,16] q, float[2,S,16] k, float[2,S,16] v) => (float[2,S,16] y)"
    before = f"g {io} <{held}> {{ {RANGES} {body} y = Attention<{HEADS}>(q, k, v, m) }}"
    proto = parse(before, opset=23)
    model = ir.from_proto(proto)
    apply(causal.RULES, model)
    node = next(n for n in model.graph if "Attention" in n.op_type)
    assert node.op_type == "GroupQueryAttention"
    assert node.attributes.get_int("local_window_size", 0) == (window or 0)
    for size in (1, 4):
        feed = make_feeds(proto, size, dim=size)
        np.testing.assert_allclose(
            run(ir.to_proto(model), feed)[0], run(proto, feed)[0], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "body",
    [
        "m = Less(j, i)",  # the first query would see nothing
        "a = Add(j, i) m = LessOrEqual(a, two)",  # no band
        "m = GreaterOrEqual(j, i)",  # what comes after
        "e = Equal(j, i) m = And(e, e)",
        "c = LessOrEqual(j, i) m = Where(c, none, few)",  # what is masked still counts
        "c = LessOrEqual(j, i) m = Where(c, few, low)",
        "c = LessOrEqual(j, i) d = LessOrEqual(j, start) m = And(c, d)",
        "f = Cast<to=10>(i) h = Cast<to=10>(j) m = LessOrEqual(h, f)",  # half precision holds 2048 places
        "q2 = Range(start, flat, two2) p = Unsqueeze(q2, zero) m = LessOrEqual(j, i)",
    ],
)
def test_other_computed_masks_stay(body: str) -> None:
    held = f"{NUMBERS}, float few = {{-3.0}}, int64 two2 = {{1}}".replace("bool[1,1,9,9] far, ", "")
    io = "(float[2,S,16] q, float[2,S,16] k, float[2,S,16] v) => (float[2,S,16] y)"
    ends = "LessOrEqual(j, i)" in body and "And" not in body and "Where" not in body
    before = f"g {io} <{held}> {{ {RANGES} {body} y = Attention<{HEADS}>(q, k, v, m) }}"
    model = ir.from_proto(parse(before, opset=23))
    apply(causal.RULES, model)
    kinds = {node.op_type for node in model.graph}
    assert ("GroupQueryAttention" in kinds) is ends


@pytest.mark.parametrize(
    ("io", "held", "node", "missed"),
    [
        # its own rows of the batch
        (
            IN,
            f"bool[2,1,4,4] m = {TRIANGLE[:-1]}, {WINDOW[1:]}",
            f"Attention<{HEADS}>(q, k, v, m)",
            "",
        ),
        # all keys after the query
        (
            IN,
            "bool[4,4] m = {0,0,0,0, 0,0,0,0, 0,0,0,0, 0,0,0,0}",
            f"Attention<{HEADS}>(q, k, v, m)",
            "",
        ),
        (
            "float[2,4,16] q, float[2,6,16] k, float[2,6,16] v",
            "",
            f"Attention<{HEADS}, is_causal=1>(q, k, v)",
            "fewer queries than keys",
        ),
        (
            IN.replace("16", "12"),
            "",
            f"Attention<{HEADS}, is_causal=1>(q, k, v)",
            "no multiple of 8",
        ),
        (
            "float[2,4,16] q, float[2,4,16] k, float[2,4,32] v",
            "",
            f"Attention<{HEADS}, is_causal=1>(q, k, v)",
            "differ in size",
        ),
        (IN, "", f"Attention<{HEADS}, is_causal=1, softcap=2.0>(q, k, v)", "limited"),
        (
            "float[2,2,4,8] q, float[2,2,4,8] k, float[2,2,4,8] v",
            "",
            "Attention<is_causal=1>(q, k, v)",
            "in front",
        ),
        (
            f"{IN}, float[2,2,0,8] pk, float[2,2,0,8] pv",
            "",
            f"Attention<{HEADS}, is_causal=1>(q, k, v, , pk, pv)",
            "past",
        ),
    ],
)
def test_what_stays(io: str, held: str, node: str, missed: str) -> None:
    model = ir.from_proto(
        parse(
            f"g ({io}) => (float[N,M,O] y) <{held}> {{ y = {node} }}".replace(" <>", ""), opset=23
        )
    )
    ctx = apply(causal.RULES, model)
    assert [n.op_type for n in model.graph] == ["Attention"]
    assert not missed or any(missed in each.reason for each in ctx.remarks)


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_other_targets_name_the_mask(target: str) -> None:
    heads = IN.replace("[2,4,16]", "[2,2,4,8]")
    _check(
        f"g ({heads}) => (float[2,2,4,8] y) <bool[4,4] m = {TRIANGLE}> {{ y = Attention<scale=0.5>(q, k, v, m) }}",
        f"g ({heads}) => (float[2,2,4,8] y) {{ y = Attention<scale=0.5, is_causal=1>(q, k, v) }}",
        target=target,
    )


def test_a_window_is_not_causal_where_only_that_is_known() -> None:
    heads = IN.replace("[2,4,16]", "[2,2,4,8]")
    _check(
        f"g ({heads}) => (float[2,2,4,8] y) <bool[4,4] m = {WINDOW}> {{ y = Attention(q, k, v, m) }}",
        target="cuda",
    )


def test_a_mask_that_hides_nothing_goes() -> None:
    _check(
        f"g ({IN}) {OUT} <float[4,4] m = {{{','.join(['0'] * 16)}}}> {{ y = Attention<{HEADS}>(q, k, v, m) }}",
        f"g ({IN}) {OUT} {{ y = Attention<{HEADS}>(q, k, v) }}",
    )


def test_a_mask_cut_from_a_longer_one() -> None:
    """GPT-2 keeps one triangle for its longest sequence."""
    triangle = np.tril(np.ones((1, 1, 8, 8), bool))
    before = (
        "g (float[2,5,16] q, float[2,5,16] k, float[2,5,16] v) => (float[2,5,16] y)"
        " <int64[2] corner = {0,0}, int64[2] axes = {2,3}, int64[2] steps = {1,1}, int64[2] e = {5,5}> {"
        " m = Slice(far, corner, e, axes, steps)"
        f" y = Attention<{HEADS}>(q, k, v, m) }}"
    )
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 23]>\n{before}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(triangle, "far"))
    model = ir.from_proto(proto)
    apply(causal.RULES, model)
    assert "GroupQueryAttention" in {node.op_type for node in model.graph}
    feed = make_feeds(proto, 0)
    np.testing.assert_allclose(
        run(ir.to_proto(model), feed)[0], run(proto, feed)[0], rtol=1e-5, atol=1e-6
    )
