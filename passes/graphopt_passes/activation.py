"""Activations: every spelling of GELU, SiLU, hard-swish, Mish and their parts becomes the operator that it is.

    Before:  y = Mul(Mul(x, 0.5), Add(Erf(Div(x, 1.41421356)), 1))
    After:   y = Gelu(x)

The argument of the nonlinearity is read as a polynomial in x, so that the order of operands, Mul or Div, Pow or
repeated Mul make no difference.  Changes numerics: reordered.  Never puts tanh for erf.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import no_operator
from graphopt_passes.polynomials import Polynomial, close, read

OPSETS = (7, 10_000)
"""Opsets of multidirectional broadcasting."""

MS = "com.microsoft"
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
ROUNDING = 1e-6
"""Relative rounding of numbers that were written down in float32."""
CUBIC = 0.044715
TANH = math.sqrt(2 / math.pi)

x, u = Var(), Var()
half, one = Lit(0.5), Lit(1.0)


def _halved(value: Var | Op) -> Either:
    return Either(Op("Mul", value, half), Op("Div", value, Lit(2.0)))


bend = Op("Erf|Tanh", u)
gate = Op("Add", bend, one)

gelu_1 = Op("Mul", _halved(x), gate)
gelu_2 = Op("Mul|Div", Op("Mul", x, gate), Either(half, Lit(2.0)))
gelu_3 = Op("Mul", x, _halved(gate))
gelu_4 = Op("Mul", x, Op("Add", _halved(bend), half))


def _refuse_broader(m: Match, root: Op, kept: Var | ir.Value = x) -> None:
    """Declines where a constant gives the result another shape than `kept` has.

    Raises:
        Skip: the shapes differ, or are not known to be equal.
    """
    dims = m.dims(kept)
    if dims is None or m.dims(root) != dims:
        raise Skip("a constant may broaden the result", m.out(root))


def _gelu(m: Match, g: Builder, root: Op) -> ir.Value | None:
    argument = _argument(m)
    if argument is None:
        return None
    _refuse_broader(m, root)
    if m[bend].op_type == "Erf" and close(argument, (0.0, math.sqrt(0.5)), m.dtype(x)):
        return _emit_gelu(m, g)
    if m[bend].op_type == "Tanh" and close(argument, (0.0, TANH, 0.0, TANH * CUBIC), m.dtype(x)):
        return _emit_tanh_gelu(m, g)
    return None


def _argument(m: Match) -> Polynomial | None:
    """What `u` is as a polynomial in x, if x alone gives it."""
    return read(m[u], m[x])


def _emit_gelu(m: Match, g: Builder) -> ir.Value:
    """The erf GELU of x in the operator of the target.  Source: Gelu-20; com.microsoft Gelu-1."""
    dtype = m.dtype(x)
    if m.emits("Gelu", dtype=dtype):
        return g.op("Gelu", m[x])
    if m.emits("Gelu", MS, dtype):
        return g.op("Gelu", m[x], domain=MS)
    raise Skip(no_operator(m, "Gelu", dtype), m[x])


def _emit_tanh_gelu(m: Match, g: Builder) -> ir.Value:
    """The tanh GELU of x in the operator of the target.

    Source: Gelu-20 with approximate=tanh; com.microsoft FastGelu-1.
    """
    dtype = m.dtype(x)
    if m.emits("Gelu", dtype=dtype):
        return g.op("Gelu", m[x], approximate="tanh")
    if m.emits("FastGelu", MS, dtype):
        return g.op("FastGelu", m[x], domain=MS)
    raise Skip(no_operator(m, "Gelu", dtype), m[x])


@rule(gelu_1, opset=OPSETS, benefit=2)
def fuse_gelu_of_half_input(m: Match, g: Builder) -> ir.Value | None:
    """`(x/2) * (1 + f(u))` -> `Gelu(x)`, f = erf or tanh of its polynomial in x.  Source: Gelu-20."""
    return _gelu(m, g, gelu_1)


@rule(gelu_2, opset=OPSETS, benefit=2)
def fuse_gelu_of_half_result(m: Match, g: Builder) -> ir.Value | None:
    """`(x * (1 + f(u))) / 2` -> `Gelu(x)`, f = erf or tanh of its polynomial in x.  Source: Gelu-20."""
    operator = m[gelu_2]
    number = values.fill(operator.inputs[1]) or values.fill(operator.inputs[0])
    if number != (0.5 if operator.op_type == "Mul" else 2.0):
        return None
    return _gelu(m, g, gelu_2)


@rule(gelu_3, opset=OPSETS, benefit=2)
def fuse_gelu_of_half_gate(m: Match, g: Builder) -> ir.Value | None:
    """`x * ((1 + f(u)) / 2)` -> `Gelu(x)`, f = erf or tanh of its polynomial in x.  Source: Gelu-20."""
    return _gelu(m, g, gelu_3)


@rule(gelu_4, opset=OPSETS, benefit=2)
def fuse_gelu_of_shifted_gate(m: Match, g: Builder) -> ir.Value | None:
    """`x * (1/2 + f(u) / 2)` -> `Gelu(x)`, f = erf or tanh of its polynomial in x.  Source: Gelu-20."""
    return _gelu(m, g, gelu_4)


sigmoid = Op("Sigmoid", u)
swish = Op("Mul", x, sigmoid)


@rule(swish, opset=OPSETS)
def fuse_swish(m: Match, g: Builder) -> ir.Value | None:
    """`x * sigmoid(a x)` -> `QuickGelu(x, alpha=a)` or `Swish(x, alpha=a)`.

    A tanh GELU, where the argument is 2 sqrt(2/pi) (x + 0.044715 x^3).
    Source: com.microsoft QuickGelu-1, Swish-24.
    """
    argument = _argument(m)
    if argument is None:
        return None
    _refuse_broader(m, swish)
    dtype = m.dtype(x)
    if close(argument, (0.0, 2 * TANH, 0.0, 2 * TANH * CUBIC), dtype):
        return _emit_tanh_gelu(m, g)
    if len(argument) != 2 or argument[0] != 0:
        return None
    if m.emits("QuickGelu", MS, dtype):
        return g.op("QuickGelu", m[x], domain=MS, alpha=argument[1])
    return g.op("Swish", m[x], alpha=argument[1]) if m.emits("Swish", dtype=dtype) else None


clip = Op("Clip", u, ...)
hard_gate = Op("Mul|Div", clip, Var(const=True))


@rule(hard_gate, opset=OPSETS)
def fuse_scaled_clip_into_hard_sigmoid(m: Match, g: Builder) -> ir.Value | None:
    """`s * Clip(a v + b, 0, 1/s)` -> `HardSigmoid(v, alpha=s a, beta=s b)`, s > 0.  Source: HardSigmoid-6."""
    operator = m[hard_gate]
    constant = operator.inputs[1] if operator.inputs[0] is m.out(clip) else operator.inputs[0]
    number = values.fill(constant) if constant is not None else None
    if number is None or number <= 0:
        return None
    return _hard_sigmoid(m, g, hard_gate, number if operator.op_type == "Mul" else 1 / number)


@rule(clip, opset=OPSETS)
def fuse_clip_into_hard_sigmoid(m: Match, g: Builder) -> ir.Value | None:
    """`Clip(a v + b, 0, 1)` -> `HardSigmoid(v, alpha=a, beta=b)`, where a v + b is not v itself."""
    return _hard_sigmoid(m, g, clip, 1.0)


def _hard_sigmoid(m: Match, g: Builder, root: Op, scale: float) -> ir.Value | None:
    bounds, found = _bounds(m, m[clip]), _line(m[u])
    if bounds is None or found is None or not _is_single_float(m, u):
        return None
    if bounds[0] != 0 or abs(scale * bounds[1] - 1) > ROUNDING:
        return None
    v, (shift, slope) = found
    _refuse_broader(m, root, v)
    return g.op("HardSigmoid", v, alpha=scale * slope, beta=scale * shift)


def _bounds(m: Match, node: ir.Node) -> tuple[float, float] | None:
    """Both bounds of a Clip, where both are known numbers.  Source: Clip-6 (attributes), -11 (inputs)."""
    if m.opset() < 11:
        return float(m.attr(node, "min")), float(m.attr(node, "max"))
    bounds = [values.scalar(v) for v in node.inputs[1:]]
    known = [float(b) for b in bounds if b is not None]
    return (known[0], known[1]) if len(known) == 2 else None


def _line(value: ir.Value) -> tuple[ir.Value, tuple[float, float]] | None:
    """v, (b, a) where `value` is a v + b, through at most two nodes; None where it is v itself."""
    v = value
    for _ in range(2):
        inner = _scalar_operand(v)
        v = v if inner is None else inner
    terms = None if v is value else read(value, v)
    return None if terms is None or len(terms) != 2 else (v, (terms[0], terms[1]))


def _scalar_operand(value: ir.Value) -> ir.Value | None:
    """The other operand of the arithmetic with a number that makes `value`."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    left, right = node.inputs
    if values.fill(right) is not None:
        return left
    return right if values.fill(left) is not None and node.op_type != "Div" else None


hard_sigmoid = Op("HardSigmoid", x)
hard_swish = Op("Mul", x, hard_sigmoid)


@rule(hard_swish, opset=OPSETS)
def fuse_hard_swish(m: Match, g: Builder) -> ir.Value | None:
    """`x * HardSigmoid(x, 1/6, 1/2)` -> `HardSwish(x)`, where the target has a kernel for it.  Source: HardSwish-14."""
    alpha, beta = (float(m.attr(hard_sigmoid, name)) for name in ("alpha", "beta"))
    if abs(alpha - 1 / 6) > ROUNDING or abs(beta - 0.5) > ROUNDING:
        return None
    return g.op("HardSwish", m[x]) if m.emits("HardSwish", dtype=m.dtype(x)) else None


lifted = Op("Clip", Op("Add", x, Lit(3.0)), ...)
swish_by_six = Op("Mul|Div", Op("Mul", x, lifted), Either(Lit(6.0), Lit(1 / 6, tolerance=ROUNDING)))


@rule(swish_by_six, opset=OPSETS, benefit=2)
def fuse_divided_hard_swish(m: Match, g: Builder) -> ir.Value | None:
    """`(x * Clip(x + 3, 0, 6)) / 6` -> `x * HardSigmoid(x, 1/6, 1/2)`, and so HardSwish(x) where the target has it."""
    operator = m[swish_by_six]
    number = values.fill(operator.inputs[1]) or values.fill(operator.inputs[0]) or 0.0
    if (number > 1) != (operator.op_type == "Div") or not _is_single_float(m, x):
        return None
    if _bounds(m, m[lifted]) != (0.0, 6.0):
        return None
    _refuse_broader(m, swish_by_six)
    return g.op("Mul", m[x], g.op("HardSigmoid", m[x], alpha=1 / 6, beta=0.5))


ENOUGH = 17.0
"""Where log(1 + exp(x)) is x in float32: the difference is below half a unit in its last place."""

softened = Op("Log", Op("Add", Op("Exp", x), one))


@rule(softened, opset=OPSETS)
def fuse_softplus(m: Match, g: Builder) -> ir.Value:
    """`log(exp(x) + 1)` -> `Softplus(x)`, finite also where exp(x) is not.  Source: Softplus-1."""
    _refuse_broader(m, softened)
    if not m.emits("Softplus", dtype=m.dtype(x)):
        raise Skip(f"the target has no Softplus for {m.dtype(x)} that pays", m[x])
    return g.op("Softplus", m[x])


limit = Var(const=True)
held_softplus = Op("Where", Op("Greater", x, limit), x, Op("Softplus", x))


@rule(held_softplus, opset=OPSETS)
def drop_limit_of_softplus(m: Match, g: Builder) -> ir.Value | None:
    """`Where(x > 20, x, Softplus(x))` -> `Softplus(x)`, which is x there to the last place, and has no limit to guard.

    As torch.export spells nn.Softplus.  Source: Softplus-1.
    """
    if m.scalar(limit) < ENOUGH or m.dims(held_softplus) != m.dims(x):
        return None
    if m.dtype(x) == ir.DataType.DOUBLE:
        raise Skip("in float64, 20 is not enough", m[limit])
    return g.op("Softplus", m[x])


mish = Op("Mul", x, Op("Tanh", Op("Softplus", x)))


@rule(mish, opset=OPSETS)
def fuse_mish(m: Match, g: Builder) -> ir.Value | None:
    """`x * tanh(Softplus(x))` -> `Mish(x)`, where the target has a kernel for it.  Source: Mish-18."""
    return g.op("Mish", m[x]) if m.emits("Mish", dtype=m.dtype(x)) else None


slope = Var(const=True)
leaky = Op("Max", x, Op("Mul", x, slope))


@rule(leaky, opset=(8, 10_000))
def fuse_leaky_relu(m: Match, g: Builder) -> ir.Value | None:
    """`max(x, a x)` -> `LeakyRelu(x, alpha=a)`, 0 < a < 1 a number.  Source: LeakyRelu-6."""
    number = m.scalar(slope)
    if not 0 < number < 1 or not _is_single_float(m, x):
        return None
    _refuse_broader(m, leaky)
    return g.op("LeakyRelu", m[x], alpha=number)


parametric = Op("PRelu", x, slope)


@rule(parametric, opset=OPSETS)
def fuse_uniform_prelu(m: Match, g: Builder) -> ir.Value | None:
    """`PRelu(x, slope)` -> `LeakyRelu(x, alpha)`, where the slope is the same everywhere.

    ONNX Runtime fuses LeakyRelu into the convolution before it: 1.33x on a chain of three.
    Source: PRelu-7, LeakyRelu-6.
    """
    number = values.fill(m[slope])
    if number is None:
        raise Skip("the slopes differ", m[slope])
    return g.op("LeakyRelu", m[x], alpha=number) if _is_single_float(m, x) else None


expanded_swish = Op("Swish", x)


@rule(expanded_swish, opset=(24, 10_000))
def lower_swish(m: Match, g: Builder) -> ir.Value | None:
    """`Swish(x, alpha)` -> `QuickGelu(x, alpha)`, where the target would compute Swish in its parts.

    ONNX Runtime 1.31 has no kernel for Swish and expands it into 4 nodes.  Source: Swish-24, com.microsoft QuickGelu-1.
    """
    dtype = m.dtype(x)
    if m.emits("Swish", dtype=dtype) or not m.emits("QuickGelu", MS, dtype):
        return None
    alpha = float(m.attr(expanded_swish, "alpha", 1.0))
    return g.op("QuickGelu", m[x], domain=MS, alpha=alpha)


positive = Op("Relu", x, shared=True)
mirrored = Op("Relu", Op("Neg", x, shared=True))
minus_mirrored = Op("Sub", positive, Op("Mul", mirrored, slope))
plus_mirrored = Op("Add", positive, Op("Mul", mirrored, slope))
plus_negated = Op("Add", positive, Op("Neg", Op("Mul", mirrored, slope)))
below = Either(Op("Min", x, Lit(0.0)), Op("Sub", x, positive))
plus_below = Op("Add", positive, Op("Mul", below, slope))
doubled = Op("Sub", x, Op("Abs", x))
sloped = Op("Mul", doubled, slope)
plus_halved = Op(
    "Add",
    positive,
    Either(
        Op("Mul", sloped, half),
        Op("Mul", Op("Mul", doubled, half), slope),
        Op("Div", sloped, Lit(2.0)),
    ),
)


def _prelu(m: Match, g: Builder, root: Op, sign: float) -> ir.Value | None:
    if m.dtype(x) not in FLOATS:
        return None
    _refuse_broader(m, root)
    data, number = m.array(slope), values.fill(m[slope])
    if number is not None and _is_single_float(m, x):
        return g.op("LeakyRelu", m[x], alpha=sign * number)
    if "PRelu" in m.facts.target.shuns:
        raise Skip("the target runs PRelu slower than its parts", m[slope])
    return g.op("PRelu", m[x], g.const((sign * data).astype(data.dtype), name="slope"))


@rule(minus_mirrored, opset=OPSETS)
def fuse_prelu_of_difference(m: Match, g: Builder) -> ir.Value | None:
    """`relu(x) - a relu(-x)` -> `PRelu(x, a)`, a constant.  Source: PRelu-7; arXiv:1502.01852."""
    return _prelu(m, g, minus_mirrored, 1.0)


@rule(plus_mirrored, opset=OPSETS)
def fuse_prelu_of_sum(m: Match, g: Builder) -> ir.Value | None:
    """`relu(x) + a relu(-x)` -> `PRelu(x, -a)`, a constant: as Keras writes it.  Source: PRelu-7."""
    return _prelu(m, g, plus_mirrored, -1.0)


@rule(plus_negated, opset=OPSETS)
def fuse_prelu_of_negated_product(m: Match, g: Builder) -> ir.Value | None:
    """`relu(x) + -(a relu(-x))` -> `PRelu(x, a)`, a constant.  Source: PRelu-7."""
    return _prelu(m, g, plus_negated, 1.0)


@rule(plus_below, opset=OPSETS)
def fuse_prelu_of_minimum(m: Match, g: Builder) -> ir.Value | None:
    """`relu(x) + a min(x, 0)` -> `PRelu(x, a)`, a constant.  Source: PRelu-7."""
    return _prelu(m, g, plus_below, 1.0)


@rule(plus_halved, opset=OPSETS)
def fuse_prelu_of_magnitude(m: Match, g: Builder) -> ir.Value | None:
    """`relu(x) + a (x - |x|) / 2` -> `PRelu(x, a)`, a constant: as of TensorFlow.  Source: PRelu-7."""
    return _prelu(m, g, plus_halved, 1.0)


exponential = Op("Add", Op("Exp", Op("Neg", x)), one)
logistic = Op("Div", one, exponential)
inverse = Op("Reciprocal", exponential)
divided = Op("Div", u, exponential)


@rule(logistic, opset=OPSETS)
def fuse_sigmoid(m: Match, g: Builder) -> ir.Value | None:
    """`1 / (1 + exp(-x))` -> `Sigmoid(x)`.  Source: Sigmoid-6."""
    return _sigmoid(m, g, logistic)


@rule(inverse, opset=OPSETS)
def fuse_sigmoid_of_reciprocal(m: Match, g: Builder) -> ir.Value | None:
    """`Reciprocal(1 + exp(-x))` -> `Sigmoid(x)`.  Source: Sigmoid-6."""
    return _sigmoid(m, g, inverse)


@rule(divided, opset=OPSETS)
def fuse_sigmoid_of_quotient(m: Match, g: Builder) -> ir.Value | None:
    """`u / (1 + exp(-x))` -> `u * Sigmoid(x)`: with u = x, SiLU.  Source: Sigmoid-6."""
    made = _sigmoid(m, g, exponential)
    return None if made is None else g.op("Mul", m[u], made)


def _sigmoid(m: Match, g: Builder, root: Op) -> ir.Value | None:
    if m.dtype(x) not in FLOATS:
        return None
    _refuse_broader(m, root)
    return g.op("Sigmoid", m[x])


def _is_single_float(m: Match, value: Var) -> bool:
    """Whether float32 attributes hold factors of the value's type without loss."""
    return m.dtype(value) in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


RULES: tuple[Rule, ...] = (
    fuse_gelu_of_half_input,
    fuse_gelu_of_half_result,
    fuse_gelu_of_half_gate,
    fuse_gelu_of_shifted_gate,
    fuse_swish,
    lower_swish,
    fuse_scaled_clip_into_hard_sigmoid,
    fuse_clip_into_hard_sigmoid,
    fuse_hard_swish,
    fuse_divided_hard_swish,
    fuse_softplus,
    drop_limit_of_softplus,
    fuse_mish,
    fuse_leaky_relu,
    fuse_uniform_prelu,
    fuse_prelu_of_difference,
    fuse_prelu_of_sum,
    fuse_prelu_of_negated_product,
    fuse_prelu_of_minimum,
    fuse_prelu_of_magnitude,
    fuse_sigmoid,
    fuse_sigmoid_of_reciprocal,
    fuse_sigmoid_of_quotient,
)
