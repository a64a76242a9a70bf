"""Replacing a value by another where no pattern is involved: what inlining, merging and the like have in common."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Constant
from graphopt.rewrite.commit import ORIGIN_KEY, RULE_KEY, take_over
from graphopt.rewrite.context import Context, name_of


def can_take_over(old: ir.Value, new: ir.Value, graph: ir.Graph) -> bool:
    """Whether `new` can stand for `old`, a value of `graph`, without a node in between.

    A graph output needs a producer of its own in its graph, because it brings its name along.
    """
    if not old.is_graph_output():
        return True
    producer = new.producer()
    return producer is not None and producer.graph is graph and not new.is_graph_output()


def substitute(
    old: ir.Value, new: ir.Value, before: ir.Node, rule: str, ctx: Context
) -> ir.Node | None:
    """Puts `new` where `old` was, in every graph, graph outputs included; returns the `Identity` it took, or None.

    A graph output keeps its name: `new` takes it over, or an `Identity` of `new` does, inserted ahead of `before`.
    """
    graph = before.graph
    assert graph is not None
    if can_take_over(old, new, graph):
        name = old.name
        take_over(old, new, fresh=False)
        ctx.replaced(name, new.name)
        return None
    node = ir.Node("", "Identity", [new], name=ctx.names.fresh(f"{name_of(old)}_Identity"))
    mark(node, rule, name_of(old), ctx)
    graph.insert_before(before, node)
    take_over(old, node.outputs[0], fresh=True)
    return node


def mark(node: ir.Node, rule: str, origin: str, ctx: Context) -> None:
    """Writes on a node which rule of the running pass made it, and from what; what it says already stays."""
    node.metadata_props.setdefault(RULE_KEY, f"{ctx.pass_name}/{rule}")
    node.metadata_props.setdefault(ORIGIN_KEY, origin)


def place_constant(
    tensor: Constant, name: str, before: ir.Node, *, as_node: bool, ctx: Context
) -> ir.Value:
    """A new constant of the graph of `before`: an initializer, or the output of a `Constant` node ahead of it.

    Args:
        tensor: the elements.
        name: its name; the caller has made it unique.
        before: a node of the graph, which comes after the constant.
        as_node: whether only a node will do: in a function body, or where a graph output needs a producer.
        ctx: the run, for fresh names.
    """
    graph = before.graph
    assert graph is not None
    held = ir.Tensor(np.asarray(tensor)) if isinstance(tensor, (np.ndarray, np.generic)) else tensor
    kind, shape = ir.TensorType(held.dtype), ir.Shape(held.shape.numpy())
    if not as_node:
        value = ir.Value(name=name, type=kind, shape=shape, const_value=held)
        graph.register_initializer(value)
        return value
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", held)])
    node.name = ctx.names.fresh(f"{name}_Constant")
    value = node.outputs[0]
    value.name, value.type, value.shape = name, kind, shape
    graph.insert_before(before, node)
    return value
