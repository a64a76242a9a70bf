"""Attention out of its parts, and the guard against rows that are masked throughout."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import attention

from tests.rewriting import apply, check, make_feeds, parse, run

QKV = "float[B,2,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
G = f"g ({QKV}) => (float[B,2,S,4] y) <float s = {{0.5}}, float r = {{2.0}}, float zero = {{0.0}}> "
KT = "t = Transpose<perm=[0,1,3,2]>(k)"
GUARD = "n = IsNaN(p) w = Where(n, zero, p) y = MatMul(w, v)"


def _check(before: str, after: str | None = None, **options: object) -> None:
    options.setdefault("tolerance", 1e-5)
    check(attention.RULES, before, after, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "scale"),
    [
        (f"{KT} z = MatMul(q, t)", 1.0),
        (f"{KT} a = MatMul(q, t) z = Mul(a, s)", 0.5),
        (f"{KT} a = MatMul(q, t) z = Div(a, r)", 0.5),
        (f"{KT} c = Mul(q, s) z = MatMul(c, t)", 0.5),
        (f"{KT} c = Mul(q, s) d = Mul(t, s) z = MatMul(c, d)", 0.25),
        (f"{KT} c = Mul(q, s) d = Div(t, s) z = MatMul(c, d)", 1.0),
    ],
)
@pytest.mark.parametrize("tail", ["y = MatMul(p, v)", GUARD])
def test_attention_without_mask(body: str, scale: float, tail: str) -> None:
    _check(
        f"{G} {{ {body} p = Softmax(z) {tail} }}",
        f"g ({QKV}) => (float[B,2,S,4] y) {{ y = Attention<scale={scale}>(q, k, v) }}",
        opset=23,
    )


def test_attention_of_keys_transposed_at_once() -> None:
    """Keys [B, L, H, D] go to [B, H, D, L] in one Transpose, which becomes the other."""
    qkv = QKV.replace("float[B,2,L,4] k", "float[B,L,2,4] k")
    _check(
        f"g ({qkv}) => (float[B,2,S,4] y) {{ t = Transpose<perm=[0,2,3,1]>(k) z = MatMul(q, t)"
        " p = Softmax(z) y = MatMul(p, v) }",
        f"g ({qkv}) => (float[B,2,S,4] y) {{ t = Transpose<perm=[0,2,1,3]>(k)"
        " y = Attention<scale=1.0>(q, t, v) }",
        opset=23,
    )
    qkv = QKV.replace("float[B,2,L,4] k", "float[B,2,4,L] k")
    _check(
        f"g ({qkv}) => (float[B,2,S,4] y) {{ z = MatMul(q, k) p = Softmax(z) y = MatMul(p, v) }}",
        f"g ({qkv}) => (float[B,2,S,4] y) {{ t = Transpose<perm=[0,1,3,2]>(k)"
        " y = Attention<scale=1.0>(q, t, v) }",
        opset=23,
    )


MASKED = f"g ({QKV}, bool[B,1,S,L] c) => (float[B,2,S,4] y) <float s = {{0.5}}, float zero = {{0.0}}, float no"


def test_mask_that_spares_every_row() -> None:
    _check(
        f"{MASKED} = {{-10000.0}}> {{ m = Where(c, zero, no) {KT} a = MatMul(q, t) z = Add(a, m)"
        " p = Softmax(z) y = MatMul(p, v) }",
        f"{MASKED} = {{-10000.0}}> {{ m = Where(c, zero, no) y = Attention<scale=1.0>(q, k, v, m) }}",
        opset=23,
    )


@pytest.mark.parametrize("number", [-np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize("tail", ["y = MatMul(p, v)", GUARD])
def test_fully_masked_rows(number: float, tail: str) -> None:
    """Zero where the guard says so, NaN without it, an even spread where the number is finite."""
    proto = parse(
        f"{MASKED}> {{ m = Where(c, zero, no) {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) {tail} }}",
        opset=23,
    )
    held = next(t for t in proto.graph.initializer if t.name == "no")
    held.CopyFrom(onnx.numpy_helper.from_array(np.asarray(number, np.float32), "no"))
    model = ir.from_proto(proto)
    apply(attention.RULES, model)
    assert any(node.op_type == "Attention" for node in model.graph)
    feeds = make_feeds(proto, 0)
    feeds["c"][:, :, 0] = False
    got, expected = run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_mask_that_broadens_stays() -> None:
    _check(
        "g (float[1,2,3,4] q, float[1,2,5,4] k, float[1,2,5,4] v, bool[2,1,3,5] c) => (float[2,2,3,4] y)"
        f"<float zero, float no> {{ m = Where(c, zero, no) {KT} a = MatMul(q, t) z = Add(a, m)"
        " p = Softmax(z) y = MatMul(p, v) }",
        opset=23,
        missed="broadens",
    )


def test_constant_mask_for_all_queries_is_written_out() -> None:
    qkv = "g (float[1,2,3,4] q, float[1,2,5,4] k, float[1,2,5,4] v) => (float[1,2,3,4] y) <float[1,5] m"
    _check(
        f"{qkv}> {{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}",
        f"{qkv}, int64[2] e = {{3, 1}}> {{ w = Expand(m, e) y = Attention<scale=1.0>(q, k, v, w) }}",
        opset=23,
    )


def test_large_constant_mask_for_all_queries_stays() -> None:
    _check(
        "g (float[1,1,300,1] q, float[1,1,300,1] k, float[1,1,300,1] v) => (float[1,1,300,1] y)"
        f"<float[1,300] m> {{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}",
        opset=23,
        missed="does not end in [S, L]",
    )


@pytest.mark.parametrize("m", ["float m", "float[5] m", "float[1,1,3,1] m"])
def test_mask_that_broadcasts_over_queries_or_keys_stays(m: str) -> None:
    _check(
        "g (float[1,2,3,4] q, float[1,2,5,4] k, float[1,2,5,4] v) => (float[1,2,3,4] y)"
        f"<{m}> {{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}",
        opset=23,
        missed="does not end in [S, L]",
    )


@pytest.mark.parametrize(
    "m", ["float[3,5] m", "float[2,3,5] m", "float[1,1,3,5] m", "float[2,1,3,5] m"]
)
def test_constant_mask(m: str) -> None:
    g = "g (float[2,2,3,4] q, float[2,2,5,4] k, float[2,2,5,4] v) => (float[2,2,3,4] y)"
    _check(
        f"{g} <{m}> {{ {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}",
        f"{g} <{m}> {{ y = Attention<scale=1.0>(q, k, v, m) }}",
        opset=23,
    )


@pytest.mark.parametrize(
    ("graph", "body", "reason"),
    [
        (G, f"{KT} z = MatMul(q, t) p = Softmax<axis=2>(z) y = MatMul(p, v)", ""),
        (
            G.replace("zero", "x").replace("{0.5}", "{-0.5}"),
            f"{KT} c = Mul(q, s) z = MatMul(c, t) p = Softmax(z) y = MatMul(p, v)",
            "",
        ),
        (
            G.replace("float[B,2,L,4] v", "float[1,1,L,4] v"),
            f"{KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v)",
            "differ",
        ),
    ],
)
def test_other_products_stay(graph: str, body: str, reason: str) -> None:
    _check(f"{graph} {{ {body} }}", opset=23, missed=reason)


def test_attention_below_its_opset_or_elsewhere_stays() -> None:
    text = f"{G} {{ {KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v) }}"
    _check(text, opset=22)
    _check(text, opset=23, target="portable", missed="no Attention")


def test_weights_that_are_an_output_stay() -> None:
    _check(
        G.replace("y)", "y, float[B,2,S,L] p)", 1)
        + f"{{ {KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v) }}",
        opset=23,
        missed="graph output",
    )


H = "g (float[B,S,4] a, float[B,4,L] b) => (float[B,S,L] y) <float s = {0.5}, float zero = {0.0}"


@pytest.mark.parametrize("number", ["", ", float m = {-1e30}", ", float[2] m = {0.0, -3e38}"])
def test_guard_of_rows_that_cannot_be_masked(number: str) -> None:
    g = H.replace("L]", "2]") + number + "> "
    add = "z = Add(x, m)" if number else "z = Identity(x)"
    head = f"r = MatMul(a, b) x = Mul(r, s) {add}"
    _check(
        f"{g} {{ {head} p = Softmax(z) n = IsNaN(p) y = Where(n, zero, p) }}",
        f"{g} {{ {head} y = Softmax(z) }}",
    )


@pytest.mark.parametrize(
    "head",
    [
        "z = Relu(a)",
        "z = Identity(a)",
        "r = MatMul(a, b) z = Add(r, c)",
        "r = MatMul(a, b) z = Div(s, r)",
        "r = MatMul(a, b) o = Add(r, low) z = Add(o, low)",
    ],
)
def test_guard_of_rows_that_may_be_masked_stays(head: str) -> None:
    _check(
        "g (float[2,2,2] a, float[2,2,2] b, float[2,2] c) => (float[2,2,2] y)"
        "<float s = {0.5}, float zero = {0.0}, float low = {-3e38}>"
        f"{{ {head} p = Softmax(z) n = IsNaN(p) y = Where(n, zero, p) }}",
        missed="masked throughout",
    )


GROUPED = "float[B,4,S,4] q, float[B,2,L,4] k, float[B,2,L,4] v"
REPEAT = "{0}1 = Unsqueeze({0}, two) {0}2 = Expand({0}1, five) {0}3 = Reshape({0}2, four)"
SIZES = "int64[1] two = {2}, int64[5] five = {1, 2, 2, 1, 4}, int64[4] four = {0, 4, -1, 4}"


@pytest.mark.parametrize("repeated", ["k", "kv"])
def test_repeated_heads(repeated: str) -> None:
    """The operator shares keys and values between heads by itself, where both are repeated alike."""
    value = "v" if repeated == "kv" else "v0"
    qkv = GROUPED if repeated == "kv" else GROUPED.replace("2,L,4] v", "4,L,4] v3")
    body = REPEAT.format("k") + (REPEAT.format("v") if value == "v" else "")
    after = (
        "y = Attention<scale=1.0>(q, k, v)"
        if repeated == "kv"
        else f"{REPEAT.format('k')} y = Attention<scale=1.0>(q, k3, v3)"
    )
    _check(
        f"g ({qkv}) => (float[B,4,S,4] y) <{SIZES}> {{ {body} t = Transpose<perm=[0,1,3,2]>(k3)"
        " z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v3) }",
        f"g ({qkv}) => (float[B,4,S,4] y) <{SIZES}> {{ {after} }}",
        opset=23,
    )


def test_repeated_heads_of_folded_keys() -> None:
    """torch.export transposes the keys between two Reshape, the first of which takes the repetition in."""
    qkv = "float[2,4,3,4] q, float[2,2,5,4] k, float[2,2,5,4] v"
    fold = (
        "k1 = Unsqueeze(k, two) k2 = Expand(k1, five) k3 = Reshape(k2, flat)"
        " k4 = Transpose<perm=[0,2,1]>(k3) t = Reshape(k4, back)"
    )
    sizes = SIZES + ", int64[3] flat = {8, 5, 4}, int64[4] back = {2, 4, 4, 5}, float zero = {0.0}"
    _check(
        f"g ({qkv}) => (float[2,4,3,4] y) <{sizes}> {{ {fold} {REPEAT.format('v')}"
        f" z = MatMul(q, t) p = Softmax(z) n = IsNaN(p) w = Where(n, zero, p) y = MatMul(w, v3) }}",
        f"g ({qkv}) => (float[2,4,3,4] y) {{ y = Attention<scale=1.0>(q, k, v) }}",
        opset=23,
    )


def test_heads_repeated_the_other_way_stay() -> None:
    """Tiling puts head h beside h + G, not beside itself."""
    qkv = GROUPED
    tile = REPEAT.replace("two", "one").replace("five", "tiled")
    _check(
        f"g ({qkv}) => (float[B,4,S,4] y) <{SIZES}, int64[1] one = {{1}}, int64[5] tiled = {{1, 2, 2, 1, 4}}> {{"
        f" {tile.format('k')} {tile.format('v')} t = Transpose<perm=[0,1,3,2]>(k3)"
        " z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v3) }",
        f"g ({qkv}) => (float[B,4,S,4] y) <{SIZES}, int64[1] one = {{1}}, int64[5] tiled = {{1, 2, 2, 1, 4}}> {{"
        f" {tile.format('k')} {tile.format('v')} y = Attention<scale=1.0>(q, k3, v3) }}",
        opset=23,
    )


def test_keys_shared_by_all_heads() -> None:
    qkv = GROUPED.replace("[B,2", "[B,1")
    _check(
        f"g ({qkv}) => (float[B,4,S,4] y) {{ {KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v) }}",
        f"g ({qkv}) => (float[B,4,S,4] y) {{ y = Attention<scale=1.0>(q, k, v) }}",
        opset=23,
    )


def test_keys_of_other_heads_than_values_stay() -> None:
    _check(
        "g (float[B,4,S,4] q, float[B,1,L,4] k, float[B,4,L,4] v) => (float[B,4,S,4] y)"
        f"{{ {KT} z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v) }}",
        opset=23,
        missed="differ in batch or heads",
    )


def test_heads_repeated_by_gather_tile_or_expand() -> None:
    """`repeat_interleave` as a Gather or a Tile, and one head for all as an Expand."""
    gathered = "k3 = Gather<axis=1>(k, twice) v3 = Gather<axis=1>(v, twice)"
    tiled = " ".join(
        f"{n}1 = Unsqueeze({n}, two) {n}2 = Tile({n}1, times) {n}3 = Reshape({n}2, four)"
        for n in "kv"
    )
    held = SIZES + ", int64[4] twice = {0, 0, 1, 1}, int64[5] times = {1, 1, 2, 1, 1}"
    rest = "t = Transpose<perm=[0,1,3,2]>(k3) z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v3)"
    for body in (gathered, tiled):
        _check(
            f"g ({GROUPED}) => (float[B,4,S,4] y) <{held}> {{ {body} {rest} }}",
            f"g ({GROUPED}) => (float[B,4,S,4] y) {{ y = Attention<scale=1.0>(q, k, v) }}",
            opset=23,
        )
    spread = "k3 = Expand(k, heads) v3 = Expand(v, heads)"
    g = f"g ({GROUPED.replace('[B,2,L', '[2,1,5').replace('[B', '[2')}) => (float[2,4,S,4] y)"
    _check(
        f"{g} <int64[4] heads = {{2, 4, 5, 4}}> {{ {spread} {rest} }}",
        f"{g} {{ y = Attention<scale=1.0>(q, k, v) }}",
        opset=23,
    )


@pytest.mark.parametrize("order", ["0, 1, 0, 1", "0, 0, 1, 0"])
def test_heads_gathered_otherwise_stay(order: str) -> None:
    body = "k3 = Gather<axis=1>(k, twice) v3 = Gather<axis=1>(v, twice)"
    _check(
        f"g ({GROUPED}) => (float[B,4,S,4] y) <int64[4] twice = {{{order}}}> {{ {body}"
        " t = Transpose<perm=[0,1,3,2]>(k3) z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v3) }",
        f"g ({GROUPED}) => (float[B,4,S,4] y) <int64[4] twice = {{{order}}}> {{ {body}"
        " y = Attention<scale=1.0>(q, k3, v3) }",
        opset=23,
    )


FLAT = "float[B,S,4] q, float[B,L,4] k, float[B,L,4] v"
ONE = "q_num_heads=1, kv_num_heads=1"


@pytest.mark.parametrize("turn", ["t = Transpose<perm=[0,2,1]>(k)", "t = Identity(k)"])
@pytest.mark.parametrize("tail", ["y = MatMul(p, v)", GUARD])
def test_attention_without_heads(turn: str, tail: str) -> None:
    ins = FLAT if "Transpose" in turn else FLAT.replace("[B,L,4] k", "[B,4,L] k")
    after = "" if "Transpose" in turn else f"{turn} u = Transpose<perm=[0,2,1]>(t)"
    key = "u" if after else "k"
    _check(
        f"g ({ins}) => (float[B,S,4] y) <float s = {{0.5}}, float zero = {{0.0}}> {{ {turn}"
        f" a = MatMul(q, t) z = Mul(a, s) p = Softmax(z) {tail} }}",
        f"g ({ins}) => (float[B,S,4] y) {{ {after} y = Attention<scale=0.5, {ONE}>(q, {key}, v) }}",
        opset=23,
    )


@pytest.mark.parametrize("m", ["float[3,5] m", "float[1,3,5] m", "float[2,3,5] m"])
def test_mask_without_heads(m: str) -> None:
    g = "g (float[2,3,4] q, float[2,5,4] k, float[2,5,4] v) => (float[2,3,4] y)"
    wide = m != "float[3,5] m"
    lift, name = ("n = Unsqueeze(m, one)", "n") if wide else ("", "m")
    one = ", int64[1] one = {1}" if wide else ""
    _check(
        f"{g} <{m}> {{ t = Transpose<perm=[0,2,1]>(k) a = MatMul(q, t) z = Add(a, m)"
        " p = Softmax(z) y = MatMul(p, v) }",
        f"{g} <{m}{one}> {{ {lift} y = Attention<scale=1.0, {ONE}>(q, k, v, {name}) }}",
        opset=23,
    )


def test_matrices_of_different_batches_stay() -> None:
    _check(
        "g (float[2,3,4] q, float[1,5,4] k, float[1,5,4] v) => (float[2,3,4] y)"
        "{ t = Transpose<perm=[0,2,1]>(k) z = MatMul(q, t) p = Softmax(z) y = MatMul(p, v) }",
        opset=23,
        missed="differ in batch",
    )


CHOICE = "g (float[1,2,2,4] q, float[1,2,2,4] k, float[1,2,2,4] v{more}) => (float[1,2,2,4] y)"
LOWER, FULL = "{1, 0, 1, 1}", "{0, 0, 1, 1}"


def _chosen(
    number: float, *, rows: str | None, tail: str = "y = MatMul(p, v)", swap: bool = False
) -> onnx.ModelProto:
    """Scores that a Where replaces by a number; the choice a constant of those rows, or an input."""
    held = f", bool[2,2] c = {rows}" if rows else ""
    order = "c, no, a" if swap else "c, a, no"
    proto = parse(
        f"{CHOICE.format(more='' if rows else ', bool[2,2] c')} <float zero = {{0.0}}, float no{held}> {{ {KT}"
        f" a = MatMul(q, t) z = Where({order}) p = Softmax(z) {tail} }}",
        opset=23,
    )
    tensor = next(t for t in proto.graph.initializer if t.name == "no")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(number, np.float32), "no"))
    return proto


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize(
    ("number", "rows", "tail", "fuses"),
    [
        (-np.inf, LOWER, "y = MatMul(p, v)", True),
        (LOWEST, LOWER, "y = MatMul(p, v)", True),
        (-1e9, LOWER, GUARD, True),
        (-np.inf, None, GUARD, True),
        (-np.inf, FULL, GUARD, True),
        (-np.inf, None, "y = MatMul(p, v)", True),
        (-np.inf, FULL, "y = MatMul(p, v)", True),
        (LOWEST, None, GUARD, True),
        (-1e9, FULL, GUARD, True),
        (-1e9, None, "y = MatMul(p, v)", True),
        (-50.0, LOWER, GUARD, False),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_scores_replaced_by_a_number(
    number: float, rows: str | None, tail: str, fuses: bool, swap: bool
) -> None:
    """A choice of scores is a bool mask, unless a whole row may be replaced and the answers part there."""
    if swap and rows:
        rows = rows.translate(str.maketrans("01", "10"))
    proto = _chosen(number, rows=rows, tail=tail, swap=swap)
    model = ir.from_proto(proto)
    ctx = apply(attention.RULES, model)
    fused = any(node.op_type == "Attention" for node in model.graph)
    assert fused == fuses
    assert fused or any("throughout" in remark.reason for remark in ctx.remarks)
    for seed in range(3):
        feeds = make_feeds(proto, seed)
        got, expected = run(ir.to_proto(model), feeds)[0], run(proto, feeds)[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_mask_where_it_is_zero_of_itself() -> None:
    """`Where(bool(z), low, z)` is zero wherever it is z."""
    ins = f"g ({QKV}, int64[B,1,S,L] c) => (float[B,2,S,4] y) <float low = {{-1e9}}>"
    head = "f = Cast<to=1>(c) b = Cast<to=9>(f) m = Where(b, low, f)"
    _check(
        f"{ins} {{ {head} {KT} a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }}",
        f"{ins} {{ {head} y = Attention<scale=1.0>(q, k, v, m) }}",
        opset=23,
    )


@pytest.mark.parametrize(("batch", "keys"), [(0, 5), (1, 0)])
def test_attention_of_nothing_stays(batch: int, keys: int) -> None:
    """No batch, or no keys: the parts give an empty tensor, or zeros; the operator's kernel refuses both."""
    sizes = f"float[{batch},2,3,4] q, float[{batch},2,{keys},4] k, float[{batch},2,{keys},4] v"
    check(
        attention.RULES,
        f"g ({sizes}) => (float[{batch},2,3,4] y) {{ t = Transpose<perm=[0,1,3,2]>(k) z = MatMul(q, t)"
        " p = Softmax(z) y = MatMul(p, v) }",
        missed="no queries or no keys",
        opset=23,
    )


@pytest.mark.parametrize("mask", ["", "b = Add(z, m)"])
def test_limited_scores_stay(mask: str) -> None:
    """Attention has a softcap, and ONNX Runtime's kernel takes four times as long for it as for the parts."""
    last = "b" if mask else "z"
    _check(
        f"g ({QKV}, float[S,L] m) => (float[B,2,S,4] y) <float c = {{50.0}}> {{ {KT} a = MatMul(q, t) d = Div(a, c)"
        f" h = Tanh(d) z = Mul(h, c) {mask} p = Softmax({last}) y = MatMul(p, v) }}",
        opset=23,
    )
