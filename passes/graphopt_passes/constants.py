"""Reading and writing of constants that several families of rewrites share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import values
from graphopt.rewrite import Lit, Match, Op, Skip, Var, is_dead

Wide: TypeAlias = npt.NDArray[np.float64]

TIED_BYTES = 4096
"""A constant with other uses may be duplicated up to this size; beyond it, the file would grow noticeably."""


def live_uses(value: ir.Value) -> list[ir.Node]:
    """The nodes that use a value, without those that a rewrite left behind and that wait for removal."""
    return [use.node for use in value.uses() if not is_dead(use.node)]


def is_tied(value: ir.Value) -> bool:
    """Whether a constant is large and used more than once: a changed copy would stand beside the original."""
    tensor = values.constant(value)
    if tensor is None or values.size_bytes(tensor) <= TIED_BYTES:
        return False  # before the uses are counted: a scalar that every layer reads has as many as there are layers
    return value.is_graph_output() or len(live_uses(value)) > 1


def refuse_tied(value: ir.Value) -> None:
    """Declines to change a large constant that has other uses.

    Raises:
        Skip: the constant is tied.
    """
    if is_tied(value):
        uses = len(live_uses(value))
        raise Skip(f"weight {value.name!r} has {uses} uses: folding would store it twice", value)


def feeds_products_only(value: ir.Value) -> bool:
    """Whether every use of a value is a product with a constant matrix of its own, where arithmetic can go."""
    users = live_uses(value)
    return not value.is_graph_output() and all(
        user.op_type in ("MatMul", "Gemm")
        and user.inputs[0] is value
        and (matrix := values.constant(user.inputs[1])) is not None
        and len(matrix.shape) == 2
        and user.inputs[1] is not None
        and not is_tied(user.inputs[1])
        for user in users
    )


def narrow(
    wide: Wide, dtype: ir.DataType | None, culprit: ir.Value | None = None
) -> npt.NDArray[Any]:
    """`wide` in the element type `dtype`.

    Raises:
        Skip: the type is unknown, or an element is not finite in it.
    """
    if dtype is None:
        raise Skip("unknown element type", culprit)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = wide.astype(dtype.numpy())
        finite = np.isfinite(stored.astype(np.float64)).all()
    if not finite:
        raise Skip(f"the folded constant is not finite in {dtype}", culprit)
    return stored


def along(data: npt.NDArray[Any], rank: int, axis: int, size: int) -> Wide | None:
    """`data`, as it broadcasts against a tensor of `rank`, as one number per index of `axis`: [size].

    None where it varies along another axis too, or where broadcasting would enlarge the tensor.
    """
    if data.ndim > rank:
        return None
    dims = (1,) * (rank - data.ndim) + data.shape
    axis %= rank
    if any(d != 1 for i, d in enumerate(dims) if i != axis) or dims[axis] not in (1, size):
        return None
    return np.broadcast_to(data.reshape(-1).astype(np.float64), (size,))


def on_axis(data: Wide, rank: int, axis: int) -> Wide:
    """A vector as a tensor of `rank` that varies along `axis` only."""
    return data.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def trailing(data: npt.NDArray[Any], rank: int, dims: Sequence[int]) -> npt.NDArray[Any] | None:
    """`data`, as it broadcasts against a tensor of `rank` that ends in `dims`, as a tensor of shape `dims`.

    None where it varies along an axis before those, or where broadcasting would enlarge the tensor.
    """
    if data.ndim > rank:
        return None
    padded = (1,) * (rank - data.ndim) + data.shape
    lead, tail = padded[: rank - len(dims)], padded[rank - len(dims) :]
    if any(d != 1 for d in lead) or any(a not in (1, b) for a, b in zip(tail, dims, strict=True)):
        return None
    return np.broadcast_to(data.reshape(tail), tuple(dims))


def keeps_dims(m: Match, value: Var, const: Var | Lit, result: Op) -> bool:
    """Whether broadcasting `value` against the constant `const`, which gives `result`, leaves its shape as it is."""
    tensor = values.constant(m[const])
    dims = m.dims(value)
    if tensor is not None and all(size == 1 for size in tensor.shape.numpy()):
        rank = len(tensor.shape)
        return rank == 0 or (dims is not None and rank <= len(dims))
    return dims is not None and dims == m.dims(result)


def given_axes(m: Match, node: ir.Node, since: int) -> tuple[int, ...] | None:
    """The axes of a node as they are written: an attribute before opset `since`, input 1 from it on; None if absent.

    Raises:
        Skip: the axes are computed at run time.
    """
    if m.opset() < since:
        held = m.attr(node, "axes")
        return None if held is None else tuple(held)
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None:
        return None
    data = values.array(value)
    if data is None:
        raise Skip("axes are computed at run time", value)
    return tuple(int(axis) for axis in data.reshape(-1))


def from_front(axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Axes counted from the front, in ascending order."""
    return tuple(sorted(axis % rank for axis in axes))


def no_operator(m: Match, op_type: str, dtype: ir.DataType | None) -> str:
    """Why a rule may not put `op_type` for `dtype`: the opset is too old for it, or the target gains nothing by it."""
    target, opset = m.facts.target, m.opset()
    later = [
        each.since
        for each in target.fused
        if each.op_type == op_type
        and each.since > opset
        and not each.domain
        and (dtype is None or dtype.name in each.dtypes)
    ]
    if later:
        return f"{op_type} needs opset {min(later)}, the model imports {opset} (see lift-opset)"
    return f"the target has no {op_type} for {dtype} that pays"
