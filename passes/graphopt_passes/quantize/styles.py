"""What each runtime wants quantised graphs to look like, as data.

Verified on ONNX Runtime 1.31.1 by reading back the optimised graph; TensorRT by its parser's checks and its developer
guide.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.targets import Target

MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Style:
    """How quantised values and weights are written for one runtime.

    Attributes:
        name: what recipes call it.
        activation: element type of stored activations.
        symmetric: whether activations are stored without zero point.
        stores_outputs: whether the runtime fuses only what is quantised on both sides; otherwise inputs only.
        integer_bias: whether biases are stored as int32.
        saturates: whether products of unsigned and signed bytes are added in pairs in 16 bits, saturating (x86 without
            VNNI).
        contrib: whether the runtime has com.microsoft: Q/DQ serve below opset 13, where ai.onnx has no axis.
        least_opset: below it the runtime's integer kernels cannot be named.
        weight: element type of weights.
        symmetric_weights: whether weights are stored without zero points.
        zero_points: whether the runtime takes any.
        least_channels: channels from which on products run faster in integers; 0 where a table of times decides, or
            nobody knows.
    """

    name: str
    activation: ir.DataType
    symmetric: bool
    stores_outputs: bool
    integer_bias: bool
    saturates: bool
    contrib: bool
    least_opset: int
    weight: ir.DataType = ir.DataType.INT8
    symmetric_weights: bool = True
    zero_points: bool = True
    least_channels: int = 0


_X86 = Style("x86-avx2", ir.DataType.UINT8, False, True, True, True, True, 10)
STYLES = {
    style.name: style
    for style in (
        _X86,
        dataclasses.replace(_X86, name="x86-vnni", saturates=False),
        dataclasses.replace(_X86, name="arm", activation=ir.DataType.INT8, saturates=False),
        Style(
            "tensorrt",
            ir.DataType.INT8,
            True,
            False,
            False,
            False,
            False,
            13,
            zero_points=False,
            least_channels=16,
        ),
        # Whoever reads it may have processors of either kind: the same numbers on both.
        dataclasses.replace(_X86, name="portable", contrib=False, least_opset=13),
    )
}


def style_named(name: str) -> Style:
    """The style called `name`.

    Raises:
        OptionError: none.
    """
    if name not in STYLES:
        raise OptionError(f"unknown quantisation style {name!r}; choose one of {', '.join(STYLES)}")
    return STYLES[name]


_BY_ARCHITECTURE = {"x86-vnni": "x86-vnni", "x86-amx": "x86-vnni", "arm64": "arm"}


def style_for(target: Target) -> Style:
    """The style for a target, by what its data say."""
    qdq = target.qdq
    if qdq is not None and not qdq.zero_points:
        return STYLES["tensorrt"]
    if target.has_domain(MICROSOFT):
        return STYLES[style_of(target.architecture)]
    kind = ir.DataType[qdq.activations] if qdq is not None and qdq.activations else None
    return (
        STYLES["portable"]
        if kind is None
        else dataclasses.replace(STYLES["portable"], activation=kind)
    )


def style_of(architecture: str) -> str:
    """The style for a processor; for one that is not named the one that is right on every x86."""
    return _BY_ARCHITECTURE.get(architecture, "x86-avx2")
