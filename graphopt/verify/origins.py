"""How a model makes its outputs, as far as comparing them depends on it: randomness, ranks, rounding, depth."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, scopes, values
from graphopt.ir.shapes import Shapes
from graphopt.numerics import Numerics
from graphopt.verify import metrics
from graphopt.verify.compare import Origin

if TYPE_CHECKING:
    from collections.abc import Iterable

    from graphopt.verify.compare import Profile

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_TRAINING_DROPOUTS = frozenset({"BiasDropout", "BitmaskBiasDropout", "BitmaskDropout", "Dropout"})

# What these return does not depend on the elements of their first input, only on its shape.
_SHAPE_ONLY = frozenset({"ConstantOfShape", "EyeLike", "Shape", "Size"})

# Operators that rearrange or convert elements one to one, so that ranks and roundings can be seen through them.
_TRANSPARENT = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)

_ROUNDING = frozenset(
    {
        "Ceil",
        "DynamicQuantizeLinear",
        "Floor",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
        "Round",
    }
)

# Operators that move data or work on integers and shapes alone: they add no rounding to the longest path.
_MOVERS = frozenset(
    {
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "MaxPool",
        "Pad",
        "Range",
        "Relu",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)


FLOOR = 2.0**-10
"""Scale below which an output is taken for noise, over its scale on plain inputs: an all-zero feed, say."""


@dataclasses.dataclass(frozen=True)
class OutputOrigin:
    """How one output is made.

    Attributes:
        origin: what decides its equality.
        scores: for RANK: the value of the main graph that is ranked; else "".
        axis: for RANK: along which axis.
        absolute: the error that the runtime's own kernel makes whatever the magnitude: ONNX Runtime's Sigmoid is
            a rational function plus 1/2, right to two units in the last place of 1 even where it returns 1e-6.
    """

    origin: Origin = Origin.VALUE
    scores: str = ""
    axis: int = 0
    absolute: float = 0.0


def output_origins(model: ir.Model) -> dict[str, OutputOrigin]:
    """The origin of every output of the main graph, by name."""
    return {value.name or "": _origin(value) for value in model.graph.outputs}


def hidden_scores(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """By output that holds no floats: the nearest float values of the main graph that it is made of.

    An output that is a position or a class says little of the numbers behind it.
    """
    found = {}
    discrete = [v for v in model.graph.outputs if v.dtype and not v.dtype.is_floating_point()]
    if discrete:
        Shapes(model)  # states the dtypes that the file leaves out
    for output in discrete:
        names = _floats_behind(output)
        if names:
            found[output.name or ""] = names
    return found


def _floats_behind(output: ir.Value) -> tuple[str, ...]:
    queue, seen = [output], {output}
    names: list[str] = []
    for value in queue:
        node = value.producer()
        if node is None or node.op_type == "Constant" or len(seen) > _MAX_BEHIND:
            continue
        if value is not output and value.dtype is not None and value.dtype.is_floating_point():
            if value.name and value.graph is output.graph:
                names.append(value.name)
            continue
        if node.op_type in _SHAPE_ONLY:
            continue
        more = [v for v in scopes.dependencies(node) if v not in seen]
        seen.update(more)
        queue += more
    return tuple(names[:_MAX_HIDDEN])


_MAX_BEHIND, _MAX_HIDDEN = 64, 8


def random_outputs(model: ir.Model) -> dict[str, str]:
    """Outputs that depend on random operators, and on which one: no two runs need give the same.

    A seed does not help: ONNX Runtime continues a seeded stream from run to run. What a value shares with a
    random one is only passed on where its elements matter: the shape of a random tensor is not random.
    """
    random = {node: operators.describe(node) for node in _random_nodes(model)}
    tainted: dict[ir.Value, str] = {}
    for node in model.graph:
        causes = [random[node]] if node in random else []
        sources = () if node.op_type in _SHAPE_ONLY else scopes.dependencies(node)
        causes += [tainted[value] for value in sources if value in tainted]
        if causes:
            tainted.update((output, causes[0]) for output in node.outputs)
    return {value.name or "": tainted[value] for value in model.graph.outputs if value in tainted}


def arithmetic_depth(model: ir.Model) -> int:
    """The most rounding operators on a path to an output; a subgraph or function counts as its nodes."""
    sizes = {
        identifier: _rounding_nodes(function) for identifier, function in model.functions.items()
    }
    depth: dict[ir.Value, int] = {}
    for node in model.graph:
        before = max((depth.get(value, 0) for value in scopes.dependencies(node)), default=0)
        weight = sizes.get(node.op_identifier(), 0 if node.op_type in _MOVERS else 1)
        weight += sum(_rounding_nodes(graph) for graph in operators.subgraphs(node))
        depth.update((output, before + weight) for output in node.outputs)
    return max((depth.get(value, 0) for value in model.graph.outputs), default=0)


def narrowest_float(model: ir.Model) -> ir.DataType:
    """bfloat16 or float16 where the model computes in them, else float32.

    Read from what the file states: inputs, initializers, value infos and casts.
    """
    found = set(_stated_dtypes(model))
    for dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16):
        if dtype in found:
            return dtype
    return ir.DataType.FLOAT


def _random_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes of the main graph that draw random numbers, themselves or in what they hold or call."""
    opsets = {id(scope.graph): scope.opsets for scope in scopes.all_graphs(model)}
    random_functions: set[ir.OperatorIdentifier] = set()

    def draws(node: ir.Node) -> bool:
        graph = node.graph
        imports = opsets.get(id(graph), model.opset_imports)
        return node.op_identifier() in random_functions or _is_random(node, imports)

    # Functions may call one another in any order: each round finds callers of what was found before.
    for _ in range(len(model.functions)):
        for identifier, function in model.functions.items():
            if any(draws(node) for node in scopes.all_nodes(function.graph)):
                random_functions.add(identifier)
    return [node for node in model.graph if draws(node) or any(map(draws, _held(node)))]


def _held(node: ir.Node) -> Iterable[ir.Node]:
    for graph in operators.subgraphs(node):
        yield from scopes.all_nodes(graph)


def _is_random(node: ir.Node, opsets: operators.Opsets) -> bool:
    if node.op_type in _RANDOM:
        return True
    if node.op_type not in _TRAINING_DROPOUTS:
        return False
    if not node.domain and (operators.opset(node, opsets) or 0) < 7:
        return not operators.attribute(node, "is_test", 0)
    # training_mode is the last of three inputs (Dropout-12) or of five (the fused ones), absent meaning false.
    position = 2 if node.op_type in {"Dropout", "BitmaskDropout"} else 4
    if len(node.inputs) <= position or node.inputs[position] is None:
        return False
    return values.scalar(node.inputs[position]) is None or bool(
        values.scalar(node.inputs[position])
    )


def _origin(output: ir.Value) -> OutputOrigin:
    value: ir.Value | None = output
    in_order = True  # ranks are compared place by place with what was ranked
    for _ in range(32):
        node = value.producer() if value is not None else None
        if node is None:
            break
        if node.op_type in {"ArgMax", "ArgMin"} or (
            node.op_type == "TopK" and node.outputs[1] is value
        ):
            return _ranked(output, node) if in_order else OutputOrigin()
        if node.op_type == "NonMaxSuppression":
            return OutputOrigin(Origin.BOXES)
        if node.op_type in _ROUNDING or _truncates(node):
            return OutputOrigin(Origin.ROUNDED)
        if node.op_type == "Sigmoid":
            return OutputOrigin(absolute=2.0**-22)
        in_order = in_order and node.op_type != "Transpose"
        value = node.inputs[0] if node.op_type in _TRANSPARENT else None
    return OutputOrigin()


def _ranked(output: ir.Value, node: ir.Node) -> OutputOrigin:
    scores = node.inputs[0]
    if scores is None or not scores.name or scores.graph is not output.graph:
        return OutputOrigin()
    default = -1 if node.op_type == "TopK" else 0
    return OutputOrigin(Origin.RANK, scores.name, operators.attribute(node, "axis", default))


def _truncates(node: ir.Node) -> bool:
    """Whether a Cast makes integers of floats."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type != "Cast" or source is None or source.dtype is None:
        return False
    target = ir.DataType(operators.attribute(node, "to", 0))
    return source.dtype.is_floating_point() and target.is_integer()


def _rounding_nodes(graph: ir.Graph | ir.Function) -> int:
    body = graph.graph if isinstance(graph, ir.Function) else graph
    return sum(node.op_type not in _MOVERS for node in scopes.all_nodes(body))


def _stated_dtypes(model: ir.Model) -> Iterable[ir.DataType]:
    for scope in scopes.all_graphs(model):
        known = (*scope.graph.inputs, *scope.graph.initializers.values(), *scope.graph.outputs)
        yield from (value.dtype for value in known if value.dtype is not None)
        for node in scope.graph:
            yield from (value.dtype for value in node.outputs if value.dtype is not None)
            if (
                node.op_type == "Cast"
                and "to" in node.attributes
                and not node.attributes["to"].is_ref()
            ):
                yield ir.DataType(node.attributes["to"].as_int())


def scale_floor(plain: object, made: OutputOrigin, profile: Profile) -> float:
    """The scale below which an output is noise: a thousandth of its RMS on plain inputs, or the kernel's own error.

    Args:
        plain: the output of the reference on the first, plain feed.
        made: how the output is made.
        profile: the gate.
    """
    is_float = isinstance(plain, np.ndarray) and metrics.is_float(plain.dtype)
    floor = metrics.root_mean_square(np.asarray(plain)) * FLOOR if is_float else 0.0
    if profile.numerics is Numerics.REORDERED:
        return max(floor, made.absolute / profile.tolerance)
    return floor
