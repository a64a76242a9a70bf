"""The decision for every node: half, float32, whatever comes, or nothing to decide; and why."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.scopes import all_graphs
from graphopt_passes.precision import flow as flows
from graphopt_passes.precision.legality import Legality, Slots, is_float
from graphopt_passes.precision.limits import LIMITS, Limits
from graphopt_passes.precision.ranges import Spread, spread_of
from graphopt_passes.precision.rescale import scaled_inputs, shift_for, unheld_factor

MARGIN = 0.5
"""Of the greatest half: how far observed values may go, because others will be seen later."""


class Kind(enum.StrEnum):
    """What happens to a node."""

    LOW = "half"
    HIGH = "float32"
    FOLLOW = "follow"
    """Half where what comes in is."""
    BODY = "body"
    """Control flow: float32 at its boundary."""
    FIXED = "fixed"
    """Has no float32 tensors."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens to one node, and why.

    Attributes:
        kind: what.
        reason: the rule that decided, in words.
        slots: the operands that may be half.
        shift: exponent of the power of two that the constants of a product are scaled by; 0 for none.
    """

    kind: Kind
    reason: str = ""
    slots: Slots = dataclasses.field(default_factory=lambda: Slots((), ()))
    shift: int = 0


# fmt: off
_RANDOM = frozenset((
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
))
_REDUCTIONS = frozenset((
    "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd", "GlobalAveragePool", "CumSum",
))
_RISKY = _REDUCTIONS | frozenset((
    "Exp", "Pow", "Softplus", "Log", "Reciprocal", "Div", "Sqrt", "Sinh", "Cosh", "Tan", "LRN", "LpNormalization",
    "LpPool", "GlobalLpPool", "Det", "MeanVarianceNormalization",
))
# fmt: on

_GROWING = frozenset(
    (
        "ReduceSum",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceProd",
        "CumSum",
        "Pow",
        "Sinh",
        "Cosh",
    )
)
SLACK = 64.0
"""How much further results of these, and squares, are taken to go than seen, where nobody gave real inputs."""

QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_BYTES = frozenset({ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8})


@dataclasses.dataclass
class Facts:
    """What is known of the model when nodes are decided.

    Attributes:
        legality: what schema and target take.
        spreads: of values, by name; empty without data.
        exact: values that must stay exact, with the reason.
        masks: what hides scores from a softmax.
        fragile: values of which zeros, steps, places or small differences matter, with the reason.
        forced: the user's own words, by node name or output name: "float32" or "half".
        generated: whether the spreads are of generated inputs, which real ones may exceed.
    """

    legality: Legality
    spreads: Mapping[str, Spread]
    exact: Mapping[ir.Value, str]
    masks: flows.Masks
    fragile: Mapping[ir.Value, str] = dataclasses.field(default_factory=dict)
    forced: Mapping[str, str] = dataclasses.field(default_factory=dict)
    generated: bool = False
    _weights: dict[ir.Value, Spread] = dataclasses.field(default_factory=dict)

    @property
    def half(self) -> ir.DataType:
        """The half dtype."""
        return self.legality.half

    @property
    def limits(self) -> Limits:
        """Its limits."""
        return LIMITS[self.half]

    def spread(self, value: ir.Value) -> Spread | None:
        """What is known of a value: constants from their elements, others from observation."""
        tensor = values.constant(value)
        if tensor is None:
            return self.spreads.get(value.name or "")
        if value not in self._weights:
            array = np.asarray(tensor.numpy(), np.float32)
            self._weights[value] = spread_of(
                array, self.half, masked=value in self.masks.constants
            )[0]
        return self._weights[value]


def gather(
    model: ir.Model,
    legality: Legality,
    spreads: Mapping[str, Spread],
    flow: flows.Flow,
    *,
    generated: bool = False,
) -> Facts:
    """The facts of a model.

    Args:
        model: in float32.
        legality: what schema and target take.
        spreads: observed, by name of value.
        flow: edges of the model.
        generated: whether the spreads are of generated inputs.
    """

    def is_mask(value: ir.Value) -> bool:
        seen = spreads.get(value.name or "")
        return seen is not None and seen.absmax <= 1 and seen.integers

    exact = dict.fromkeys(
        flows.counters(model, flow, is_mask), "counts: positions and ids need more bits"
    )
    exact |= dict.fromkeys(
        flows.shape_path(model, flow), "shape path: on the way from a shape or integers to integers"
    )
    near = flows.near_inputs(model, flow)
    exact |= dict.fromkeys(
        flows.phases(model, flow, near), "phase: an angle made of an input, which may be large"
    )

    def flushes(value: ir.Value) -> bool:
        seen = spreads.get(value.name or "")
        return seen is not None and seen.flushed

    masks = flows.sentinels(model, flow)
    fragile = flows.fragile(model, flow, flushes, near if generated else set())
    return Facts(legality, spreads, exact, masks, fragile, generated=generated)


def decide_all(model: ir.Model, facts: Facts) -> dict[ir.Node, Decision]:
    """The decision for every node of every graph."""
    return {node: decide(node, facts) for scope in all_graphs(model) for node in scope.graph}


def decide(node: ir.Node, facts: Facts) -> Decision:
    """The decision for one node, from its operands alone."""
    operands = [v for v in (*node.inputs, *node.outputs) if v is not None]
    if operators.has_subgraph(node):
        return Decision(Kind.BODY)
    if any(isinstance(v.type, ir.SequenceType | ir.OptionalType) for v in operands):
        return Decision(Kind.HIGH, "sequence or optional: float32 at its boundary")
    if not any(is_float(value) for value in operands):
        return Decision(Kind.FIXED)
    forced = next((facts.forced[n] for n in _names(node) if n in facts.forced), None)
    reason = "user" if forced == Kind.HIGH else _protected(node, facts)
    if reason:
        return Decision(Kind.HIGH, reason)
    if node.op_type == "Cast" and not node.domain:
        return _decide_cast(node, facts)
    return _decide_arithmetic(node, operands, facts, forced == Kind.LOW)


def _decide_arithmetic(
    node: ir.Node, operands: list[ir.Value], facts: Facts, forced: bool
) -> Decision:
    if any(v.dtype in LIMITS for v in operands if isinstance(v.type, ir.TensorType)):
        return Decision(Kind.HIGH, "mixes dtypes already")
    slots = facts.legality.slots(node)
    reason = slots.refusal or ("" if forced else _range_reason(node, slots, facts))
    if reason and not slots.refusal:
        return _rescaled(node, slots, facts) or Decision(Kind.HIGH, reason)
    if reason:
        return Decision(Kind.HIGH, reason)
    follows = not node.domain and node.op_type in flows.FOLLOWERS
    return Decision(Kind.FOLLOW if follows else Kind.LOW, slots=slots)


def _rescaled(node: ir.Node, slots: Slots, facts: Facts) -> Decision | None:
    """Half all the same, where what is wrong with a product is the size of its weights or of its result."""
    scaled, made = scaled_inputs(node), node.outputs[0]
    if not scaled or not slots.outputs[0] or made in facts.masks.carriers or made in facts.fragile:
        return None
    kept = [place for place in range(len(node.inputs)) if place not in scaled]
    if any(_operand_reason(node.inputs[place], facts) for place in kept if slots.inputs[place]):
        return None
    seen = facts.spread(made)
    if _is_wide_exponent(made, seen, facts.limits):
        return None
    shift = shift_for(node, seen, facts.half, facts.limits)
    if shift is None:
        return None
    return Decision(Kind.LOW, f"rescaled: constants times 2^{shift}", slots, shift)


def _operand_reason(value: ir.Value | None, facts: Facts) -> str:
    """Why one operand forbids half, or ""."""
    if value is None:
        return ""
    if value in facts.fragile:
        return facts.fragile[value]
    spread = facts.spread(value)
    return "" if spread is None else _spread_reason(value, spread, facts)


def _names(node: ir.Node) -> list[str]:
    return [n for n in (node.name, *(v.name for v in node.outputs)) if n]


def _protected(node: ir.Node, facts: Facts) -> str:
    """Why the node stays whatever schema, target and data say."""
    if node.op_type in _RANDOM:
        return "random"
    if node.op_type in QUANTIZATION:
        return "quantisation: scales stay float32"
    if node.op_type in ("Range", "ConstantOfShape", "EyeLike"):
        return (
            "creates numbers: no runtime counts in half"
            if node.op_type == "Range"
            else "creates a constant"
        )
    if factor := unheld_factor(node, facts.half):
        return f"range: a half does not hold the factor {factor}"
    for value in (*node.outputs, *node.inputs):
        if value is not None and value in facts.exact and is_float(value):
            ends = node.op_type in ("Cast", "Sin", "Cos")
            if value in node.outputs or ends or node.op_type not in flows.MOVEMENT:
                return facts.exact[value]
    factors = [_is_dequantized(value) for value in node.inputs[:2] if is_float(value)]
    if factors and all(factors):  # with one in float32 there is no such kernel
        return "quantised operands: the runtime's integer kernel expects float32 around it"
    return ""


def _is_dequantized(value: ir.Value | None) -> bool:
    for _ in range(4):
        node = None if value is None else value.producer()
        if node is None:
            return False
        if node.op_type in QUANTIZATION:
            return True
        if node.op_type not in flows.MOVEMENT:
            return False
        value = node.inputs[0]
    return False


def _decide_cast(node: ir.Node, facts: Facts) -> Decision:
    source, made = node.inputs[0], node.outputs[0]
    if made.dtype != ir.DataType.FLOAT:
        return Decision(Kind.FOLLOW, slots=Slots((True,), (False,)))
    small = source is not None and source.dtype in _BYTES
    exact = source is not None and source.dtype == facts.half
    seen = facts.spread(made)
    if small or exact or (seen is not None and seen.exact and seen.absmax <= 1):
        return Decision(Kind.LOW, slots=Slots((False,), (True,)))
    return Decision(Kind.HIGH, "Cast: the integers or floats that come may not fit a half")


def _range_reason(node: ir.Node, slots: Slots, facts: Facts) -> str:
    """Why the numbers forbid half, or ""."""
    low = [
        *zip(node.inputs, slots.inputs, strict=True),
        *zip(node.outputs, slots.outputs, strict=True),
    ]
    if node.op_type in ("Shape", "Size"):
        return ""
    unseen = False
    for value, allowed in low:
        if value is None or not allowed:
            continue
        if reason := _operand_reason(value, facts):
            return reason
        unseen = unseen or facts.spread(value) is None
    if unseen and node.op_type in _RISKY:
        return "without data its range is not known"
    if not unseen and not node.domain and node.op_type in ("Add", "Sub"):
        return _cancellation_reason(node, facts)
    if not unseen and node.op_type in _REDUCTIONS:
        return _reduction_reason(node, facts)
    return ""


def _grows(value: ir.Value | None, depth: int = 4) -> bool:
    """Whether the value grew faster than what it comes from, or with the number of elements."""
    node = None if value is None else value.producer()
    if node is None or node.domain or not depth:
        return False
    if node.op_type in _GROWING or (node.op_type == "Mul" and node.inputs[0] is node.inputs[1]):
        return True
    carries = node.op_type in flows.MOVEMENT or node.op_type in ("Add", "ReduceMean")
    return carries and any(_grows(each, depth - 1) for each in node.inputs)


def _is_wide_exponent(value: ir.Value, spread: Spread | None, limits: Limits) -> bool:
    """Whether an exponential is taken next of a value so large that its last place matters."""
    if spread is None or spread.usual <= limits.exponent:
        return False
    readers = [use.node for use in value.uses() if not use.node.domain]
    return any(node.op_type in ("Exp", "Softmax", "ReduceLogSumExp") for node in readers)


def _spread_reason(value: ir.Value, spread: Spread, facts: Facts) -> str:
    limits, name = facts.limits, value.name
    constant = values.is_constant(value)
    if value in facts.masks.constants:
        return ""
    margin = 1.0 if constant else MARGIN
    if spread.absmax > limits.greatest * margin:
        return f"range: |{name}| reaches {spread.absmax:.3g}"
    if facts.generated and spread.absmax * SLACK > limits.greatest * MARGIN and _grows(value):
        return f"range: |{name}| reaches {spread.absmax:.3g} on generated inputs, and grows fast"
    if not constant and _is_wide_exponent(value, spread, limits):
        return f"exponent: |{name}| reaches {spread.usual:.3g}, where a half moves the exponential"
    counts = spread.integers and not spread.exact and value not in facts.masks.carriers
    if not constant and counts and spread.absmax > limits.integer:
        return f"range: {name} holds integers up to {spread.absmax:.6g}"
    if spread.error > limits.error:
        what = "weight error" if constant else "rounding error"
        return f"{what}: rounding {name} costs {spread.error:.2g} of its size"
    return ""


def _cancellation_reason(node: ir.Node, facts: Facts) -> str:
    """Whether large numbers meet that differ by less than a half tells apart."""
    made = node.outputs[0]
    spreads = [facts.spread(value) for value in (*node.inputs, made) if value is not None]
    seen = [0.0 if each is None else each.absmax for each in spreads]
    masks = any(value in facts.masks.carriers for value in node.inputs)
    if masks or max(seen) <= facts.limits.integer * (seen[-1] or 1.0):
        return ""
    return f"cancellation: numbers up to {max(seen):.3g} leave {seen[-1]:.3g}"


def _reduction_reason(node: ir.Node, facts: Facts) -> str:
    """Whether a sum of what goes in could overflow, whatever comes out."""
    source = node.inputs[0]
    seen = None if source is None else facts.spread(source)
    if source is None or seen is None:
        return ""
    size = _elements(source) / max(_elements(node.outputs[0]), 1)
    squares = node.op_type in ("ReduceL2", "ReduceSumSquare")
    total = size * (seen.absmax * seen.mean if squares else seen.mean)
    if total > facts.limits.greatest * MARGIN:
        return f"reduction: {size:.0f} elements of mean {seen.mean:.3g} add up to {total:.3g}"
    return ""


def _elements(value: ir.Value) -> float:
    if value.shape is None:
        return 1.0
    return float(math.prod(dim for dim in value.shape if isinstance(dim, int)))
