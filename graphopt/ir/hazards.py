"""What a run may not come back from: integer divisions that end the process, loops that never end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, scopes, values

Known: TypeAlias = Callable[[ir.Value], ir.TensorProtocol | None]

_DIVISIONS = frozenset({"Div", "Mod"})
_TRAPPING = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_MANY_TURNS = 1 << 20
_UNSIGNED = frozenset({ir.DataType.UINT32, ir.DataType.UINT64})


def fatal_division(node: ir.Node, known: Known) -> str:
    """Why a node, or one within it, may end the process when it runs; "" where it cannot.

    The least number of 32 or 64 bits has no quotient by -1: the processor traps (ONNX Runtime 1.31 on x86-64, Div and
    Mod).  Division by zero is an error there, and a trap in runtimes that do not look first.

    Args:
        node: a node, with the graphs that it holds.
        known: the tensor that a value is known to hold, or None; what nobody knows may be anything.
    """
    for each in (
        node,
        *(n for graph in operators.subgraphs(node) for n in scopes.all_nodes(graph)),
    ):
        if each.op_type in _DIVISIONS and not each.domain and (reason := _reason(each, known)):
            return reason
    return ""


def fatal_constants(model: ir.Model) -> str:
    """Why a model ends the process whatever it is fed: a division of constants, named; "" where there is none."""
    for scope in scopes.all_graphs(model):
        for node in scope.graph:
            if node.op_type not in _DIVISIONS or node.domain or len(node.inputs) != 2:
                continue
            if any(values.constant(value) is None for value in node.inputs):
                continue
            if reason := _reason(node, values.constant):
                return f"{operators.describe(node)}: {reason}"
    return ""


def _reason(node: ir.Node, known: Known) -> str:
    left, right = (_array(value, known) for value in node.inputs[:2])
    dtype = _dtype(node, known)
    if dtype is not None and dtype not in _TRAPPING | _UNSIGNED:
        return ""
    if right is None:
        return "the divisor of its integer division is not known beforehand"
    if (right == 0).any():
        return "divides integers by zero"
    if dtype in _UNSIGNED or not (right == -1).any():
        return ""
    if left is None or (left == np.iinfo(left.dtype).min).any():
        return "divides the least integer by -1, which has no result"
    return ""


def _dtype(node: ir.Node, known: Known) -> ir.DataType | None:
    for value in node.inputs[:2]:
        if value is None:
            continue
        tensor = known(value)
        found = value.dtype if tensor is None else tensor.dtype
        if found is not None:
            return found
    return None


def _array(value: ir.Value | None, known: Known) -> np.ndarray[Any, Any] | None:
    tensor = None if value is None else known(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def may_not_end(nodes: Iterable[ir.Node]) -> bool:
    """Whether a node, or one within it, is a `Loop` of which nobody knows beforehand that it makes few turns."""
    for node in nodes:
        for each in (node, *(n for g in operators.subgraphs(node) for n in scopes.all_nodes(g))):
            if each.op_type == "Loop" and not each.domain:
                turns = values.scalar(each.inputs[0])
                if turns is None or int(turns) > _MANY_TURNS:
                    return True
    return False


def holds_endless(model: ir.Model) -> bool:
    """Whether a model, with its functions, holds a `Loop` that may not end."""
    return any(may_not_end(scope.graph) for scope in scopes.all_graphs(model))


@contextlib.contextmanager
def stopped_after(seconds: float | None) -> Iterator[Any]:
    """Run options of ONNX Runtime under which a run ends with an error after so many seconds; None waits for ever."""
    if seconds is None:
        yield None
        return
    import onnxruntime  # noqa: PLC0415  imported when something is run, not before

    options = onnxruntime.RunOptions()
    timer = threading.Timer(seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()
