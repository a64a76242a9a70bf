"""Operators that the standard defines by a function, written as that function where the target refuses them.

    Before:  y = NegativeLogLikelihoodLoss(x, t)
    After:   y = ReduceMean(Squeeze(Neg(GatherElements(x, Unsqueeze(t)))))

A body is put in only where the target takes all of it.  Changes numerics: reordered.
Source: the function bodies in onnx's schemas.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.emit.bodies import expanded
from graphopt.emit.legality import check_legality
from graphopt.ir import operators, values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, rule
from graphopt_passes.refusals import refused, site_of

DEFINED = (
    "Attention|Bernoulli|CastLike|Celu|CenterCropPad|Clip|DynamicQuantizeLinear|Elu|Gelu|GreaterOrEqual|"
    "GroupNormalization|HardSigmoid|HardSwish|LayerNormalization|LeakyRelu|LessOrEqual|LogSoftmax|"
    "MeanVarianceNormalization|Mish|NegativeLogLikelihoodLoss|PRelu|RMSNormalization|ReduceL1|ReduceL2|ReduceLogSum|"
    "ReduceLogSumExp|ReduceSumSquare|RotaryEmbedding|Selu|Shrink|Softmax|SoftmaxCrossEntropyLoss|Softplus|Softsign|"
    "Swish|ThresholdedRelu"
)
"""Operators with a function that holds no graphs."""

LOWERED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Equal", "TopK", "NegativeLogLikelihoodLoss"}
)
"""Operators that other rules write otherwise where they are refused: a body may hold them."""

SMALL = 1 << 12
"""Elements of an operand that the judgement of a body may read."""

root = Op(DEFINED, ...)


@rule(root)
def expand_function(m: Match, g: Builder) -> tuple[ir.Value | None, ...] | None:
    """f(x, …) -> the body of the function that defines f.

    Source: onnx.defs, function bodies.
    """
    node = m[root]
    if not refused(m, root):
        return None
    body = expanded(site_of(m, node), whole=False)
    if body is None:
        raise Skip(
            "the target refuses it, and types are missing to build the body of its function", node
        )
    if body.opset_imports.get("") != m.opset():
        raise Skip(f"its function is of opset {body.opset_imports.get('')}", node)
    given = _operands(m, node)
    _fix(body, given)
    left = [
        f for f in check_legality(body, m.facts.target).refused if f.op not in LOWERED and f.node
    ]
    if left:
        raise Skip(f"the body of its function is refused too: {left[0].reason}", node)
    return _copied(body, node, given, g)


def _operands(m: Match, node: ir.Node) -> dict[str | None, ir.Value]:
    """The node's operands as its body calls them: by their names, or by the schema's where some are left out."""
    if all(v is not None for v in node.inputs):
        return {v.name: v for v in node.inputs if v is not None}
    schema = operators.find_schema(node.op_type, m.opset(), "")
    formals = [] if schema is None else [formal.name for formal in schema.inputs]
    pairs = zip(formals, node.inputs, strict=False)
    return {name: value for name, value in pairs if value is not None}


def _fix(body: ir.Model, given: dict[str | None, ir.Value]) -> None:
    """Makes the small constants among the body's inputs constants there, as rules ask for them."""
    for value in list(body.graph.inputs):
        tensor = values.constant(given.get(value.name))
        if tensor is not None and tensor.size <= SMALL:
            body.graph.inputs.remove(value)
            value.const_value = tensor
            body.graph.register_initializer(value)


def _copied(
    body: ir.Model, node: ir.Node, given: dict[str | None, ir.Value], g: Builder
) -> tuple[ir.Value | None, ...]:
    """The body's nodes on the tape, and what stands for each output of the node."""
    held: dict[ir.Value, ir.Value] = {}
    for value in (*body.graph.inputs, *body.graph.initializers.values()):
        outer = given.get(value.name)
        if outer is not None:
            held[value] = outer
        elif value.const_value is not None:
            held[value] = g.const(value.const_value)
    for inner in body.graph:
        if operators.has_subgraph(inner):
            raise Skip(f"the body of its function holds graphs ({inner.op_type})", node)
        if inner.op_type == "Constant":
            tensor = values.constant(inner.outputs[0])
            if tensor is None:
                raise Skip("the body of its function holds a Constant that is no tensor", node)
            held[inner.outputs[0]] = g.const(tensor)
            continue
        ins = [None if v is None else held[v] for v in inner.inputs]
        made = g.ops(inner.op_type, *ins, outputs=len(inner.outputs), like=inner)
        held.update(zip(inner.outputs, made, strict=True))
    named = {value.name: held[value] for value in body.graph.outputs}
    # A body names its outputs as the node does, or in the same order where onnx instantiates it.
    in_order = list(named.values())
    found = []
    for index, out in enumerate(node.outputs):
        by_place = in_order[index] if index < len(in_order) and out.name else None
        found.append(named.get(out.name, by_place) if out.name else None)
    return tuple(found)


RULES: tuple[Rule, ...] = (expand_function,)
