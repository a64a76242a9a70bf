"""Convolutions, matrix products, pools, norms and attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from graphopt.distill.operators.call import Call, Operator, Tensor

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVG_POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _pads(
    call: Call, spatial: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[int]:
    """Pads in ONNX order: all beginnings, then all ends."""
    mode = call.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [0] * (2 * len(spatial))
    if mode == "NOTSET":
        return list(call.get("pads", [0] * (2 * len(spatial))))
    dilations = call.get("dilations", [1] * len(spatial))
    before, after = [], []
    for size, k, s, d in zip(spatial, kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(less if mode == "SAME_UPPER" else more)
        after.append(more if mode == "SAME_UPPER" else less)
    return before + after


def padded(x: Tensor, pads: Sequence[int], value: float) -> tuple[Tensor, list[int]]:
    """The input padded where torch cannot pad by itself, and the symmetric pads that are left for torch."""
    rank = len(pads) // 2
    if list(pads[:rank]) == list(pads[rank:]) and value == 0.0:
        return x, list(pads[:rank])
    if not any(pads):
        return x, [0] * rank
    flat = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    return functional.pad(x, flat, value=value), [0] * rank


def conv(call: Call) -> Tensor:
    """Conv, any rank, also with uneven pads."""
    weight = call.inputs[1]
    assert weight is not None
    rank = weight.dim() - 2
    strides = call.get("strides", [1] * rank)
    pads = _pads(call, call.x.shape[2:], weight.shape[2:], strides)
    x, even = padded(call.x, pads, 0.0)
    dilations, group = call.get("dilations", [1] * rank), call.get("group", 1)
    return _CONV[rank](x, weight, call.at(2), strides, even, dilations, group)


_AFTER = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def _fused_conv(call: Call) -> Tensor:
    """FusedConv of com.microsoft: a convolution, a sum, an activation."""
    kind, bounds = call.get("activation", ""), call.get("activation_params", [])
    made = conv(call)
    made = made if call.at(3) is None else made + call.inputs[3]
    if kind in _AFTER:
        return _AFTER[kind](made)
    if kind == "LeakyRelu":
        return functional.leaky_relu(made, *bounds)
    if kind == "Clip":
        return made.clamp(*bounds)
    if kind:
        raise NotImplementedError(f"activation {kind}")
    return made


def _conv_transpose(call: Call) -> Tensor:
    weight = call.inputs[1]
    assert weight is not None
    rank = weight.dim() - 2
    if call.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in call.attributes:
        raise NotImplementedError("auto_pad and output_shape")
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    pads, more = call.get("pads", [0] * (2 * rank)), call.get("output_padding", [0] * rank)
    full = _CONV_TRANSPOSE[rank](
        call.x, weight, call.at(2), strides, 0, more, call.get("group", 1), dilations
    )
    for axis in range(rank):
        length = full.shape[axis + 2] - pads[axis] - pads[axis + rank]
        full = full.narrow(axis + 2, pads[axis], length)
    return full


def _gemm(call: Call) -> Tensor:
    a, b = call.inputs[0], call.inputs[1]
    assert a is not None
    assert b is not None
    product = (a.T if call.get("transA", 0) else a) @ (b.T if call.get("transB", 0) else b)
    product = call.get("alpha", 1.0) * product
    return product if call.at(2) is None else product + call.get("beta", 1.0) * call.inputs[2]


def _fused_matmul(call: Call) -> Tensor:
    if call.get("transBatchA", 0) or call.get("transBatchB", 0):
        raise NotImplementedError("transBatch")
    a, b = call.inputs[0], call.inputs[1]
    assert a is not None
    assert b is not None
    a = a.transpose(-1, -2) if call.get("transA", 0) else a
    b = b.transpose(-1, -2) if call.get("transB", 0) else b
    return call.get("alpha", 1.0) * (a @ b)


def _pool_end(call: Call, x: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Pads, with what `ceil_mode` adds at the ends."""
    pads = _pads(call, x.shape[2:], kernel, strides)
    rank = len(kernel)
    if call.get("ceil_mode", 0):
        for axis in range(rank):
            extent = x.shape[axis + 2] + pads[axis] + pads[axis + rank]
            over = (extent - kernel[axis]) % strides[axis]
            start = extent - over + strides[axis] - kernel[axis]
            if over and start < x.shape[axis + 2] + pads[axis]:
                pads[axis + rank] += strides[axis] - over
    return pads


def _max_pool(call: Call) -> Tensor:
    if call.outputs > 1:
        raise NotImplementedError("indices")
    kernel = call.attributes["kernel_shape"]
    strides = call.get("strides", [1] * len(kernel))
    pads = _pool_end(call, call.x, kernel, strides)
    x, even = padded(call.x, pads, -math.inf) if any(pads) else (call.x, [0] * len(kernel))
    return _MAX_POOL[len(kernel)](
        x, kernel, strides, even, call.get("dilations", [1] * len(kernel))
    )


def _average_pool(call: Call) -> Tensor:
    kernel = call.attributes["kernel_shape"]
    if any(d != 1 for d in call.get("dilations", [])) or call.get("ceil_mode", 0):
        raise NotImplementedError("dilations and ceil_mode")
    strides = call.get("strides", [1] * len(kernel))
    pads = _pads(call, call.x.shape[2:], kernel, strides)
    run = _AVG_POOL[len(kernel)]
    flat = [
        side
        for axis in reversed(range(len(kernel)))
        for side in (pads[axis], pads[axis + len(kernel)])
    ]
    pooled = run(functional.pad(call.x, flat), kernel, strides)
    if call.get("count_include_pad", 0) or not any(pads):
        return pooled
    inside = functional.pad(torch.ones_like(call.x[:1, :1]), flat)
    return pooled / run(inside, kernel, strides)


def _spatial(call: Call) -> tuple[int, ...]:
    return tuple(range(2, call.x.dim()))


def _by_channel(vector: Tensor, rank: int) -> Tensor:
    return vector.reshape(1, -1, *[1] * (rank - 2))


def _batch_norm(call: Call) -> Tensor:
    if call.get("training_mode", 0):
        raise NotImplementedError("training_mode")
    _, scale, bias, mean, variance = call.inputs[:5]
    return functional.batch_norm(
        call.x, mean, variance, scale, bias, False, 0.0, call.get("epsilon", 1e-5)
    )


def _instance_norm(call: Call) -> Tensor:
    return functional.instance_norm(
        call.x, weight=call.inputs[1], bias=call.inputs[2], eps=call.get("epsilon", 1e-5)
    )


def _group_norm(call: Call) -> Tensor:
    groups = call.attributes["num_groups"]
    plain = functional.group_norm(call.x, groups, eps=call.get("epsilon", 1e-5))
    scale, bias = call.inputs[1], call.inputs[2]
    assert scale is not None
    assert bias is not None
    if scale.numel() == groups != call.x.shape[1]:  # opset 18: one number a group
        scale, bias = (each.repeat_interleave(call.x.shape[1] // groups) for each in (scale, bias))
    return plain * _by_channel(scale, call.x.dim()) + _by_channel(bias, call.x.dim())


def normalized(x: Tensor, axis: int, epsilon: float, *, center: bool = True) -> Tensor:
    """An input over the root of its mean square from `axis` on, about the mean where `center`."""
    axes = tuple(range(axis % x.dim(), x.dim()))
    shifted = x - x.mean(axes, keepdim=True) if center else x
    return shifted * torch.rsqrt(shifted.square().mean(axes, keepdim=True) + epsilon)


def _layer_norm(call: Call) -> Tensor:
    made = normalized(call.x, call.get("axis", -1), call.get("epsilon", 1e-5))
    made = made * call.inputs[1]
    return made if call.at(2) is None else made + call.inputs[2]


def _rms_norm(call: Call) -> Tensor:
    made = normalized(call.x, call.get("axis", -1), call.get("epsilon", 1e-5), center=False)
    return made * call.inputs[1]


def _skip_norm(call: Call, *, center: bool) -> tuple[Tensor | None, ...]:
    """SkipLayerNormalization: inputs x, skip, gamma, [beta,] bias; the fourth output is the sum."""
    total = call.x + call.inputs[1]
    bias = call.at(4 if center else 3)
    total = total if bias is None else total + bias
    made = normalized(total, -1, call.get("epsilon", 1e-12), center=center) * call.inputs[2]
    beta = call.at(3) if center else None
    return (made if beta is None else made + beta, None, None, total)


def _lrn(call: Call) -> Tensor:
    size = call.attributes["size"]
    squares = functional.pad(call.x.square(), (0, 0, 0, 0, (size - 1) // 2, size // 2))
    around = squares.unfold(1, size, 1).sum(-1)
    scale = call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * around
    return call.x / scale.pow(call.get("beta", 0.75))


def _einsum(call: Call) -> Tensor:
    return torch.einsum(call.attributes["equation"].replace(" ", ""), *call.inputs)


OPERATORS: Mapping[str, Operator] = {
    "Conv": conv,
    "FusedConv": _fused_conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": lambda call: torch.matmul(call.inputs[0], call.inputs[1]),
    "FusedMatMul": _fused_matmul,
    "Einsum": _einsum,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda call: call.x.mean(_spatial(call), keepdim=True),
    "GlobalMaxPool": lambda call: call.x.amax(_spatial(call), keepdim=True),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": lambda call: _skip_norm(call, center=True),
    "SkipSimplifiedLayerNormalization": lambda call: _skip_norm(call, center=False),
    "LRN": _lrn,
}
