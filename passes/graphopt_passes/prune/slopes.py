"""Rules for gradients: arithmetic, products, norms, attention, and what only moves values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from graphopt_passes.prune.gradients import Call, Grads, Rule, reduced
from graphopt_passes.prune.layers import Array
from graphopt_passes.prune.slopes_windows import WINDOWS

_TWO_OVER_ROOT_PI = 2 / math.sqrt(math.pi)
_DENSITY = 1 / math.sqrt(2 * math.pi)
_TINY = 1e-3
_LEAST = 1e-30


def _add(call: Call) -> Grads:
    return [None if a is None else reduced(call.grad, a.shape) for a in call.inputs]


def _sub(call: Call) -> Grads:
    return [reduced(call.grad, call.read(0).shape), reduced(-call.grad, call.read(1).shape)]


def _mul(call: Call) -> Grads:
    a, b = call.read(0), call.read(1)
    return [reduced(call.grad * b, a.shape), reduced(call.grad * a, b.shape)]


def _div(call: Call) -> Grads:
    a, b = call.read(0), call.read(1)
    over = call.grad / b
    return [reduced(over, a.shape), reduced(-over * call.made, b.shape)]


def _where(call: Call) -> Grads:
    chosen, a, b = (call.read(i) for i in range(3))
    zero = np.zeros((), call.grad.dtype)
    yes, no = np.where(chosen, call.grad, zero), np.where(chosen, zero, call.grad)
    return [None, reduced(yes, a.shape), reduced(no, b.shape)]


def _matmul(call: Call) -> Grads:
    a, b, grad = call.read(0), call.read(1), call.grad
    if b.ndim == 2 and a.ndim >= 2:
        flat = grad.reshape(-1, grad.shape[-1])
        return [(flat @ b.T).reshape(a.shape), a.reshape(-1, a.shape[-1]).T @ flat]
    row, column = a.ndim == 1, b.ndim == 1
    left, right = a[None] if row else a, b[:, None] if column else b
    grad = np.expand_dims(grad, -1) if column else grad
    grad = np.expand_dims(grad, -2) if row else grad
    one = reduced(grad @ np.swapaxes(right, -1, -2), left.shape)
    other = reduced(np.swapaxes(left, -1, -2) @ grad, right.shape)
    return [one.reshape(a.shape), other.reshape(b.shape)]


def _gemm(call: Call) -> Grads:
    a, b = call.read(0), call.read(1)
    grad = call.grad * call.attribute("alpha", 1.0)
    turned_a, turned_b = call.attribute("transA", 0), call.attribute("transB", 0)
    one = grad @ (b if turned_b else b.T)
    other = (a if turned_a else a.T) @ grad
    found: Grads = [one.T if turned_a else one, other.T if turned_b else other]
    if call.has(2):
        found.append(reduced(call.grad * call.attribute("beta", 1.0), call.read(2).shape))
    return found + [None] * (len(call.inputs) - len(found))


def _unary(slope: Callable[[Call], Array]) -> Rule:
    """The rule of an elementwise operator of one moving input, of its slope at what it reads."""
    return lambda call: call.first(np.asarray(call.grad * slope(call), call.grad.dtype))


def _clip(call: Call) -> Array:
    return np.asarray(call.read(0) == call.made)


def _leaky(call: Call) -> Array:
    return np.where(call.read(0) >= 0, 1.0, call.attribute("alpha", 0.01))


def _elu(call: Call) -> Array:
    return np.where(call.read(0) >= 0, 1.0, call.made + call.attribute("alpha", 1.0))


def _hard_sigmoid(call: Call) -> Array:
    inside = (call.made > 0) & (call.made < 1)
    return np.where(inside, call.attribute("alpha", 0.2), 0.0)


def _hard_swish(call: Call) -> Array:
    x = call.read(0)
    return np.where(x > -3, np.where(x < 3, x / 3 + 0.5, 1.0), 0.0)


def _gelu(call: Call) -> Array:
    """F(x) + x f(x): F from what was made, f the density; of the tanh form by its own formula."""
    x = call.read(0)
    if call.attribute("approximate", "none") == "tanh":
        return _tanh_gelu(x)
    near = np.abs(x) < _TINY
    share = np.where(near, 0.5 + x * _DENSITY, call.made / np.where(near, 1, x))
    return np.asarray(share + x * np.exp(-0.5 * x * x) * _DENSITY)


def _tanh_gelu(x: Array) -> Array:
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(k * (x + c * x**3))
    return np.asarray(0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * c * x * x))


def _quick_gelu(call: Call) -> Array:
    x, alpha = call.read(0), call.attribute("alpha", 1.702)
    gate = 1 / (1 + np.exp(-alpha * x))
    return np.asarray(gate * (1 + alpha * x * (1 - gate)))


def _pow(call: Call) -> Grads:
    x, power = call.read(0), call.read(1).astype(call.grad.dtype)
    return call.first(reduced(call.grad * power * np.power(x, power - 1), x.shape))


def _softmax_slope(y: Array, grad: Array, axis: int) -> Array:
    return np.asarray(y * (grad - (grad * y).sum(axis, keepdims=True)))


def _softmax(call: Call) -> Grads:
    return [_softmax_slope(call.made, call.grad, call.attribute("axis", -1))]


def _log_softmax(call: Call) -> Grads:
    axis = call.attribute("axis", -1)
    return [call.grad - np.exp(call.made) * call.grad.sum(axis, keepdims=True)]


def _layer_norm(call: Call) -> Grads:
    x, scale = call.read(0), call.read(1)
    axes = tuple(range(call.attribute("axis", -1) % x.ndim, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    root = 1 / np.sqrt(
        np.square(centred).mean(axes, keepdims=True) + call.attribute("epsilon", 1e-5)
    )
    normal, inner = centred * root, call.grad * scale
    mean = inner.mean(axes, keepdims=True)
    found: Grads = [root * (inner - mean - normal * (inner * normal).mean(axes, keepdims=True))]
    found.append(reduced(call.grad * normal, scale.shape))
    if call.has(2):
        found.append(reduced(call.grad, call.read(2).shape))
    return found + [None] * (len(call.inputs) - len(found))


def _rms_norm(call: Call) -> Grads:
    x, scale = call.read(0), call.read(1)
    axes = tuple(range(call.attribute("axis", -1) % x.ndim, x.ndim))
    root = 1 / np.sqrt(np.square(x).mean(axes, keepdims=True) + call.attribute("epsilon", 1e-5))
    normal, inner = x * root, call.grad * scale
    found = root * (inner - normal * (inner * normal).mean(axes, keepdims=True))
    return [found, reduced(call.grad * normal, scale.shape)]


def _batch_norm(call: Call) -> Grads:
    x = call.read(0)
    along = (1, -1, *[1] * (x.ndim - 2))
    scale, mean, variance = (call.read(i).reshape(along) for i in (1, 3, 4))
    root = 1 / np.sqrt(variance + call.attribute("epsilon", 1e-5))
    axes = (0, *range(2, x.ndim))
    by_scale = (call.grad * (x - mean) * root).sum(axes)
    return [call.grad * scale * root, by_scale, call.grad.sum(axes), None, None]


def _attention(call: Call) -> Grads:
    """Q, K and V as three or four axes, heads shared or not; masks, and what they hide, get no gradient."""
    shapes = [call.read(i).shape for i in range(3)]
    counts = [call.attribute(name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    q, k, v = (_heads(call.read(i), counts[i]) for i in range(3))
    groups = q.shape[1] // k.shape[1]
    many_k, many_v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scale = call.attribute("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    share = _shares(call, scale * (q @ np.swapaxes(many_k, -1, -2)))
    grad = _heads(call.grad, counts[0])
    by_v = np.swapaxes(share, -1, -2) @ grad
    by_score = scale * _softmax_slope(share, grad @ np.swapaxes(many_v, -1, -2), -1)
    by_k = np.swapaxes(by_score, -1, -2) @ q
    one, other = (
        a.reshape(a.shape[0], -1, groups, *a.shape[2:]).sum(2, dtype=a.dtype) for a in (by_k, by_v)
    )
    parts = (by_score @ many_k, one, other)
    found: Grads = [_joined(a, shape) for a, shape in zip(parts, shapes, strict=True)]
    return found + [None] * (len(call.inputs) - 3)


def _shares(call: Call, score: Array) -> Array:
    if call.has(3):
        mask = call.read(3)
        score = np.where(mask, score, -np.inf) if mask.dtype == bool else score + mask
    if call.attribute("is_causal", 0):
        seen = np.tri(*score.shape[-2:]) > 0
        score = np.where(seen, score, np.asarray(-np.inf, score.dtype))
    made = np.exp(score - score.max(-1, keepdims=True))
    return np.asarray(made / made.sum(-1, keepdims=True))


def _heads(array: Array, count: int) -> Array:
    if array.ndim == 4:
        return array
    return np.swapaxes(array.reshape(*array.shape[:2], count, -1), 1, 2)


def _joined(array: Array, shape: tuple[int, ...]) -> Array:
    return array if len(shape) == 4 else np.swapaxes(array, 1, 2).reshape(shape)


def _again(call: Call) -> Grads:
    """Of what keeps all values in their order."""
    x = call.read(0)
    return call.first(call.grad.reshape(x.shape).astype(x.dtype, copy=False))


def _transpose(call: Call) -> Grads:
    order = call.attribute("perm", None) or tuple(reversed(range(call.grad.ndim)))
    return [np.transpose(call.grad, np.argsort(order))]


def _expand(call: Call) -> Grads:
    return call.first(reduced(call.grad, call.read(0).shape))


def _concat(call: Call) -> Grads:
    axis = call.attribute("axis", 0)
    ends = np.cumsum([0 if a is None else a.shape[axis] for a in call.inputs])
    return [*np.split(call.grad, ends[:-1], axis=axis)]


def _split(call: Call) -> Grads:
    axis = call.attribute("axis", 0)
    parts = []
    for made, grad in zip(call.outputs, call.grads, strict=True):
        assert made is not None
        parts.append(np.zeros_like(made) if grad is None else grad)
    return call.first(np.concatenate(parts, axis=axis))


def _gather(call: Call) -> Grads:
    x, indices = call.read(0), call.read(1)
    axis = call.attribute("axis", 0) % x.ndim
    found = np.zeros_like(x)
    rows = np.moveaxis(
        call.grad, tuple(range(axis, axis + indices.ndim)), tuple(range(indices.ndim))
    )
    np.add.at(np.moveaxis(found, axis, 0), indices, rows)
    return call.first(found)


def _slice(call: Call) -> Grads:
    x = call.read(0)
    starts, ends = call.read(1), call.read(2)
    axes = call.read(3) if call.has(3) else np.arange(len(starts))
    steps = call.read(4) if call.has(4) else np.ones(len(starts), np.int64)
    where = [np.arange(n) for n in x.shape]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        low = -size - 1 if step < 0 else -size
        stop = None if end < low or (step < 0 and end == low) else int(end)
        where[axis] = np.arange(size)[int(start) : stop : int(step)]
    found = np.zeros_like(x)
    found[np.ix_(*where)] = call.grad
    return call.first(found)


def _pad(call: Call) -> Grads:
    """Of what lies around, where that repeats values, back to where they came from; what was cut off gets nothing."""
    x, rank = call.read(0), call.read(0).ndim
    pads = call.read(1) if call.has(1) else np.asarray(call.attribute("pads", ()))
    axes = call.read(3) if call.has(3) else np.arange(rank)
    mode = call.attribute("mode", "constant")
    found = call.grad
    for axis, begin, end in zip(axes, *np.split(pads, 2), strict=True):
        size = x.shape[axis]
        around = (max(int(begin), 0), max(int(end), 0))
        kept = np.arange(size)[max(-int(begin), 0) : size - max(-int(end), 0)]
        moved = np.moveaxis(found, axis, 0)
        spread = np.zeros((size, *moved.shape[1:]), moved.dtype)
        if mode == "constant":
            spread[kept] = moved[around[0] : around[0] + len(kept)]
        else:
            np.add.at(spread, np.pad(kept, around, mode=mode), moved)
        found = np.moveaxis(spread, 0, axis)
    return call.first(found)


def _mean(call: Call) -> Grads:
    x = call.read(0)
    return call.first(_spread(call, x) * np.asarray(call.made.size / max(x.size, 1), x.dtype))


def _total(call: Call) -> Grads:
    return call.first(_spread(call, call.read(0)))


def _spread(call: Call, x: Array) -> Array:
    """The gradient of a reduction, in all places of what was reduced."""
    axes = call.read(1).tolist() if call.has(1) else call.attribute("axes", None)
    if not axes:
        axes = () if call.attribute("noop_with_empty_axes", 0) else range(x.ndim)
    gone = {axis % x.ndim for axis in axes}
    shape = [1 if i in gone else n for i, n in enumerate(x.shape)]
    return np.broadcast_to(call.grad.reshape(shape), x.shape)


RULES: Mapping[str, Rule] = {
    **WINDOWS,
    "Add": _add,
    "Sum": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Where": _where,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Pow": _pow,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "BatchNormalization": _batch_norm,
    "Attention": _attention,
    "Reshape": _again,
    "Flatten": _again,
    "Squeeze": _again,
    "Unsqueeze": _again,
    "Identity": _again,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "Gather": _gather,
    "Slice": _slice,
    "Pad": _pad,
    "ReduceMean": _mean,
    "ReduceSum": _total,
    "Relu": _unary(lambda call: np.asarray(call.made > 0)),
    "Clip": _unary(_clip),
    "LeakyRelu": _unary(_leaky),
    "Elu": _unary(_elu),
    "Sigmoid": _unary(lambda call: call.made * (1 - call.made)),
    "HardSigmoid": _unary(_hard_sigmoid),
    "HardSwish": _unary(_hard_swish),
    "Tanh": _unary(lambda call: 1 - call.made**2),
    "Softplus": _unary(lambda call: 1 - np.exp(-call.made)),
    "Gelu": _unary(_gelu),
    "com.microsoft:QuickGelu": _unary(_quick_gelu),
    "Erf": _unary(lambda call: np.exp(-(call.read(0) ** 2)) * _TWO_OVER_ROOT_PI),
    "Exp": _unary(lambda call: call.made),
    "Log": _unary(lambda call: 1 / call.read(0)),
    "Sqrt": _unary(lambda call: 0.5 / np.maximum(call.made, _LEAST)),
    "Reciprocal": _unary(lambda call: -(call.made**2)),
    "Neg": _unary(lambda call: -np.ones_like(call.made)),
    "Abs": _unary(lambda call: np.sign(call.read(0))),
}
"""By operator.  Attention is ai.onnx's without a cache; Softmax acts along one axis."""
