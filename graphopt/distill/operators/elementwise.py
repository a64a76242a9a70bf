"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.nn import functional

from graphopt.distill.operators.call import Call, Operator, Tensor

# ONNX's numbers of element types.
_DTYPES: Mapping[int, Any] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def dtype_of(number: int) -> Any:  # noqa: ANN401  torch.dtype
    """The torch dtype of an ONNX element type.

    Raises:
        NotImplementedError: torch has none.
    """
    if number not in _DTYPES:
        raise NotImplementedError(f"element type {number}")
    return _DTYPES[number]


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor of its own memory.

    Raises:
        NotImplementedError: torch has no such element type.
    """
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.astype(np.float32)).bfloat16()
    if array.dtype.kind not in "fiub" or array.dtype.name in ("uint16", "uint32", "uint64"):
        raise NotImplementedError(f"element type {array.dtype}")
    return torch.tensor(np.array(array))


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call.x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call: function(call.inputs[0], call.inputs[1])


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call: reduce(function, call.inputs)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(call: Call) -> Tensor:
    a, b = call.inputs
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _clip(call: Call) -> Tensor:
    low = call.at(1) if call.opset >= 11 else call.get("min")
    high = call.at(2) if call.opset >= 11 else call.get("max")
    x = call.x
    if low is not None:
        x = torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))


def _gelu(call: Call) -> Tensor:
    return functional.gelu(call.x, approximate=call.get("approximate", "none"))


def _fast_gelu(call: Call) -> Tensor:
    bias = call.at(1)
    return functional.gelu(call.x if bias is None else call.x + bias, approximate="tanh")


def _quick_gelu(call: Call) -> Tensor:
    return call.x * torch.sigmoid(call.get("alpha", 1.702) * call.x)


def _swish(call: Call) -> Tensor:
    return call.x * torch.sigmoid(call.get("alpha", 1.0) * call.x)


def _prelu(call: Call) -> Tensor:
    return torch.where(call.x < 0, call.x * call.inputs[1], call.x)


def _hard_sigmoid(call: Call) -> Tensor:
    return torch.clamp(call.get("alpha", 0.2) * call.x + call.get("beta", 0.5), 0, 1)


def _cast(call: Call) -> Tensor:
    return _cast_to(call.x, dtype_of(call.attributes["to"]))


def _cast_to(x: Tensor, wanted: Any) -> Tensor:  # noqa: ANN401  torch.dtype
    if x.is_floating_point() and not wanted.is_floating_point and wanted != torch.bool:
        return torch.trunc(x).to(wanted)
    return x.to(wanted)


def _cast_like(call: Call) -> Tensor:
    like = call.inputs[1]
    assert like is not None
    return _cast_to(call.x, like.dtype)


def _mean(call: Call) -> Tensor:
    total: Tensor = reduce(torch.add, call.inputs)
    return total / len(call.inputs)


def _selu(call: Call) -> Tensor:
    alpha, gamma = call.get("alpha", 1.6732632), call.get("gamma", 1.0507010)
    return gamma * torch.where(call.x > 0, call.x, alpha * torch.expm1(torch.clamp(call.x, max=0)))


def _is_inf(call: Call) -> Tensor:
    positive = torch.isposinf(call.x) & bool(call.get("detect_positive", 1))
    return positive | (torch.isneginf(call.x) & bool(call.get("detect_negative", 1)))


OPERATORS: Mapping[str, Operator] = {
    **{
        name: _unary(function)
        for name, function in {
            "Abs": torch.abs,
            "Acos": torch.acos,
            "Acosh": torch.acosh,
            "Asin": torch.asin,
            "Asinh": torch.asinh,
            "Atan": torch.atan,
            "Atanh": torch.atanh,
            "Ceil": torch.ceil,
            "Cos": torch.cos,
            "Cosh": torch.cosh,
            "Erf": torch.erf,
            "Exp": torch.exp,
            "Floor": torch.floor,
            "Identity": lambda x: x,
            "Dropout": lambda x: x,
            "IsNaN": torch.isnan,
            "Log": torch.log,
            "Mish": functional.mish,
            "Neg": torch.neg,
            "Not": torch.logical_not,
            "Reciprocal": torch.reciprocal,
            "Relu": torch.relu,
            "Round": torch.round,
            "Sigmoid": torch.sigmoid,
            "Sign": torch.sign,
            "Sin": torch.sin,
            "Sinh": torch.sinh,
            "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
            "Softsign": functional.softsign,
            "Sqrt": torch.sqrt,
            "Tan": torch.tan,
            "Tanh": torch.tanh,
            "HardSwish": functional.hardswish,
        }.items()
    },
    **{
        name: _binary(function)
        for name, function in {
            "Add": torch.add,
            "And": torch.logical_and,
            "BiasGelu": lambda x, bias: functional.gelu(x + bias),
            "Div": _div,
            "Equal": torch.eq,
            "Greater": torch.gt,
            "GreaterOrEqual": torch.ge,
            "Less": torch.lt,
            "LessOrEqual": torch.le,
            "Mul": torch.mul,
            "Or": torch.logical_or,
            "Pow": _pow,
            "Sub": torch.sub,
            "Xor": torch.logical_xor,
        }.items()
    },
    "Sum": _many(torch.add),
    "Max": _many(torch.maximum),
    "Min": _many(torch.minimum),
    "Mean": _mean,
    "Mod": _mod,
    "Where": lambda call: torch.where(*call.inputs),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "PRelu": _prelu,
    "Gelu": _gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "Swish": _swish,
    "HardSigmoid": _hard_sigmoid,
    "IsInf": _is_inf,
    "LeakyRelu": lambda call: functional.leaky_relu(call.x, call.get("alpha", 0.01)),
    "Elu": lambda call: functional.elu(call.x, call.get("alpha", 1.0)),
    "Celu": lambda call: functional.celu(call.x, call.get("alpha", 1.0)),
    "Selu": _selu,
    "ThresholdedRelu": lambda call: torch.where(
        call.x > call.get("alpha", 1.0), call.x, torch.zeros_like(call.x)
    ),
}
