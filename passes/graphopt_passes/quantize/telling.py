"""What is told of each layer: how it was stored in 8 bits and what that costs, or why it stays float."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from graphopt.rewrite import Context, RemarkKind, name_of
from graphopt_passes.quantize.facts import Layer
from graphopt_passes.quantize.placement import PRODUCTS, is_product
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
            if node.op_type not in PRODUCTS or node.domain:
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


_NO_KERNEL = "no integer kernel takes it: weight and bias must be constant float32, Gemm without alpha, beta, transA"


def summary(best: Trial) -> str:
    """How fast and how good the choice is."""
    assert best.quality is not None
    change, metric = best.quality.change, best.quality.metric
    told = f"{best.ratio:.2f}x the speed of float on this machine; worst output {best.quality.sqnr_db:.1f} dB"
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
