"""QuantizeLinear and DequantizeLinear, with gradients that go straight through the rounding."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphopt.distill.operators.call import Call, Operator, Tensor

_RANGES = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.int32: (-(2**31), 2**31 - 1),
}


def along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """A scale or zero point in the shape in which it meets `x`.

    Raises:
        NotImplementedError: one number a block.
    """
    if parameter.dim() == 0 or parameter.numel() == 1:
        return parameter.reshape(())
    if parameter.dim() != 1:
        raise NotImplementedError("blocks of one scale each")
    return parameter.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def straight_through(rounded: Tensor, exact: Tensor) -> Tensor:
    """The rounded numbers, with the gradient of the exact ones (Bengio et al. 2013)."""
    return exact + (rounded - exact).detach()


def quantize(call: Call) -> Tensor:
    """The whole numbers as floats: as integers they would carry no gradient."""
    scale, zero = call.inputs[1], call.at(2)
    dtype = torch.uint8 if zero is None else zero.dtype
    low, high = _RANGES[dtype]
    axis = call.get("axis", 1)
    exact = call.x / along(scale, call.x, axis)
    offset = 0.0 if zero is None else along(zero, call.x, axis).to(exact.dtype)
    within = torch.clamp(exact, low - offset, high - offset)
    return straight_through(torch.round(within), within) + offset


def dequantize(call: Call) -> Tensor:
    """(x - zero point) * scale."""
    scale, zero = call.inputs[1], call.at(2)
    assert scale is not None
    axis = call.get("axis", 1)
    x = call.x.to(scale.dtype)
    offset = 0.0 if zero is None else along(zero, x, axis).to(scale.dtype)
    return (x - offset) * along(scale, x, axis)


OPERATORS: Mapping[str, Operator] = {"QuantizeLinear": quantize, "DequantizeLinear": dequantize}
