"""Whether inference can tell two nodes apart."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeAlias

import onnx_ir as ir

from graphopt.ir.shapes.facts import INTEGRAL, Facts, tensor_type

Likeness: TypeAlias = Hashable
Inputs: TypeAlias = tuple[Facts | None, ...]

_EXACT = frozenset(
    {
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)
"""Kinds of attributes of which equal ones are the same: 0.0 equals -0.0, and tensors are compared by nobody."""


def likeness_of(
    node: ir.Node, version: int, inputs: Inputs, *, reads_dims: bool
) -> Likeness | None:
    """What nodes have in common for which every rule of inference finds the same; None where that cannot be said.

    Operator, opset, number of outputs, attributes, and everything known of the inputs: all that a rule is given.

    Args:
        node: an operator; no call of a function, whose body counts as well.
        version: the opset at which its domain is imported.
        inputs: what is known of its inputs.
        reads_dims: whether the operator computes element by element: then elements do not matter while some input's
            are not known.
    """
    attributes: list[Hashable] = []
    for held in (
        node.attributes.data.values()
    ):  # the dictionary within: a walk over its view takes as long as the rest
        if held.type not in _EXACT or held.ref_attr_name is not None:
            return None
        attributes += (held.name, held.type, held.value)
    blind = reads_dims and any(each is not None and each.data is None for each in inputs)
    given = _given(inputs, blind=blind)
    if given is None:
        return None
    return node.op_type, node.domain, version, len(node.outputs), tuple(attributes), given


def _given(inputs: Iterable[Facts | None], *, blind: bool) -> tuple[Hashable, ...] | None:
    given: list[Hashable] = []
    for each in inputs:
        if each is None:
            given.append(None)
            continue
        kind, dims, data = each
        dtype = None if kind is None else kind.dtype
        if dtype is not None and kind is not tensor_type(
            dtype
        ):  # a sequence, or a type with a denotation
            return None
        if blind:
            data = None
        elif data is not None and data.dtype not in INTEGRAL:
            return None
        given += (dtype, dims, data)
    return tuple(given)
