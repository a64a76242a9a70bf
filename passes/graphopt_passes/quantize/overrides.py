"""What a recipe says of single layers and values: left in float, another range, method, format or axis.

"head*: exclude"                        the nodes, or those that make these values, stay float
"conv1: method=percentile"              how the range follows from the samples
"scores: range=-4..4"                   the range itself
"stem*: bits=7"                         7 bits for activations of 8
"stem*: dtype=int8"                     element type of activations: uint8 or int8
"fc*: axis=tensor"                      one scale for the whole weight; axis=channel: one an output channel
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.calibrate.ranges import Method
from graphopt.errors import OptionError
from graphopt.rewrite import Context

_TYPES = {"uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8}
_AXES = ("channel", "tensor")
_NO_TYPES = {
    **dict.fromkeys(
        ("uint16", "int16"),
        "no kernel multiplies 16-bit integers, neither of ONNX Runtime nor of TensorRT: the layer would run in float "
        "between a Q and a DQ; keep it in float with 'exclude'",
    ),
    **dict.fromkeys(
        ("uint4", "int4"),
        "no kernel takes activations of 4 bits; weights in 4 bits are those of --precision int4-weights, where "
        "overrides say 'bits=4'",
    ),
    **dict.fromkeys(
        ("float8e4m3fn", "float8_e4m3fn", "float8", "fp8", "float8e5m2", "float8_e5m2"),
        "8-bit floats do not mix with integers in one product; they are those of --precision fp8",
    ),
    **dict.fromkeys(
        ("float16", "bfloat16", "float32", "float"), "keep a layer in float with 'exclude'"
    ),
}
"""Element types that are not for single activations, and why."""
_EXAMPLE = '"head*: exclude", "conv1: method=percentile range=-4..4 bits=7 dtype=int8 axis=tensor"'


@dataclasses.dataclass(frozen=True)
class Override:
    """What holds for the names that a pattern matches; None leaves it as it is."""

    exclude: bool | None = None
    method: Method | None = None
    ends: tuple[float, float] | None = None
    bits: int | None = None
    dtype: ir.DataType | None = None
    per_channel: bool | None = None


@dataclasses.dataclass(frozen=True)
class Overrides:
    """All overrides of a run.

    Attributes:
        method: of ranges where nothing else is said.
        rules: patterns and what holds for what they match; later ones win.
    """

    method: Method = Method.BEST
    rules: tuple[tuple[str, Override], ...] = ()

    def of(self, *names: str) -> Override:
        """What holds for something of these names."""
        found = Override()
        for pattern, given in self.rules:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                stated = {k: v for k, v in vars(given).items() if v is not None}
                found = dataclasses.replace(found, **stated)
        return found


def names_of(model: ir.Model, ctx: Context) -> set[str]:
    """Names of all nodes and values, as they are and as the user wrote them, before anything was fused."""
    found: set[str] = set()
    for each in (model, *([ctx.original()] if ctx.original is not None else [])):
        for graph in each.graphs():
            found.update(
                value.name or "" for value in (*graph.inputs, *graph.initializers.values())
            )
            for node in graph:
                found.update((node.name or "", *(value.name or "" for value in node.outputs)))
    return found - {""}


def check_patterns(patterns: Iterable[str], known: Collection[str]) -> None:
    """Refuses patterns that match nothing: a misspelt name would leave a layer as it is, unnoticed.

    Raises:
        OptionError: one of them matches no name.
    """
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(name, pattern) for name in known):
            continue
        close = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.5)
        told = f"; did you mean {', '.join(map(repr, close))}?" if close else "."
        raise OptionError(
            f"quantisation: '{pattern}' is the name of no node and no value of the model{told} Names are those that "
            "`graphopt inspect` shows, of nodes or of what they make; * and ? stand for any text"
        )


def check_symmetric(rules: Iterable[tuple[str, Override]], known: Iterable[str]) -> None:
    """Refuses what asks a runtime for a zero point that takes none.

    Raises:
        OptionError: an override states an unsigned type, or a range that is not the same both ways.
    """
    for pattern, said in rules:
        low, high = said.ends or (0.0, 0.0)
        if said.dtype is not ir.DataType.UINT8 and low == -high:
            continue
        node = next((name for name in sorted(known) if fnmatch.fnmatchcase(name, pattern)), pattern)
        what = "uint8" if said.dtype is ir.DataType.UINT8 else f"a range of {low:g}..{high:g}"
        most = max(-low, high)
        remedy = "int8" if said.dtype is ir.DataType.UINT8 else f"range={-most:g}..{most:g}"
        raise OptionError(
            f"quantisation override of '{pattern}': {what} for '{node}' needs a zero point, and TensorRT takes none "
            f"(symmetric int8 only); write {remedy}"
        )


def check_operators(given: Iterable[str], known: Collection[str]) -> None:
    """Refuses operator types that are never quantised: a misspelt one would be quantised, unnoticed.

    Raises:
        OptionError: one of them is none of the known.
    """
    for op_type in given:
        if op_type not in known:
            raise OptionError(
                f"quantisation: skip_ops names '{op_type}', which is never quantised; what may be kept in float is "
                f"{', '.join(sorted(known))}"
            )


def parse(method: str, texts: Sequence[str]) -> Overrides:
    """The overrides that a recipe states.

    Raises:
        OptionError: one of them cannot be understood.
    """
    if method not in {m.value for m in Method}:
        known = ", ".join(m.value for m in Method)
        raise OptionError(f"unknown calibration method {method!r}; choose one of {known}")
    return Overrides(Method(method), tuple(_rule(text) for text in texts))


def _rule(text: str) -> tuple[str, Override]:
    pattern, sign, settings = text.rpartition(": ")
    if not sign or not settings.split():
        raise _refusal(text, "it is not 'PATTERN: SETTING …'")
    found = Override()
    for setting in settings.split():
        found = dataclasses.replace(found, **_setting(text, setting))
    return pattern.strip(), found


def _setting(text: str, setting: str) -> dict[str, Any]:
    key, _, value = setting.partition("=")
    if key == "exclude" and not value:
        return {"exclude": True}
    if key == "method" and value in {m.value for m in Method}:
        return {"method": Method(value)}
    if key == "bits" and value in ("7", "8"):
        return {"bits": int(value)}
    if key == "dtype" and value in _TYPES:
        return {"dtype": _TYPES[value]}
    if key == "axis" and value in _AXES:
        return {"per_channel": value == "channel"}
    if key == "range":
        return {"ends": _ends(text, value)}
    if key == "dtype" and value in _NO_TYPES:
        raise OptionError(f"quantisation override {text!r}: {setting!r}: {_NO_TYPES[value]}")
    raise _refusal(text, f"{setting!r} is no setting")


def _ends(text: str, value: str) -> tuple[float, float]:
    low, _, high = value.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError as error:
        raise _refusal(text, f"{value!r} is no range LOW..HIGH") from error
    if not ends[0] <= ends[1] or not all(map(math.isfinite, ends)):
        raise _refusal(text, f"{value!r} is no range LOW..HIGH")
    return ends


def _refusal(text: str, why: str) -> OptionError:
    methods = ", ".join(m.value for m in Method)
    return OptionError(
        f"quantisation override {text!r}: {why}; write for example {_EXAMPLE}; methods are {methods}, types uint8 and "
        "int8, axes channel and tensor"
    )
