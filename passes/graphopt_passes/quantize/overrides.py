"""What a recipe says of single layers and values: left in float, another range, method, format or axis.

"head*: exclude"                        the nodes, or those that make these values, stay float
"conv1: method=percentile"              how the range follows from the samples
"scores: range=-4..4"                   the range itself
"stem*: bits=7"                         7 bits for activations of 8
"head: dtype=uint16"                    element type of what a layer reads and stores, or of one value
"head: dtype=uint16 weights=int16"      of its weight, too
"op:Gemm: method=percentile"            all nodes of an operator: what they read, and their weights
"fc*: axis=tensor"                      one scale for the whole weight; axis=channel: one an output channel
"fc*: weights=uint8 weights_scheme=asymmetric"   zero points for the weight; scheme=symmetric: none for what is read
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from graphopt.calibrate.ranges import Method
from graphopt.errors import OptionError
from graphopt.rewrite import Context
from graphopt_passes.quantize.kinds import ACTIVATIONS, BYTES, SCHEMES, WEIGHTS, check_weight
from graphopt_passes.quantize.styles import Style

_EXAMPLE = '"head*: exclude", "conv1: method=percentile range=-4..4 bits=7 dtype=int8 axis=tensor", "fc: dtype=uint16"'


@dataclasses.dataclass(frozen=True)
class Override:
    """What holds for the names that a pattern matches; None leaves it as it is."""

    exclude: bool | None = None
    method: Method | None = None
    ends: tuple[float, float] | None = None
    bits: int | None = None
    dtype: ir.DataType | None = None
    weight: ir.DataType | None = None
    per_channel: bool | None = None
    symmetric: bool | None = None
    symmetric_weights: bool | None = None

    def with_stated(self, other: Override) -> Override:
        """The same, but what the other says holds."""
        stated = {k: v for k, v in vars(other).items() if v is not None}
        return dataclasses.replace(self, **stated)


@dataclasses.dataclass(frozen=True)
class Overrides:
    """All overrides of a run.

    Attributes:
        method: of ranges where nothing else is said.
        rules: patterns and what holds for what they match; later ones win.
    """

    method: Method = Method.BEST
    rules: tuple[tuple[str, Override], ...] = ()

    @staticmethod
    def hits(pattern: str, *names: str) -> bool:
        """Whether a pattern matches one of the names; those of operators only where it is about operators."""
        about = pattern.startswith(_OPERATOR)
        return any(
            fnmatch.fnmatchcase(name, pattern)
            for name in names
            if name.startswith(_OPERATOR) == about
        )

    def of(self, *names: str) -> Override:
        """What holds for something of these names."""
        found = Override()
        for pattern, given in self.rules:
            if self.hits(pattern, *names):
                found = found.with_stated(given)
        return found


_OPERATOR = "op:"


def operator_of(node: ir.Node) -> str:
    """The name under which patterns speak of all nodes of one operator."""
    return f"{_OPERATOR}{node.op_type.removeprefix('Fused')}"


def names_of(model: ir.Model, ctx: Context) -> set[str]:
    """Names of all nodes, values and operators, as they are and as the user wrote them, before anything was fused."""
    found: set[str] = set()
    for each in (model, *([ctx.original()] if ctx.original is not None else [])):
        for graph in each.graphs():
            found.update(
                value.name or "" for value in (*graph.inputs, *graph.initializers.values())
            )
            for node in graph:
                found.update((node.name or "", *(value.name or "" for value in node.outputs)))
                found.add(operator_of(node))
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


def check_symmetric(
    rules: Iterable[tuple[str, Override]], known: Iterable[str], style: Style
) -> None:
    """Refuses what asks a runtime for a zero point that takes none, or for types that it does not multiply.

    Raises:
        OptionError: an override states another type than that of all layers, or a range that is not the same both ways.
    """
    whole = style.activation.name.lower()
    for pattern, said in rules:
        low, high = said.ends or (0.0, 0.0)
        if False in (said.symmetric, said.symmetric_weights):
            raise OptionError(
                f"quantisation override of '{pattern}': scheme asymmetric needs zero points, and TensorRT takes none; "
                "leave it out"
            )
        kinds = {said.dtype or style.activation, said.weight or style.weight}
        if kinds == {style.activation, style.weight} and low == -high:
            continue
        node = next((name for name in sorted(known) if fnmatch.fnmatchcase(name, pattern)), pattern)
        if low != -high:
            most = max(-low, high)
            raise OptionError(
                f"quantisation override of '{pattern}': a range of {low:g}..{high:g} for '{node}' needs a zero point, "
                f"and TensorRT takes none (symmetric {whole} only); write range={-most:g}..{most:g}"
            )
        given = (said.dtype or said.weight or style.activation).name.lower()
        why = _NOT_PARSED.get(
            given, "beside others: layers of int8 and of float8e4m3fn in one network are untried"
        )
        raise OptionError(
            f"quantisation override of '{pattern}': {given} for '{node}' {why}; write {whole}, or say of all layers "
            "'activations' and 'weights' in the recipe"
        )


def check_weights(rules: Iterable[tuple[str, Override]], style: Style) -> None:
    """Refuses weights whose zero points their type or the kernels lack.

    Raises:
        OptionError: an override asks for them.
    """
    for pattern, said in rules:
        symmetric = said.symmetric_weights
        symmetric = style.symmetric_weights if symmetric is None else symmetric
        check_weight(style, said.weight or style.weight, symmetric, f"'{pattern}'")


_NOT_PARSED = {
    **dict.fromkeys(
        ("uint8", "uint4", "uint16"), "needs a zero point, and TensorRT takes none (symmetric only)"
    ),
    **dict.fromkeys(
        ("int16", "float8e5m2"), "is no type that TensorRT's parser takes for Q and DQ"
    ),
    "int4": "is a type of weights alone in TensorRT (--precision int4-weights)",
}


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
    if found.bits is not None and found.dtype not in (None, *BYTES):
        raise _refusal(text, "bits are those of uint8 and int8")
    return pattern.strip(), found


_SETTINGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "method": ("method", {each.value: each for each in Method}),
    "bits": ("bits", {"7": 7, "8": 8}),
    "dtype": ("dtype", ACTIVATIONS),
    "weights": ("weight", WEIGHTS),
    "scheme": ("symmetric", SCHEMES),
    "weights_scheme": ("symmetric_weights", SCHEMES),
    "axis": ("per_channel", {"channel": True, "tensor": False}),
}
"""Settings that take one of some words: what of an override they state, and what each word means."""


def _setting(text: str, setting: str) -> dict[str, Any]:
    key, _, value = setting.partition("=")
    if key == "exclude" and not value:
        return {"exclude": True}
    field, known = _SETTINGS.get(key, ("", {}))
    if value in known:
        return {field: known[value]}
    if key == "dtype" and value in ("float16", "bfloat16", "float32", "float"):
        raise _refusal(text, f"{setting!r}: keep a layer in float with 'exclude'")
    if key == "range":
        return {"ends": _ends(text, value)}
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
        f"quantisation override {text!r}: {why}; write for example {_EXAMPLE}; methods are {methods}, types "
        f"{', '.join(ACTIVATIONS)}, of weights {', '.join(WEIGHTS)}, axes channel and "
        "tensor, schemes symmetric and asymmetric"
    )
