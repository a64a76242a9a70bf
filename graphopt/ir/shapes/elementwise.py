"""Shapes of operators that work element by element, with broadcasting where they have several inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import onnx_ir as ir

from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim, broadcast
from graphopt.ir.shapes.facts import Dims, Facts
from graphopt.ir.shapes.query import Query, Rules

_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Clip Cos Cosh CumProd CumSum Elu Erf Exp "
    "Floor Gelu HardSigmoid HardSwish Hardmax Identity LeakyRelu Log LogSoftmax LpNormalization LRN "
    "MeanVarianceNormalization Mish Neg Not PRelu Reciprocal Relu ReverseSequence Round Selu Shrink Sigmoid "
    "Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu"
)
_BINARY = "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Mod Mul Or Pow Sub Xor"
_COMPARISONS = "Equal Greater GreaterOrEqual Less LessOrEqual"
_VARIADIC = "Max Mean Min Sum"
_TESTS = "IsInf IsNaN"
_FLOAT = 1


def broadcast_dims(shapes: Sequence[Dims | None]) -> Dims | None:
    """The dimensions of tensors broadcast together, or None where a rank is not known."""
    result: Dims = ()
    for dims in shapes:
        if dims is None:
            return None
        result = dims if not result or dims == result else _broadcast_two(result, dims)
    return result


def _broadcast_two(a: Dims, b: Dims) -> Dims:
    """The dimensions of two tensors broadcast together."""
    pairs = zip_longest(reversed(a), reversed(b), fillvalue=Dim.of(1))
    return tuple(broadcast(x, y) for x, y in pairs)[::-1]


def _unary(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    return [Facts(given.type, given.dims)]


def _binary(q: Query) -> Sequence[Facts]:
    left = q.facts(0)
    if q.version < 7:  # the second operand broadcasts to the first, along `axis`
        return [Facts(left.type, left.dims)]
    dtype = q.dtype(1) if left.type is None else left.dtype
    return [facts.tensor(dtype, broadcast_dims((left.dims, q.dims(1))))]


def _pow(q: Query) -> Sequence[Facts]:
    dims = q.dims(0) if q.version < 7 else broadcast_dims((q.dims(0), q.dims(1)))
    return [facts.tensor(q.dtype(0), dims)]


def _comparison(q: Query) -> Sequence[Facts]:
    dims = q.dims(0) if q.version < 7 else broadcast_dims((q.dims(0), q.dims(1)))
    return [facts.tensor(ir.DataType.BOOL, dims)]


def _variadic(q: Query) -> Sequence[Facts]:
    dims = broadcast_dims([q.dims(i) for i in range(len(q.inputs))])
    return [facts.tensor(q.dtype(0), dims)]


def _where(q: Query) -> Sequence[Facts]:
    dims = broadcast_dims((q.dims(0), q.dims(1), q.dims(2)))
    return [facts.tensor(q.dtype(2) if q.dtype(1) is None else q.dtype(1), dims)]


def _test(q: Query) -> Sequence[Facts]:
    return [q.same(0, ir.DataType.BOOL)]


def _cast(q: Query) -> Sequence[Facts] | None:
    to = q.attr("to", 0)
    if not to:
        return None
    return [facts.tensor(ir.DataType(to), q.dims(0))]


def _cast_like(q: Query) -> Sequence[Facts]:
    return [facts.tensor(q.dtype(1), q.dims(0))]


def _dropout(q: Query) -> Sequence[Facts] | None:
    if len(q.node.outputs) > 1 and q.version < 10:
        return None
    return [q.same(0), q.same(0, ir.DataType.BOOL)]


def _like(q: Query) -> Sequence[Facts]:
    """EyeLike, RandomNormalLike, RandomUniformLike, Bernoulli: the shape of the input, a type of choice."""
    dtype = q.attr("dtype", 0)
    return [q.same(0, ir.DataType(dtype) if dtype else None)]


def _random(q: Query) -> Sequence[Facts]:
    shape: tuple[int, ...] = q.attr("shape", ())
    return [facts.tensor(ir.DataType(q.attr("dtype", _FLOAT)), shape)]


RULES: Rules = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BINARY.split(), _binary),
    **dict.fromkeys(_COMPARISONS.split(), _comparison),
    **dict.fromkeys(_VARIADIC.split(), _variadic),
    **dict.fromkeys(_TESTS.split(), _test),
    "Pow": _pow,
    "Where": _where,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Dropout": _dropout,
    "EyeLike": _like,
    "RandomNormalLike": _like,
    "RandomUniformLike": _like,
    "Bernoulli": _like,
    "RandomNormal": _random,
    "RandomUniform": _random,
}
