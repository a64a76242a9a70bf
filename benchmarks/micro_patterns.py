"""The patterns that benchmarks.micro times, in the spellings of exporters.

Patterns stand between graph input and output: each case is about one operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

NUMBERS = (
    "float eps = {1e-5}, float half = {0.5}, float one = {1.0}, float two = {2.0}, float three = {3.0},"
    " float mhalf = {-0.5}, float root2 = {1.4142135}, float iroot2 = {0.70710677}, float kappa = {0.7978846},"
    " float c = {0.044715}, float zero = {0.0}"
)
ROWS = "float[1,128,768]"
WIDE = "float[128,3072]"
HEADS = "float[1,12,128,64]"


@dataclasses.dataclass(frozen=True)
class Case:
    """One pattern.

    Attributes:
        name: pattern and spelling.
        io: inputs and outputs, in ONNX text.
        body: the nodes.
        constants: constants beside the numbers that all share; without data, they are drawn.
        opset: what the exporter that spells it so writes.
        causal: the size of the constant `m`, which masks what comes after each token; 0 for none.
        dims: what the named dimensions of the inputs are when it is timed.
    """

    name: str
    io: str
    body: str
    constants: str = ""
    opset: int = 17
    causal: int = 0
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        """The model, with drawn constants."""
        held = ", ".join(part for part in (NUMBERS, self.constants) if part)
        text = f'<ir_version: 8, opset_import: ["": {self.opset}]> g {self.io} <{held}> {{ {self.body} }}'
        proto = onnx.parser.parse_model(text)
        if self.causal:
            after = np.triu(np.full((1, 1, self.causal, self.causal), -1e30, np.float32), 1)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(after, "m"))
        _draw_constants(proto)
        used = {name for node in proto.graph.node for name in node.input}
        kept = [t for t in proto.graph.initializer if t.name in used]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        return proto


def _draw_constants(proto: onnx.ModelProto) -> None:
    """Constants that the text declares without data; small, so that nothing overflows."""
    made = {name for node in proto.graph.node for name in node.output}
    made |= {tensor.name for tensor in proto.graph.initializer}
    rng = np.random.default_rng(0)
    for info in [v for v in proto.graph.value_info if v.name not in made]:
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        data = (rng.standard_normal(dims) * 0.05).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(data, info.name))
        proto.graph.value_info.remove(info)


def _layer_norms() -> Iterator[Case]:
    io, affine = f"({ROWS} x) => ({ROWS} y)", "float[768] s, float[768] b"
    spellings = {
        "Mul(d,d)": "q = Mul(d, d) v = {mean}(q) a = Add(v, eps) r = Sqrt(a) n = Div(d, r)",
        "Reciprocal": "q = Mul(d, d) v = {mean}(q) a = Add(v, eps) r = Sqrt(a) i = Reciprocal(r) n = Mul(d, i)",
        "Pow(-0.5)": "q = Pow(d, two) v = {mean}(q) a = Add(v, eps) r = Pow(a, mhalf) n = Mul(d, r)",
    }
    mean = "ReduceMean<axes=[-1]>"
    for name, text in spellings.items():
        body = f"m = {mean}(x) d = Sub(x, m) {text.format(mean=mean)} t = Mul(n, s) y = Add(t, b)"
        yield Case(f"LayerNorm {name}", io, body, affine)
    plain = f"m = {mean}(x) d = Sub(x, m) q = Pow(d, two) v = {mean}(q) a = Add(v, eps) r = Sqrt(a) y = Div(d, r)"
    yield Case("LayerNorm without affine", io, plain)
    first = "float[1,96,56,56]"
    mean = "ReduceMean<axes=[1]>"
    body = (
        f"m = {mean}(x) d = Sub(x, m) q = Pow(d, two) v = {mean}(q) a = Add(v, eps) r = Sqrt(a) n = Div(d, r)"
        " t = Mul(n, s) y = Add(t, b)"
    )
    yield Case(
        "LayerNorm channel-first",
        f"({first} x) => ({first} y)",
        body,
        "float[96,1,1] s, float[96,1,1] b",
    )
    skip = "a = Add(x, z) y = LayerNormalization<axis=-1>(a, s, b)"
    yield Case("residual Add + LayerNorm", f"({ROWS} x, {ROWS} z) => ({ROWS} y)", skip, affine)
    large = "float[1,512,1024]"
    yield Case(
        "residual Add + LayerNorm, large",
        f"({large} x, {large} z) => ({large} y)",
        skip,
        "float[1024] s, float[1024] b",
    )


def _rms_norms() -> Iterator[Case]:
    io, mean = f"({ROWS} x) => ({ROWS} y)", "v = ReduceMean<axes=[-1]>(q) a = Add(v, eps)"
    spellings = {
        "Pow, Reciprocal(Sqrt) (torch.export)": f"q = Pow(x, two) {mean} r = Sqrt(a) i = Reciprocal(r) n = Mul(x, i)",
        "Mul(x,x), Div": f"q = Mul(x, x) {mean} r = Sqrt(a) n = Div(x, r)",
        "Mul(x,x), Div(1, Sqrt)": f"q = Mul(x, x) {mean} r = Sqrt(a) i = Div(one, r) n = Mul(x, i)",
        "Pow(-0.5)": f"q = Pow(x, two) {mean} i = Pow(a, mhalf) n = Mul(x, i)",
    }
    for name, body in spellings.items():
        yield Case(f"RMSNorm {name}", io, f"{body} y = Mul(s, n)", "float[768] s")


def _gelus() -> Iterator[Case]:
    io = f"({WIDE} x) => ({WIDE} y)"
    erf = "u = {u} e = Erf(u) g = Add(e, one)"
    divided, multiplied = erf.format(u="Div(x, root2)"), erf.format(u="Mul(x, iroot2)")
    yield Case("GELU erf, Div (TorchScript)", io, f"{divided} h = Mul(x, g) y = Mul(h, half)")
    yield Case("GELU erf, Div, (x/2)*gate", io, f"{divided} h = Mul(x, half) y = Mul(h, g)")
    halves = "k = Mul(e, half) g = Add(k, half) y = Mul(x, g)"
    yield Case("GELU erf, x*(erf/2 + 1/2)", io, f"u = Mul(x, iroot2) e = Erf(u) {halves}")
    yield Case("GELU erf, Mul, (x*gate)/2", io, f"{multiplied} h = Mul(x, g) y = Mul(h, half)")
    yield Case("GELU erf, Mul", io, f"{multiplied} h = Mul(x, half) y = Mul(h, g)")
    yield Case("GELU erf, x*(gate/2)", io, f"{divided} h = Mul(g, half) y = Mul(x, h)")
    yield Case("GELU erf, Mul, x*(gate/2)", io, f"{multiplied} h = Mul(g, half) y = Mul(x, h)")
    tail = "w = Mul({0}, kappa) t = Tanh(w) g = Add(t, one) h = Mul(x, half) y = Mul(h, g)"
    cubes = {
        "Pow(x,3)": "q = Pow(x, three) p = Mul(q, c) v = Add(x, p)",
        "x*x*x": "q = Mul(x, x) r = Mul(q, x) p = Mul(r, c) v = Add(x, p)",
        "x*(1+c*x*x)": "q = Mul(x, x) p = Mul(q, c) r = Add(p, one) v = Mul(x, r)",
    }
    for name, text in cubes.items():
        yield Case(f"GELU tanh, {name}", io, f"{text} {tail.format('v')}")
    fast = "q = Mul(x, c) r = Mul(q, x) p = Add(r, one) k = Mul(x, kappa) w = Mul(k, p)"
    ends = "t = Tanh(w) g = Add(t, one) h = Mul(x, g) y = Mul(h, half)"
    yield Case("GELU tanh, kappa*x*(1+c*x*x)", io, f"{fast} {ends}")
    yield Case("SiLU", io, "g = Sigmoid(x) y = Mul(x, g)")
    yield Case("Swish-24", io, "y = Swish(x)", opset=24)
    yield Case("SiLU, x/(1+exp(-x))", io, "n = Neg(x) e = Exp(n) g = Add(e, one) y = Div(x, g)")
    pair = "p = Relu(x) n = Neg(x) r = Relu(n) t = Mul(r, a) y = Sub(p, t)"
    yield Case("PRelu of two Relu", io, pair, "float[3072] a")
    yield Case("LeakyRelu of two Relu", io, pair.replace("a)", "half)"))


def _other_norms() -> Iterator[Case]:
    io = f"({ROWS} x) => ({ROWS} y)"
    last = "int64[1] last = {-1}"
    squares = "q = Mul(x, x) t = ReduceSum(q, last)"
    yield Case("L2 norm, sum of squares", io, f"{squares} r = Sqrt(t) y = Div(x, r)", last)
    yield Case(
        "L2 norm with epsilon", io, f"{squares} a = Add(t, eps) r = Sqrt(a) y = Div(x, r)", last
    )
    yield Case("L2 norm, ReduceL2", io, "r = ReduceL2<axes=[-1]>(x) y = Div(x, r)")
    image = "float[1,64,56,56]"
    yield Case(
        "GroupNormalization-21",
        f"({image} x) => ({image} y)",
        "y = GroupNormalization<num_groups=32>(x, s, b)",
        "float[64] s, float[64] b",
        21,
    )
    parts = (
        "g = Reshape(x, shape) m = ReduceMean<axes=[-1]>(g) d = Sub(g, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q)"
        " a = Add(v, eps) r = Sqrt(a) n = Div(d, r) h = Reshape(n, four) t = Mul(h, s) y = Add(t, b)"
    )
    shapes = "int64[3] shape = {0, 32, -1}, int64[4] four = {1, 64, 56, 56}"
    affine = f"float[64,1,1] s, float[64,1,1] b, {shapes}"
    yield Case(
        "GroupNorm in parts",
        f"({image} x) => ({image} y)",
        parts,
        affine,
    )


def _more_attention() -> Iterator[Case]:
    packed = "float[1,128,768]"
    heads = " ".join(
        f"{n}4 = Reshape({n}, apart) {n}t = Transpose<perm=[0,2,1,3]>({n}4)" for n in "qkv"
    )
    body = (
        f"{heads} t = Transpose<perm=[0,1,3,2]>(kt) a = MatMul(qt, t) z = Div(a, d) p = Softmax(z)"
        " o = MatMul(p, vt) u = Transpose<perm=[0,2,1,3]>(o) y = Reshape(u, flat)"
    )
    sizes = "float d = {8.0}, int64[4] apart = {0, 0, 12, 64}, int64[3] flat = {0, 0, 768}"
    io = f"({packed} q, {packed} k, {packed} v) => ({packed} y)"
    yield Case("SDPA between heads", io, body, sizes)
    cuts = (
        "int64[1] z0 = {0}, int64[1] z1 = {1}, int64[1] ax = {3}, int64[1] far = {9223372036854775807},"
        " int64[1] by = {2}, int64[1] end = {-1}, int64[4] whole = {1, 12, 128, 64}"
    )
    pairs = (
        "co = Cos(h) si = Sin(h) a = Slice(x, z0, far, ax, by) b = Slice(x, z1, far, ax, by) ac = Mul(a, co)"
        " bs = Mul(b, si) e = Sub(ac, bs) as = Mul(a, si) bc = Mul(b, co) o = Add(as, bc) ue = Unsqueeze(e, end)"
        " uo = Unsqueeze(o, end) w = Concat<axis=-1>(ue, uo) y = Reshape(w, whole)"
    )
    yield Case(
        "RoPE of neighbours", f"({HEADS} x, float[1,1,128,32] h) => ({HEADS} y)", pairs, cuts
    )
    past = "float[1,12,127,64]"
    one = "float[1,12,1,64]"
    step = (
        "nk = Concat<axis=2>(pk, k) nv = Concat<axis=2>(pv, v) t = Transpose<perm=[0,1,3,2]>(nk) a = MatMul(q, t)"
        " z = Div(a, d) p = Softmax(z) y = MatMul(p, nv)"
    )
    io = f"({one} q, {one} k, {one} v, {past} pk, {past} pv) => ({one} y, {HEADS} nk, {HEADS} nv)"
    yield Case("SDPA with past", io, step, "float d = {8.0}")


def _attention_blocks() -> Iterator[Case]:
    """Attention between its projections' heads, with the masks of exporters."""
    packed, square = "float[1,{0},768]", "float[1,1,{0},{0}]"
    heads = " ".join(
        f"{n}4 = Reshape({n}, apart) {n}t = Transpose<perm=[0,2,1,3]>({n}4)" for n in "qkv"
    )
    tail = "p = Softmax(z) o = MatMul(p, vt) u = Transpose<perm=[0,2,1,3]>(o) y = Reshape(u, flat)"
    sizes = "float d = {8.0}, int64[4] apart = {0, 0, 12, 64}, int64[3] flat = {0, 0, 768}"
    body = f"{heads} t = Transpose<perm=[0,1,3,2]>(kt) a = MatMul(qt, t) s = Div(a, d) z = Add(s, m) {tail}"
    for size in (128, 512):
        row, mask = packed.format(size), square.format(size)
        io = f"({row} q, {row} k, {row} v) => ({row} y)"
        yield Case(f"SDPA causal, {size} tokens", io, body, f"{sizes}, {mask} m", causal=size)
        given = io.replace(" v)", f" v, {mask} m)")
        yield Case(f"SDPA, mask from outside, {size} tokens", given, body, sizes)
    row = "float[1,128,768]"
    parts = (
        "h = Transpose<perm=[1,0,2]>(x) w3 = MatMul(h, w) c3 = Add(w3, c) r = Reshape(c3, five)"
        " f = Transpose<perm=[3,1,2,0,4]>(r) g3 = Squeeze(f, three1) q = Gather(g3, i0) k = Gather(g3, i1)"
        " v = Gather(g3, i2) q1 = Reshape(q, rows) k1 = Reshape(k, rows) v1 = Reshape(v, rows)"
        " q2 = Transpose<perm=[1,0,2]>(q1) k2 = Transpose<perm=[1,0,2]>(k1) v2 = Transpose<perm=[1,0,2]>(v1)"
        " q4 = Reshape(q2, four) k4 = Reshape(k2, four) v4 = Reshape(v2, four)"
        " t = Transpose<perm=[0,1,3,2]>(k4) a = MatMul(q4, t) z = Div(a, d) p = Softmax(z) o = MatMul(p, v4)"
        " u = Transpose<perm=[2,0,1,3]>(o) s = Reshape(u, matrix) e = Gemm(s, w2, b2) l = Reshape(e, back)"
        " y = Transpose<perm=[1,0,2]>(l)"
    )
    held = (
        "int64[5] five = {1, 128, 1, 3, 768}, int64[1] three1 = {3}, int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2},"
        " int64[3] rows = {128, 12, 64}, int64[4] four = {1, 12, 128, 64}, int64[2] matrix = {128, 768},"
        " int64[3] back = {128, 1, 768}, float d = {8.0}, float[768,2304] w, float[2304] c, float[768,768] w2,"
        " float[768] b2"
    )
    yield Case("nn.MultiheadAttention", f"({row} x) => ({row} y)", parts, held)


def _powers() -> Iterator[Case]:
    io = f"({ROWS} x) => ({ROWS} y)"
    yield Case("Pow(x, 2)", io, "y = Pow(x, two)")
    yield Case("Pow(x, 3)", io, "y = Pow(x, three)")
    yield Case("Pow(x^2, 0.5)", io, "q = Mul(x, x) y = Pow(q, half)")
    yield Case("Pow(x^2+eps, -0.5)", io, "q = Mul(x, x) a = Add(q, eps) y = Pow(a, mhalf)")
    yield Case("Mul of Mul", io, "q = Mul(x, two) y = Mul(q, three)")
    yield Case(
        "Expand + Add",
        f"(float[1,128,1] z, {ROWS} x) => ({ROWS} y)",
        "e = Expand(z, d) y = Add(x, e)",
        "int64[3] d = {1, 128, 768}",
    )


def _attention() -> Iterator[Case]:
    qkv = f"({HEADS} q, {HEADS} k, {HEADS} v) => ({HEADS} y)"
    scores = "t = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, t) z = Div(a, d) "
    guard = "n = IsNaN(p) w = Where(n, zero, p) y = MatMul(w, v)"
    yield Case("SDPA", qkv, f"{scores} p = Softmax(z) y = MatMul(p, v)", "float d = {8.0}")
    yield Case(
        "SDPA with guard (torch)", qkv, f"{scores} p = Softmax(z) {guard}", "float d = {8.0}"
    )
    yield from _torch_attention()
    masked = qkv.replace(" v)", " v, bool[1,1,128,128] keep)")
    body = f"m = Where(keep, zero, no) {scores} s = Add(z, m) p = Softmax(s) y = MatMul(p, v)"
    yield Case("SDPA with mask", masked, body, "float d = {8.0}, float no = {-10000.0}")
    repeat = "{0}1 = Unsqueeze({0}, at) {0}2 = Expand({0}1, five) {0}3 = Reshape({0}2, four)"
    few = "float[1,2,128,64]"
    grouped = f"({HEADS} q, {few} k, {few} v) => ({HEADS} y)"
    body = (
        f"{repeat.format('k')} {repeat.format('v')} {scores.replace('(k)', '(k3)')}"
        " p = Softmax(z) y = MatMul(p, v3)"
    )
    sizes = (
        "int64[1] at = {2}, int64[5] five = {1, 2, 6, 128, 64}, int64[4] four = {1, 12, 128, 64}"
    )
    yield Case("SDPA with repeated heads", grouped, body, f"float d = {{8.0}}, {sizes}")
    body = body.replace("p = Softmax(z)", "s = Add(z, m) p = Softmax(s)")
    masks = grouped.replace(" v)", " v, float[1,1,128,128] m)")
    yield Case("SDPA with repeated heads and mask", masks, body, f"float d = {{8.0}}, {sizes}")
    rope = (
        "e = Concat<axis=-1>(h, h) co = Cos(e) si = Sin(e) a = Slice(x, z0, z1, ax) b = Slice(x, z1, far, ax)"
        " n = Neg(b) r = Concat<axis=-1>(n, a) p = Mul(x, co) q = Mul(r, si) y = Add(p, q)"
    )
    cuts = "int64[1] z0 = {0}, int64[1] z1 = {32}, int64[1] ax = {3}, int64[1] far = {9223372036854775807}"
    yield Case("RoPE", f"({HEADS} x, float[1,1,128,32] h) => ({HEADS} y)", rope, cuts)
    soft = (
        "m = ReduceMax<axes=[-1]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last) y = Div(e, s)"
    )
    square = "float[1,12,128,128]"
    yield Case("softmax in parts", f"({square} x) => ({square} y)", soft, "int64[1] last = {-1}")


def _torch_attention() -> Iterator[Case]:
    """As torch writes scaled_dot_product_attention: both sides scaled before, keys turned as a view of three axes."""
    turned = {
        "TorchScript": "t = Transpose<perm=[0,1,3,2]>(k)",
        "torch.export": "k3 = Reshape(k, rows3) t3 = Transpose<perm=[0,2,1]>(k3) t = Reshape(t3, back)",
    }
    for size in (128, 512):
        heads, mask = f"float[1,12,{size},64]", f"float[1,1,{size},{size}]"
        io = f"({heads} q, {heads} k, {heads} v, {mask} m) => ({heads} y)"
        sizes = f"int64[3] rows3 = {{12, {size}, 64}}, int64[4] back = {{1, 12, 64, {size}}}"
        for name, keys in turned.items():
            body = (
                f"{keys} a = Mul(q, d) b = Mul(t, d) z = MatMul(a, b) s = Add(z, m) p = Softmax(s)"
                " n = IsNaN(p) w = Where(n, zero, p) y = MatMul(w, v)"
            )
            yield Case(
                f"SDPA, mask, guard ({name}), {size} tokens",
                io,
                body,
                f"float d = {{0.35355338}}, {sizes}",
            )


def _convolutions() -> Iterator[Case]:
    shuffle = "a = Reshape(x, six) t = Transpose<perm=[0,1,4,2,5,3]>(a) y = Reshape(t, four)"
    sizes = "int64[6] six = {1, 16, 2, 2, 128, 128}, int64[4] four = {1, 16, 256, 256}"
    yield Case("PixelShuffle", "(float[1,64,128,128] x) => (float[1,16,256,256] y)", shuffle, sizes)
    image = "float[1,64,56,56]"
    io, weight = f"({image} x) => ({image} y)", "float[64,64,3,3] w, float[64] b"
    conv = "c1 = Conv<pads=[1,1,1,1]>(x, w, b)"
    yield Case("Conv + PRelu", io, f"{conv} y = PRelu(c1, p)", f"{weight}, float[1] p = {{0.1}}")
    yield Case(
        "Conv + Max(x, a x)",
        io,
        f"{conv} q = Mul(c1, p) y = Max(c1, q)",
        f"{weight}, float p = {{0.1}}",
    )
    yield Case(
        "Conv + Sub, Div",
        io,
        f"{conv} q = Sub(c1, o) y = Div(q, two)",
        f"{weight}, float[64,1,1] o",
    )
    hard = f"{conv} q = Add(c1, three) p = Clip(q, zero, six) o = Mul(c1, p) y = Div(o, six)"
    yield Case("Conv + hard-swish", io, hard, f"{weight}, float six = {{6.0}}")
    limits = f"{conv} q = Max(c1, zero) y = Min(q, six)"
    yield Case("Conv + Max, Min", io, limits, f"{weight}, float six = {{6.0}}")
    yield from _odd_channels()
    bn = "n = BatchNormalization(x, s, t, u, v) y = Conv(n, w, b)"
    four = "float[64] s, float[64] t, float[64] u, float[64] v = {" + ", ".join(["1.0"] * 64) + "}"
    yield Case("BatchNorm -> Conv 1x1", io, bn, f"float[64,64,1,1] w, float[64] b, {four}")
    rows = "(float[1,128,768] x) => (float[1,128,768] y)"
    yield Case(
        "Einsum with weight", rows, 'y = Einsum<equation="bsd,de->bse">(x, w)', "float[768,768] w"
    )
    yield Case("MatMul with [1,K,N]", rows, "y = MatMul(x, w)", "float[1,768,768] w")


def _odd_channels() -> Iterator[Case]:
    """Chains of convolutions whose channels the runtime's blocked layout does not take."""
    for size, kernel in ((30, 3), (46, 3), (30, 1), (20, 3)):
        held, nodes, value = [], [], "x"
        for index in range(3):
            held.append(f"float[{size},{size},{kernel},{kernel}] w{index}, float[{size}] b{index}")
            nodes.append(
                f"c{index} = Conv<pads={[kernel // 2] * 4}>({value}, w{index}, b{index})"
                f" {'y' if index == 2 else f'r{index}'} = Relu(c{index})"
            )
            value = f"r{index}"
        image = f"float[1,{size},56,56]"
        io = f"({image} x) => ({image} y)"
        name = f"Conv {kernel}x{kernel} x3, {size} channels"
        yield Case(name, io, " ".join(nodes), ", ".join(held))


def _of_exporters() -> Iterator[Case]:
    """Spellings of whole families of exported models."""
    qkv = f"({HEADS} q, {HEADS} k, {HEADS} v, bool[1,1,128,128] seen, float[1,1,1,128] m) => ({HEADS} y)"
    body = (
        "t = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, t) z = Div(a, d) c1 = Where(seen, z, low) s = Add(c1, m)"
        " p = Softmax(s) y = MatMul(p, v)"
    )
    yield Case(
        "SDPA, choice and mask (GPT-2)", qkv, body, "float d = {8.0}, float low = {-3.4028235e38}"
    )
    yield Case("RMSNorm without scale", f"({ROWS} x) => ({ROWS} y)", RMS.format("x"))
    keras = (
        "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) a = Add(v, eps)"
        " r = Sqrt(a) i = Reciprocal(r) g = Mul(i, s) h = Mul(x, g) j = Mul(m, g) k = Sub(b, j) y = Add(h, k)"
    )
    yield Case(
        "LayerNorm, scale first (Keras)",
        f"({ROWS} x) => ({ROWS} y)",
        keras,
        "float[768] s, float[768] b",
    )
    yield from _rearranged()


RMS = "q = Pow({0}, two) v = ReduceMean<axes=[-1]>(q) a = Add(v, eps) r = Sqrt(a) i = Reciprocal(r) y = Mul({0}, i)"


def _rearranged() -> Iterator[Case]:
    shuffle = "a = Reshape(x, six) t = Transpose<perm=[0,1,3,5,2,4]>(a) y = Reshape(t, four)"
    sizes = "int64[6] six = {1, 16, 64, 2, 64, 2}, int64[4] four = {1, 64, 64, 64}"
    yield Case("PixelUnshuffle", "(float[1,16,128,128] x) => (float[1,64,64,64] y)", shuffle, sizes)
    measured = (
        "n = Shape<start=0, end=1>(x) h = Shape<start=2, end=3>(x) w = Shape<start=3>(x) i = Div(h, by) j = Div(w, by)"
        " e = Concat<axis=0>(n, ch, i, by, j, by) r = Reshape(x, e) t = Transpose<perm=[0,1,3,5,2,4]>(r)"
        " o = Concat<axis=0>(n, much, i, j) y = Reshape(t, o)"
    )
    held = "int64[1] by = {2}, int64[1] ch = {16}, int64[1] much = {64}"
    io = "(float[N,16,H,W] x) => (float[N,64,I,J] y)"
    yield Case(
        "PixelUnshuffle, unknown sizes", io, measured, held, dims={"N": 1, "H": 128, "W": 128}
    )
    io = f"({HEADS} q, {HEADS} k) => (float[1,12,128,128] y)"
    yield Case("Einsum of queries and keys", io, 'y = Einsum<equation="bhqd,bhkd->bhqk">(q, k)')
    tables = "float[1,128,1,32] co, float[1,128,1,32] si"
    woven = (
        "f = Reshape(x, five) a = Gather<axis=-1>(f, i0) b = Gather<axis=-1>(f, i1) ac = Mul(a, co) bs = Mul(b, si)"
        " e = Sub(ac, bs) as = Mul(a, si) bc = Mul(b, co) o = Add(as, bc) ue = Unsqueeze(e, end) uo = Unsqueeze(o, end)"
        " w = Concat<axis=-1>(ue, uo) y = Reshape(w, whole)"
    )
    held = (
        "int64[5] five = {1, 128, 12, 32, 2}, int64[4] whole = {1, 128, 12, 64}, int64[1] end = {-1}, int64 i0 = {0},"
        " int64 i1 = {1}"
    )
    rows = "float[1,128,12,64]"
    yield Case("RoPE of neighbours, five axes", f"({rows} x, {tables}) => ({rows} y)", woven, held)


def cases() -> Iterator[Case]:
    """Every pattern in every spelling."""
    for family in (
        _layer_norms,
        _rms_norms,
        _other_norms,
        _gelus,
        _powers,
        _attention,
        _more_attention,
        _attention_blocks,
        _convolutions,
        _of_exporters,
    ):
        yield from family()
