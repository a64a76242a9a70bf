"""What is told of each layer: how it was stored in 8 bits and what that costs, or why it stays float."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import onnx_ir as ir

from graphopt.ir import values
from graphopt.rewrite import Context, RemarkKind, name_of
from graphopt_passes.quantize.facts import Layer
from graphopt_passes.quantize.kinds import BYTES
from graphopt_passes.quantize.overrides import Override, Overrides, operator_of
from graphopt_passes.quantize.placement import ABSORBED, PRODUCTS, is_product
from graphopt_passes.quantize.quality import NOT_TIMED
from graphopt_passes.quantize.trials import Trial

_FLOAT = "stays float: "


@dataclasses.dataclass(frozen=True)
class Floats:
    """Products of the main graph, and why those stay float of which nothing else is said.

    Attributes:
        reasons: by name; "" where it is the fate of the whole model.
    """

    reasons: dict[str, str]

    @classmethod
    def of(cls, model: ir.Model, allowed: frozenset[str]) -> Floats:
        """What is known before anything is changed, `allowed` being what the recipe does not exclude."""
        found = {}
        for node in model.graph:
            if not is_product(node) and (node.op_type not in PRODUCTS or node.domain):
                continue
            name = name_of(node)
            excluded = "" if name in allowed else "the recipe leaves it out"
            found[name] = excluded if is_product(node) else _NO_KERNEL
        return cls(found)

    def tell(self, ctx: Context, rule: str) -> None:
        """Says of each product that no other remark speaks of why it stays float."""
        spoken = {each.node for each in ctx.remarks if each.pass_name == ctx.pass_name}
        warned = [
            each.reason
            for each in ctx.remarks
            if each.kind is RemarkKind.WARNING and each.reason.startswith(_FLOAT)
        ]
        whole = warned[-1].removeprefix(_FLOAT) if warned else "no choice of layers holds it"
        for name, reason in self.reasons.items():
            if name not in spoken:
                ctx.missed(rule, name, _FLOAT + (reason or whole))


def tell_ignored(model: ir.Model, overrides: Overrides, ctx: Context, rule: str) -> None:
    """Warns of each override that nothing in a model that was quantised follows, by its name or its element type."""
    activations, constants = _stored_kinds(model)
    if not activations:
        return  # all stays float, which is said elsewhere
    for pattern, said in overrides.rules:
        for kind, stored, key in (
            (said.dtype, activations, "dtype"),
            (said.weight, constants, "weights"),
        ):
            settings = _settings(said, of_weights=key == "weights")
            if settings and not overrides.hits(pattern, *set().union(*stored.values())):
                _tell_unfollowed(ctx, rule, pattern, settings, of_weights=key == "weights")
            if kind is None or kind in BYTES or overrides.hits(pattern, *stored.get(kind, ())):
                continue
            name = kind.name.lower()
            ctx.remark(
                RemarkKind.WARNING,
                rule,
                pattern,
                f"override '{pattern}: {key}={name}' has no effect: nothing of that name is stored in {name}. Layers "
                "are stored so where they are products (Conv, Gemm, MatMul) with constant weights; sums, pools and "
                "views of float32 where they are named in full, or lie between layers in integers",
            )


def _settings(said: Override, *, of_weights: bool) -> tuple[str, ...]:
    """Which settings of an override are about activations, or about weights, in whatever type they are stored."""
    bytes_only = said.weight if of_weights else said.dtype
    given: dict[str, object] = {"axis": said.per_channel, "weights_scheme": said.symmetric_weights}
    if not of_weights:
        given = {"method": said.method, "range": said.ends, "bits": said.bits}
        given["scheme"] = said.symmetric
    given["weights" if of_weights else "dtype"] = bytes_only if bytes_only in BYTES else None
    return tuple(key for key, value in given.items() if value is not None)


def _tell_unfollowed(
    ctx: Context, rule: str, pattern: str, settings: tuple[str, ...], *, of_weights: bool
) -> None:
    what = (
        "no layer of that name has its weight in integers"
        if of_weights
        else "no value of that name, and none that a node of that name reads or makes, is stored in integers"
    )
    text = f"override '{pattern}' has no effect in {', '.join(settings)}: {what}; name one that is, or leave it out"
    ctx.remark(RemarkKind.WARNING, rule, pattern, text)


Named: TypeAlias = dict[ir.DataType, set[str]]


def _stored_kinds(model: ir.Model) -> tuple[Named, Named]:
    """Names of values that are stored, and of what makes and reads them, by element type: activations, constants."""
    activations: Named = {}
    constants: Named = {}
    for decode in (node for graph in model.graphs() for node in graph):
        codes = decode.inputs[0] if decode.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype is None:
            continue
        names = {decode.outputs[0].name or ""}
        behind = [use.node for use in decode.outputs[0].uses()]
        behind += [
            use.node
            for each in behind
            if each.op_type in ("Mul", "Max")
            for use in each.outputs[0].uses()
        ]
        encode = codes.producer()
        if (
            encode is not None
            and encode.op_type == "QuantizeLinear"
            and encode.inputs[0] is not None
        ):
            source = encode.inputs[0]
            names.add(source.name or "")
            behind += _makers(source)
        names.update(
            name for each in behind for name in (each.name or "", name_of(each), operator_of(each))
        )
        found = constants if values.is_constant(codes) else activations
        found.setdefault(codes.dtype, set()).update(names)
    return activations, constants


def _makers(value: ir.Value) -> list[ir.Node]:
    """The node that makes a value, and the one in front of it where that is an activation."""
    maker = value.producer()
    if maker is None:
        return []
    front = maker.inputs[0].producer() if maker.op_type in ABSORBED and maker.inputs[0] else None
    return [maker] if front is None else [maker, front]


_NO_KERNEL = (
    "no integer kernel takes it: its weight and the bias of a Conv must be constant float32, its data not turned "
    "(transA)"
)


def summary(best: Trial) -> str:
    """How fast and how good the choice is."""
    assert best.quality is not None
    change, metric = best.quality.change, best.quality.metric
    by = (
        "on this machine"
        if best.is_timed
        else "by the table of kernel times, this being another processor"
    )
    speed = f"{best.ratio:.2f}x the speed of float {by}" if best.ratio else NOT_TIMED
    told = f"{speed}; worst output {best.quality.sqnr_db:.1f} dB"
    if change is not None:
        told += f", {change.flips:.2%} of the samples expected to change class, {change.loss:.2%} to be lost by it"
    return told if metric is None else f"{told}, the given metric {metric:.4g}"


def facts(layer: Layer, kernel: str) -> dict[str, str | float | bool | None]:
    """One row of the table: kernel, method, clipping, noise, saturation."""
    has_weight = layer.op_type in PRODUCTS
    return {
        "operator": layer.op_type,
        "kernel": kernel,
        "method": layer.method,
        "clipped": layer.clipped,
        "sqnr_db": _decibels(layer.noise),
        "input_sqnr_db": _decibels(layer.input_noise),
        "weight_sqnr_db": _decibels(layer.weight_noise) if has_weight else None,
        "refined": layer.refined,
        "raised_channels": layer.raised,
        "activations": layer.activations,
        "weights": layer.weights,
    }


def _decibels(noise: float) -> float:
    return round(-10 * math.log10(max(noise, 1e-20)), 2)


def told(layer: Layer, kernel: str) -> str:
    """The same in words."""
    noise, of_input, of_weight = map(
        _decibels, (layer.noise, layer.input_noise, layer.weight_noise)
    )
    ranged = f"range by {layer.method}, {layer.clipped:.2%} clipped, {noise:.1f} dB"
    if layer.op_type not in PRODUCTS:
        return f"{layer.op_type} in {_kinds(layer)} ({kernel}): {ranged}"
    raised = f"{layer.raised} channels coarser against it" if layer.raised else "none"
    refined = ", rounded by second moments" if layer.refined else ""
    return (
        f"{layer.op_type} in {_kinds(layer)} ({kernel}): {ranged} (input {of_input:.1f}, "
        f"weight {of_weight:.1f}{refined}), saturation: {raised}"
    )


def _kinds(layer: Layer) -> str:
    """In what a layer is stored."""
    kinds = [kind for kind in (layer.activations, layer.weights) if kind]
    return "8 bits" if {*kinds} <= {"uint8", "int8"} else " with weights of ".join(kinds)
