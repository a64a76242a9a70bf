"""Masks of attention from outside, of relative positions, and two of them; softmax in single precision."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import attention

from tests.rewriting import apply, check, make_feeds, parse, run

QKV = "float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
KT = "t = Transpose<perm=[0,1,3,2]>(k)"
GUARD = "n = IsNaN(p) w = Where(n, zero, p) y = MatMul(w, v)"


def _check(before: str, after: str | None = None, **options: object) -> None:
    options.setdefault("tolerance", 1e-5)
    check(attention.RULES, before, after, **options)  # type: ignore[arg-type]


INF, LOW = np.inf, np.finfo(np.float32).min
ROWS = [
    [0, 0, 0, 0],
    [0, -INF, -1e4, LOW],
    [-INF, -INF, -INF, -INF],
    [LOW, LOW, LOW, LOW],
    [LOW, -INF, LOW, LOW],
    [-1e4, -1e4, -1e4, -1e4],
    [0.5, -2.0, 3.0, 1.0],
    [INF, 0, 0, 0],
    [np.nan, 0, 0, 0],
    [-2e38, LOW, -2e38, LOW],
]


@pytest.mark.parametrize("tail", ["y = MatMul(p, v)", GUARD])
@pytest.mark.parametrize("shape", ["S,L", "B,1,S,L"])
@pytest.mark.parametrize(("dtype", "error"), [("float", 1e-5), ("float16", 1e-2)])
def test_mask_from_outside(tail: str, shape: str, dtype: str, error: float) -> None:
    """Rows of anything are what they were of the parts: spread as they were, zero, NaN."""
    zero = "0.0" if dtype == "float" else "0"
    proto = parse(
        f"g ({QKV}, float[{shape}] m) => (float[B,2,S,4] y) <float zero = {{{zero}}}>"
        f"{{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) {tail} }}".replace("float", dtype),
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    kinds = [node.op_type for node in model.graph]
    assert "Attention" in kinds
    assert "Softmax" not in kinds
    rng = np.random.default_rng(0)
    kind = np.dtype("float16" if dtype == "float16" else "float32")
    feeds = {
        name: rng.standard_normal((2, 2, size, 4)).astype(kind)
        for name, size in (("q", len(ROWS)), ("k", 4), ("v", 4))
    }
    rows = np.asarray(ROWS, np.float32)
    rows = np.maximum(rows, np.finfo(kind).min, where=np.isfinite(rows), out=rows).astype(kind)
    feeds["m"] = rows if shape == "S,L" else np.stack([rows, rows[::-1]])[:, None]
    got, expected = run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0]
    np.testing.assert_allclose(got, expected, rtol=10 * error, atol=error)


@pytest.mark.parametrize(
    ("dtype", "shape", "target", "tail", "missed"),
    [
        ("float", "B,2,S,L", "cpu", "y = MatMul(p, v)", "for every head"),
        ("float16", "B,2,S,L", "cpu", "y = MatMul(p, v)", "for every head"),
    ],
)
def test_mask_from_outside_stays(
    dtype: str, shape: str, target: str, tail: str, missed: str
) -> None:
    qkv = QKV.replace("float", dtype)
    _check(
        f"g ({qkv}, {dtype}[{shape}] m) => ({dtype}[B,2,S,4] y) <float zero = {{0.0}}>"
        f"{{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) {tail} }}",
        opset=23,
        missed=missed,
        target=target,
        tolerance=1e-2 if dtype == "float16" else 1e-5,
    )


@pytest.mark.parametrize("known", [True, False])
def test_bias_of_relative_positions(known: bool) -> None:
    """A bias out of a table of finite numbers masks nothing, whatever the places; out of another, it may."""
    given, held = (
        ("", "float[3] table = {0.5, -0.25, 1.0}, ") if known else (", float[3] table", "")
    )
    before = (
        f"g ({QKV}, int64[S,L] i{given}) => (float[B,2,S,4] y) <{held}int64[2] e = {{0, 1}}>"
        f"{{ b = Gather(table, i) u = Unsqueeze(b, e) {KT} a = MatMul(q, t) z = Add(a, u) p = Softmax(z)"
        " y = MatMul(p, v) }"
    )
    kinds = {node.op_type for node in _rewritten(before)}
    assert "Attention" in kinds
    assert ("ReduceMax" in kinds) is not known


def test_a_causal_mask_masks_no_row_throughout() -> None:
    """Written out by the exporter for any length: each query sees itself."""
    before = (
        f"g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v) => (float[B,2,S,4] y)"
        " <float[1] one = {1.0}, float zero = {0.0}, float low = {-3.4e38}> { d = Shape<start=2, end=3>(q)"
        " s = Concat<axis=0>(d, d) o = Expand(one, s) u = Trilu<upper=0>(o) e = Equal(u, zero)"
        f" m = Where(e, low, u) {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}"
    )
    kinds = {node.op_type for node in _rewritten(before)}
    assert "Attention" in kinds
    assert "ReduceMax" not in kinds


def _rewritten(before: str) -> list[ir.Node]:
    model = ir.from_proto(parse(before, opset=23))
    apply(attention.RULES, model)
    return list(model.graph)


@pytest.mark.parametrize(
    "mask",
    [
        "f = Cast<to=1>(c) h = Sub(one, f) m = Mul(h, low)",  # integers need not be 0 or 1
        "f = Cast<to=1>(c) b = Cast<to=9>(c) m = Where(b, low, f)",
    ],
)
def test_mask_of_numbers_from_outside(mask: str) -> None:
    before = (
        f"g ({QKV}, int64[B,1,S,L] c) => (float[B,2,S,4] y) <float low = {{-3e38}}, float one = {{1.0}}> {{ {mask}"
        f" {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}"
    )
    proto = parse(before, opset=23)
    nodes = _rewritten(before)
    assert {"Attention", "ReduceMax"} <= {node.op_type for node in nodes}
    feeds = make_feeds(proto, 1)
    feeds["c"] = np.random.default_rng(2).integers(-2, 4, feeds["c"].shape)
    got = run(ir.to_proto(ir.Model(nodes[0].graph, ir_version=10)), feeds)[0]  # type: ignore[arg-type]
    np.testing.assert_allclose(got, run(proto, feeds)[0], rtol=1e-4, atol=1e-5)


def test_causal_mask_of_lowest_numbers() -> None:
    """A constant mask may hold the lowest number anywhere, as long as every row keeps something."""
    g = "g (float[1,2,2,4] q, float[1,2,2,4] k, float[1,2,2,4] v) => (float[1,2,2,4] y)"
    m = "float[2,2] m = {0.0, -3.4028234663852886e38, 0.0, 0.0}"
    _check(
        f"{g} <{m}> {{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}",
        f"{g} <{m}> {{ y = Attention<scale=1.0>(q, k, v, m) }}",
        opset=23,
    )


def test_mask_of_all_queries_alike_is_expanded() -> None:
    """[B, 1, 1, L], as BERT has it, from booleans: what is added is 0 or the lowest number."""
    low = "float low = {-3.4028234663852886e38}, float one = {1.0}, float big = {-1e30}"
    ins = f"g ({QKV}, bool[B,1,1,L] c) => (float[B,2,S,4] y)"
    _check(
        f"{ins} <{low}> {{ f = Cast<to=1>(c) h = Sub(one, f) m = Mul(h, low) {KT} a = MatMul(q, t)"
        " z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }",
        f"{ins} <{low}, int64[1] i = {{1}}> {{ f = Cast<to=1>(c) h = Sub(one, f) m = Mul(h, low)"
        " n = Max(m, big) s = Shape<start=2, end=3>(q) d = Concat<axis=0>(s, i) e = Expand(n, d)"
        " y = Attention<scale=1.0>(q, k, v, e) }",
        opset=23,
    )
    fixed = ins.replace("S", "3").replace("L", "5").replace("B", "2")
    _check(
        f"{fixed} <{low}> {{ f = Cast<to=1>(c) h = Sub(one, f) m = Mul(h, low) {KT} a = MatMul(q, t)"
        " z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }",
        f"{fixed} <{low}, int64[2] d = {{3, 1}}> {{ f = Cast<to=1>(c) h = Sub(one, f) m = Mul(h, low)"
        " n = Max(m, big) e = Expand(n, d) y = Attention<scale=1.0>(q, k, v, e) }",
        opset=23,
    )


HALVES = "float16[1,2,2,4] q, float16[1,2,2,4] k, float16[1,2,2,4] v"


@pytest.mark.parametrize(
    "held", ["", "float[2,2] m = {0.0, -inf, 0.0, 0.0}", "float[2,2] m = {0.0, -1e9, 0.0, 0.0}"]
)
def test_softmax_in_single_precision(held: str) -> None:
    """Scores that are cast up for Softmax and down again: the operator's own precision."""
    add = "z = Add(f, m)" if held else "z = Identity(f)"
    proto = parse(
        f"g ({HALVES}) => (float16[1,2,2,4] y) <{held.replace('-inf', '-1e30')}> {{ {KT} a = MatMul(q, t)"
        f" f = Cast<to=1>(a) {add} p0 = Softmax(z) p = Cast<to=10>(p0) y = MatMul(p, v) }}".replace(
            "z = Identity(f) p0 = Softmax(z)", "p0 = Softmax(f)"
        ).replace(" <>", ""),
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    node = next(n for n in model.graph if n.op_type == "Attention")
    assert node.attributes["softmax_precision"].as_int() == onnx.TensorProto.FLOAT
    feeds = make_feeds(proto, 0)
    got, expected = run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0]
    np.testing.assert_allclose(got.astype(float), expected.astype(float), atol=4e-3)


def test_softmax_in_another_precision_stays() -> None:
    _check(
        f"g ({HALVES}) => (double[1,2,2,4] y) {{ {KT} a = MatMul(q, t) f = Cast<to=11>(a) p = Softmax(f)"
        " w = Cast<to=11>(v) y = MatMul(p, w) }",
        opset=23,
        missed="another type than float32",
    )


def test_computed_mask_in_another_precision_stays() -> None:
    _check(
        f"g ({HALVES}, bool[2,2] c) => (float16[1,2,2,4] y) <float zero = {{0.0}}, float low = {{-1e4}}> {{ {KT}"
        " a = MatMul(q, t) f = Cast<to=1>(a) m = Where(c, zero, low) z = Add(f, m) p0 = Softmax(z)"
        " p = Cast<to=10>(p0) y = MatMul(p, v) }",
        opset=23,
        missed="another type",
        tolerance=1e-2,
    )


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool"])
def test_mask_of_integers_times_a_number(dtype: str) -> None:
    """`(1 - m) * -10000`, m any integers: no product overflows, so that no row is lost."""
    ins = f"g ({QKV}, {dtype}[B,1,S,L] c) => (float[B,2,S,4] y) <float low = {{-10000.0}}, float one = {{1.0}}>"
    head = "f = Cast<to=1>(c) h = Sub(one, f) m = Mul(h, low)"
    _check(
        f"{ins} {{ {head} {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}",
        f"{ins} {{ {head} y = Attention<scale=1.0>(q, k, v, m) }}",
        opset=23,
    )


@pytest.mark.parametrize(("target", "fuses"), [("cuda", True), ("tensorrt", False)])
def test_softmax_in_single_precision_on_other_targets(target: str, fuses: bool) -> None:
    """CUDA's kernels do so unasked, and refuse to be asked; TensorRT's parser refuses the attribute."""
    proto = parse(
        f"g ({HALVES}) => (float16[1,2,2,4] y) {{ {KT} a = MatMul(q, t) f = Cast<to=1>(a) p0 = Softmax(f)"
        " p = Cast<to=10>(p0) y = MatMul(p, v) }",
        opset=23,
    )
    model = ir.from_proto(proto)
    ctx = apply(attention.RULES, model, target=target)
    made = [node for node in model.graph if node.op_type == "Attention"]
    assert bool(made) is fuses
    assert all("softmax_precision" not in node.attributes for node in made)
    assert fuses or any("softmax in float32" in remark.reason for remark in ctx.remarks)


TRIANGLE = "bool[4,4] table = {1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}"
CORNER = (
    "size = Shape<start=2, end=3>(q) sizes = Concat<axis=0>(size, size) z2 = Identity(z)"
    " m = Slice(table, z2, sizes, axes)"
)
SQUARE = "float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v"


@pytest.mark.parametrize(
    "choice", ["w = Where(m, a, low)", "h = Not(m) w = Where(h, low, a)"], ids=["kept", "dropped"]
)
@pytest.mark.parametrize("number", ["-3.4028234663852886e+38", "-inf"])
def test_choice_by_a_causal_table_cut_to_the_length(choice: str, number: str) -> None:
    """As GPT-2 cuts its triangle; a query sees itself, so that no row is masked throughout, and no guard is needed."""
    proto = parse(
        f"g ({SQUARE}) => (float[B,2,S,4] y) <{TRIANGLE}, int64[2] z = {{0, 0}}, int64[2] axes = {{0, 1}},"
        f" float low = {{{number}}}> {{ {CORNER} {KT} a = MatMul(q, t) {choice} p = Softmax(w) y = MatMul(p, v) }}",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    kinds = [node.op_type for node in model.graph]
    assert "Attention" in kinds
    assert "ReduceMax" not in kinds
    for size in (1, 3, 4):
        feeds = make_feeds(proto, 0, dim=size)
        np.testing.assert_allclose(
            run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0], rtol=1e-4, atol=1e-6
        )


def test_choice_by_a_table_of_one_stays() -> None:
    """One flag for all broadcasts: it does not say that there is one query."""
    _check(
        f"g ({SQUARE}) => (float[B,2,S,4] y) <bool[1,1] table = {{1}}, int64[2] z = {{0, 0}},"
        f" int64[2] axes = {{0, 1}}, float low = {{-1e30}}> {{ {CORNER} {KT} a = MatMul(q, t)"
        " w = Where(m, a, low) p = Softmax(w) y = MatMul(p, v) }",
        missed="does not end in [S, L]",
        opset=23,
    )


def test_bias_of_every_head_and_an_unknown_mask_for_all() -> None:
    """As T5 adds them: the mask alone, which is small, is made steady; beside its lowest number the bias vanishes."""
    held = "<float[3] table = {0.5, -0.25, 1.0}>"
    proto = parse(
        f"g ({QKV}, int64[2,S,L] i, float[B,1,1,L] n) => (float[B,2,S,4] y) {held}"
        f"{{ {KT} b = Gather(table, i) a = MatMul(q, t) w = Add(b, n) z = Add(a, w) p = Softmax(z) y = MatMul(p, v) }}",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    assert "Attention" in [node.op_type for node in model.graph]
    feeds = make_feeds(proto, 0, dim=4)
    for number in (0.0, -1e4, LOW, -INF):
        feeds["n"] = np.full_like(feeds["n"], number)
        feeds["n"][0, 0, 0, 1:] = 0.0
        np.testing.assert_allclose(
            run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0], rtol=1e-4, atol=1e-5
        )


def test_bias_of_every_head_that_is_not_known_stays() -> None:
    _check(
        f"g ({QKV}, float[1,2,S,L] b, float[B,1,1,L] n) => (float[B,2,S,4] y)"
        f"{{ {KT} a = MatMul(q, t) w = Add(b, n) z = Add(a, w) p = Softmax(z) y = MatMul(p, v) }}",
        missed="a row of a mask for every head may be masked throughout",
        opset=23,
    )


ANY_HALVES = QKV.replace("float", "float16")


@pytest.mark.parametrize(
    ("target", "mask", "lifted"),
    [
        ("cpu", "b = Where(c, zero, low)", True),
        ("cuda", "b = Where(c, zero, low)", True),
        ("cpu", "b = Where(c, zero, inf)", False),  # zero in both
    ],
)
def test_bool_mask_in_half_precision(target: str, mask: str, lifted: bool) -> None:
    """As torch.export writes it, with the guard: low rows are lifted."""
    proto = parse(
        f"g ({ANY_HALVES}, bool[B,1,S,L] c) => (float16[B,2,S,4] y) <float16 zero = {{0}}, float16 low = {{64511}},"
        f" float16 inf = {{64512}}> {{ {mask} {KT} a = MatMul(q, t) z = Add(a, b) p = Softmax(z) {GUARD} }}",
        opset=23,
    )
    model = ir.from_proto(proto)
    ctx = apply(attention.RULES, model, target=target)
    kinds = {node.op_type for node in model.graph}
    assert "Attention" in kinds
    assert ("ReduceMax" in kinds) is lifted
    assert "IsNaN" not in kinds
    assert not apply(attention.RULES, model, target=target).rewrites, ctx.rewrites
    feeds = make_feeds(proto, 0, dim=5)
    feeds["c"][0, 0, 0] = False
    got, expected = run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)


def test_choice_of_one_number_in_half_precision_stays() -> None:
    """A row of which nothing is kept holds one number: no sum with scores does."""
    _check(
        f"g ({ANY_HALVES}, bool[B,1,S,L] c) => (float16[B,2,S,4] y) <float16 low = {{64511}}>"
        f"{{ {KT} a = MatMul(q, t) z = Where(c, a, low) p = Softmax(z) y = MatMul(p, v) }}",
        opset=23,
        missed="one number throughout",
        tolerance=1e-2,
    )


def test_two_masks_that_overflow_together() -> None:
    """Each leaves rows finite; where both mask, -infinity comes out, and a row of it is NaN."""
    proto = parse(
        f"g ({QKV}, bool[B,1,S,L] c, bool[B,1,S,L] d) => (float[B,2,S,4] y) <float zero = {{0.0}}, float low ="
        f" {{-3.4028234663852886e38}}> {{ e = Where(c, zero, low) f = Where(d, zero, low) m = Add(e, f) {KT}"
        " a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }",
        opset=23,
    )
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    assert "Attention" in {node.op_type for node in model.graph}
    feeds = make_feeds(proto, 0, dim=4)
    feeds["c"][0, 0, :2] = feeds["d"][0, 0, 0] = False
    expected = run(proto, feeds)[0]
    assert np.isnan(expected[0, :, 0]).all()
    np.testing.assert_allclose(run(ir.to_proto(model), feeds)[0], expected, rtol=1e-4, atol=1e-5)


WIDENED = (
    "g (float16[B,2,S,8] q, float16[B,2,L,8] k, float16[B,2,L,8] v, float[S,L] m) => (float[B,2,S,8] y)"
    " {{ t = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, t) w = Cast<to=1>(a) z = Add(w, m) p = Softmax(z)"
    " x = Cast<to=1>(v) y = MatMul(p, x) }}"
)


def test_scores_that_go_on_in_float32() -> None:
    """Half precision beside a float32 mask, as TorchScript writes it: on the CPU, float32 as it is computed."""
    before = WIDENED.format()
    after = (
        "g (float16[B,2,S,8] q, float16[B,2,L,8] k, float16[B,2,L,8] v, float[S,L] m) => (float[B,2,S,8] y)"
        " <float low = {-1.7014118346046923e38}, int64[1] last = {-1}> { r = ReduceMax(m, last) f = Max(r, low)"
        " l = Sub(f, r) s = Add(m, l) a = Cast<to=1>(q) b = Cast<to=1>(k) c = Cast<to=1>(v)"
        " y = Attention<scale=1.0>(a, b, c, s) }"
    )
    _check(before, after, opset=23, tolerance=5e-3)


def test_scores_that_go_on_in_float32_stay_where_halves_are_fast() -> None:
    _check(WIDENED.format(), opset=23, target="cuda", missed="another type than float32 and back")


def test_mask_of_all_queries_is_expanded_by_its_own_length() -> None:
    """As BERT's: nothing of the layer is needed for it, so that all layers share it."""
    _check(
        "g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v, bool[B,1,1,S] c) => (float[B,2,S,4] y)"
        f" <float zero = {{0.0}}, float low = {{-1e4}}> {{ m = Where(c, zero, low) {KT} a = MatMul(q, t) z = Add(a, m)"
        " p = Softmax(z) y = MatMul(p, v) }",
        "g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v, bool[B,1,1,S] c) => (float[B,2,S,4] y)"
        " <float zero = {0.0}, float low = {-1e4}, int64[1] one = {1}> { m = Where(c, zero, low)"
        " s = Shape<start=3, end=4>(m) d = Concat<axis=0>(s, one) e = Expand(m, d)"
        " y = Attention<scale=1.0>(q, k, v, e) }",
        opset=23,
    )


PAST = (
    "g (float[1,2,S,4] q, float[1,2,P,4] pk, float[1,2,P,4] pv, float[1,2,S,4] nk, float[1,2,S,4] nv)"
    " => (float[1,2,S,4] y) <bool[1,1,4,4] table = {{1,0,0,0, 1,1,0,0, 1,1,1,0, 1,1,1,1}}, int64[1] zero = {{0}},"
    " int64[1] rows = {{2}}, int64[1] columns = {{3}}, float low = {{-3.4028234663852886e38}}> {{"
    " k = Concat<axis=2>(pk, nk) v = Concat<axis=2>(pv, nv) s = Shape<start=2, end=3>(q) l = Shape<start=2, end=3>(k)"
    " {start} b = Slice(table, f, l, rows) c = Slice(b, zero, l, columns) t = Transpose<perm=[0,1,3,2]>(k)"
    " a = MatMul(q, t) z = Where(c, a, low) p = Softmax(z) y = MatMul(p, v) }}"
)


def test_table_cut_behind_a_past() -> None:
    """As GPT-2 cuts its triangle with a cache: as many rows as there are new tokens."""
    proto = parse(PAST.format(start="f = Sub(l, s)"), opset=23)
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    assert "Attention" in {node.op_type for node in model.graph}
    rng = np.random.default_rng(0)
    for past, new in ((0, 4), (1, 3), (3, 1), (2, 1)):
        sizes = {"q": new, "nk": new, "nv": new, "pk": past, "pv": past}
        feeds = {n: rng.standard_normal((1, 2, d, 4)).astype(np.float32) for n, d in sizes.items()}
        got, expected = run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_table_cut_elsewhere_stays() -> None:
    proto = parse(PAST.format(start="f = Sub(s, s)"), opset=23)  # from the first row on
    model = ir.from_proto(proto)
    ctx = apply(attention.RULES, model)
    assert "Softmax" in {node.op_type for node in model.graph}
    assert any("does not end in [S, L]" in remark.reason for remark in ctx.remarks)
