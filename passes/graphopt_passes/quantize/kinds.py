"""Element types of activations and weights, and what each of them needs of graph and runtime.

Source: ai.onnx QuantizeLinear (8-bit floats since 19, 16 and 4 bits since 21); com.microsoft QuantizeLinear, which has
integers of 16 and 4 bits below that; each tried on ONNX Runtime 1.31.1.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.targets import Target
from graphopt_passes.quantize.styles import MICROSOFT, Style

_FLOATS = {
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float8e5m2": ir.DataType.FLOAT8E5M2,
}
ACTIVATIONS = {
    **{
        kind.name.lower(): kind
        for kind in (
            ir.DataType.UINT8,
            ir.DataType.INT8,
            ir.DataType.UINT16,
            ir.DataType.INT16,
            ir.DataType.UINT4,
            ir.DataType.INT4,
        )
    },
    **_FLOATS,
}
WEIGHTS = {
    "int8": ir.DataType.INT8,
    **ACTIVATIONS,
}
"""Types by the names that recipes give them."""

SCHEMES = {"symmetric": True, "asymmetric": False}
"""Whether a type is used without zero point, by the names that recipes give it."""

BYTES = frozenset({ir.DataType.UINT8, ir.DataType.INT8})
"""What integer kernels multiply."""


INTEGERS = frozenset(kind for kind in ACTIVATIONS.values() if kind.is_integer())


def with_kinds(
    style: Style,
    activations: str,
    weights: str,
    target: Target,
    schemes: tuple[str, str] = ("", ""),
) -> Style:
    """The style with other element types and schemes, where a recipe states them.

    Raises:
        OptionError: there is no such type or scheme, or the parser of the target takes none of it.
    """
    style = _with_schemes(style, schemes, target)
    kinds = (
        named(activations, ACTIVATIONS, "activations") if activations else style.activation,
        named(weights, WEIGHTS, "weights") if weights else style.weight,
    )
    if not style.zero_points and kinds not in _PARSED:
        raise OptionError(
            f"activations of {_name(kinds[0])} with weights of {_name(kinds[1])}: the parser of '{target.name}' takes "
            "products of int8 with int8 and of float8e4m3fn with float8e4m3fn; write both as one of these (or "
            "--precision fp8)"
        )
    if kinds == (style.activation, style.weight):
        check_weight(style, style.weight, style.symmetric_weights, "all layers")
        return style
    least = max([style.least_opset, *(_SINCE.get(kind, 0) for kind in kinds)])
    is_bytes = kinds[0] in BYTES and kinds[1] in BYTES
    changed = dataclasses.replace(
        style,
        activation=kinds[0],
        weight=kinds[1],
        saturates=style.saturates and is_bytes,
        integer_bias=style.integer_bias and is_bytes,
        least_opset=least,
    )
    check_weight(changed, kinds[1], changed.symmetric_weights, "all layers")
    return changed


def _with_schemes(style: Style, schemes: tuple[str, str], target: Target) -> Style:
    """The style with or without zero points of activations and of weights."""
    for given in filter(None, schemes):
        if given not in SCHEMES:
            raise OptionError(
                f"scheme {given!r}: choose symmetric or asymmetric (with zero points)"
            )
        if not SCHEMES[given] and not style.zero_points:
            raise OptionError(
                f"scheme asymmetric gives activations or weights zero points, and the target '{target.name}' takes "
                "none: write symmetric, or leave it out"
            )
    return dataclasses.replace(
        style,
        symmetric=SCHEMES.get(schemes[0], style.symmetric),
        symmetric_weights=SCHEMES.get(schemes[1], style.symmetric_weights),
    )


def check_weight(style: Style, kind: ir.DataType, symmetric: bool, where: str) -> None:
    """Refuses weights whose zero points a type or a kernel lacks.

    Raises:
        OptionError: an 8-bit float has a zero point, or int8 beside unsigned bytes, whose products saturate.
    """
    if symmetric:
        return
    if not kind.is_integer():
        raise OptionError(
            f"weights of {_name(kind)} with zero points for {where}: 8-bit floats have none; write scheme symmetric"
        )
    if kind is ir.DataType.INT8 and style.saturates:
        raise OptionError(
            f"weights of int8 with zero points for {where}: products of bytes saturate on x86 without VNNI, which "
            "is avoided for symmetric int8 alone; write weights of uint8, whose products do not"
        )


_PARSED = {
    (ir.DataType.INT8, ir.DataType.INT8),
    (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FN),
}
_SINCE = dict.fromkeys(_FLOATS.values(), 19)
"""Opsets below which a type has no Q and DQ in any domain."""


def named(text: str, known: dict[str, ir.DataType], what: str) -> ir.DataType:
    """The type of this name.

    Raises:
        OptionError: none of the known ones has it.
    """
    if text not in known:
        raise OptionError(f"{what} of {text!r}: choose one of {', '.join(known)}")
    return known[text]


def least_opset(kinds: set[ir.DataType], *, contrib: bool = True) -> int:
    """The opset that types need, in ai.onnx alone or in com.microsoft too; 0 for any."""
    needed = _SINCE.get if contrib else _standard_since
    return max((needed(kind, 0) for kind in kinds), default=0)


def _standard_since(kind: ir.DataType, _default: int = 0) -> int:
    """The opset from which on ai.onnx has Q and DQ of a type, by channel too."""
    return _SINCE.get(kind, 13 if kind in BYTES or kind is ir.DataType.INT32 else 21)


def domain_of(kind: ir.DataType, opset: int) -> str:
    """The domain whose Q and DQ have a type at an opset of ai.onnx."""
    return "" if opset >= _standard_since(kind) else MICROSOFT


def least_ir_version(kinds: set[ir.DataType]) -> int:
    """The IR version that stored tensors of these types need; 0 for any."""
    if kinds & {ir.DataType.UINT4, ir.DataType.INT4}:
        return 10
    return 9 if kinds & set(_FLOATS.values()) else 0


def _name(kind: ir.DataType) -> str:
    return kind.name.lower()
