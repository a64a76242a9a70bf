"""Operators that move elements, and those that make shapes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional

from graphopt.distill.operators.call import Call, Operator, Tensor
from graphopt.distill.operators.elementwise import tensor_of


def _numbers(tensor: Tensor) -> list[int]:
    return [int(each) for each in tensor.reshape(-1).tolist()]


def _reshape(call: Call) -> Tensor:
    wanted = call.ints(1, "shape") or []
    if not call.get("allowzero", 0):
        wanted = [call.x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return call.x.reshape(wanted)


def _flatten(call: Call) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + call.x.dim() if axis < 0 else axis
    rows = int(np.prod(call.x.shape[:axis]))
    return call.x.reshape(rows, -1)


def _squeeze(call: Call) -> Tensor:
    axes = call.ints(1, "axes")
    if axes is None:
        return call.x.squeeze()
    return call.x.squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    axes = call.ints(1, "axes") or []
    rank = call.x.dim() + len(axes)
    x = call.x
    for axis in sorted(each % rank for each in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call) -> Tensor:
    return call.x.permute(call.get("perm") or tuple(reversed(range(call.x.dim()))))


def _split(call: Call) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    sizes = call.ints(1, "split")
    if sizes is None:
        total, parts = call.x.shape[axis], call.get("num_outputs", call.outputs)
        chunk = -(-total // parts)
        sizes = [min(chunk, total - i * chunk) for i in range(parts)]
    return tuple(torch.split(call.x, sizes, dim=axis))


def _slice(call: Call) -> Tensor:
    starts, ends = call.ints(1, "starts") or [], call.ints(2, "ends") or []
    axes = call.ints(3, "axes") or list(range(len(starts)))
    steps = call.ints(4, "steps") or [1] * len(starts)
    x = call.x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        if step < 0 and end < -x.shape[axis]:
            places = range(*slice(start, None, step).indices(x.shape[axis]))
        x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x


def _gather(call: Call) -> Tensor:
    axis = call.get("axis", 0) % call.x.dim()
    indices = call.inputs[1]
    assert indices is not None
    extent = call.x.shape[axis]
    flat = torch.where(indices < 0, indices + extent, indices).reshape(-1).long()
    rows = call.x.index_select(axis, flat)
    return rows.reshape((*call.x.shape[:axis], *indices.shape, *call.x.shape[axis + 1 :]))


def _gather_elements(call: Call) -> Tensor:
    axis, indices = call.get("axis", 0), call.inputs[1]
    assert indices is not None
    return torch.gather(
        call.x, axis, torch.where(indices < 0, indices + call.x.shape[axis], indices)
    )


def _gather_nd(call: Call) -> Tensor:
    if call.get("batch_dims", 0):
        raise NotImplementedError("batch_dims")
    indices = call.inputs[1]
    assert indices is not None
    return call.x[tuple(indices.long().unbind(-1))]


def _scatter_nd(call: Call) -> Tensor:
    if call.get("reduction", "none") != "none":
        raise NotImplementedError("reduction")
    indices, updates = call.inputs[1], call.inputs[2]
    assert indices is not None
    return call.x.index_put(tuple(indices.long().unbind(-1)), updates)


def _scatter_elements(call: Call) -> Tensor:
    if call.get("reduction", "none") != "none":
        raise NotImplementedError("reduction")
    axis, indices = call.get("axis", 0), call.inputs[1]
    assert indices is not None
    places = torch.where(indices < 0, indices + call.x.shape[axis], indices)
    return call.x.scatter(axis, places, call.inputs[2])


def _expand(call: Call) -> Tensor:
    assert call.inputs[1] is not None
    return call.x.expand(torch.broadcast_shapes(call.x.shape, _numbers(call.inputs[1])))


def _pad(call: Call) -> Tensor:
    stated = call.ints(1, "pads") or []
    mode = call.get("mode", "constant")
    rank = call.x.dim()
    axes = call.ints(3, "axes") or list(range(len(stated) // 2))
    pads = [(0, 0)] * rank
    for place, axis in enumerate(axes):
        pads[axis] = (stated[place], stated[place + len(axes)])
    fill = call.at(2) if call.opset >= 11 else call.get("value", 0.0)
    while mode != "constant" and rank > 2 and pads and pads[0] == (0, 0) and len(pads) > rank - 2:
        pads = pads[1:]
    flat = [side for pair in reversed(pads) for side in pair]
    if mode == "constant":
        return functional.pad(call.x, flat, value=0.0 if fill is None else float(fill))
    return functional.pad(call.x, flat, mode={"reflect": "reflect", "edge": "replicate"}[mode])


def _shape(call: Call) -> Tensor:
    return torch.tensor(list(call.x.shape)[call.get("start", 0) : call.get("end")])


def _constant(call: Call) -> Tensor:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in call.attributes:
            held = call.attributes[name]
            kind = np.float32 if "float" in name else np.int64
            return tensor_of(held if name == "value" else np.asarray(held, kind))
    raise NotImplementedError("strings and sparse values")


def _constant_of_shape(call: Call) -> Tensor:
    value = call.get("value", np.zeros(1, np.float32))
    return tensor_of(np.broadcast_to(value.reshape(()), _numbers(call.x)))


def _range(call: Call) -> Tensor:
    start, limit, delta = (each.item() for each in call.inputs if each is not None)
    return torch.arange(start, limit, delta, dtype=call.x.dtype)


def _trilu(call: Call) -> Tensor:
    k = call.at(1)
    by = 0 if k is None else int(k)
    return torch.triu(call.x, by) if call.get("upper", 1) else torch.tril(call.x, by)


def _cum_sum(call: Call) -> Tensor:
    axis = int(call.inputs[1])  # type: ignore[arg-type]
    x = call.x.flip(axis) if call.get("reverse", 0) else call.x
    total = torch.cumsum(x, axis)
    if call.get("exclusive", 0):
        total = total - x
    return total.flip(axis) if call.get("reverse", 0) else total


def _depth_to_space(call: Call) -> Tensor:
    block = call.attributes["blocksize"]
    n, c, h, w = call.x.shape
    inner = c // block**2
    if call.get("mode", "DCR") == "DCR":
        x = call.x.reshape(n, block, block, inner, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = call.x.reshape(n, inner, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, inner, h * block, w * block)


def _space_to_depth(call: Call) -> Tensor:
    block = call.attributes["blocksize"]
    n, c, h, w = call.x.shape
    x = call.x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


def _resize(call: Call) -> Tensor:
    """Nearest by whole factors and linear on pixel centres: what networks use; others are refused."""
    given = [call.at(i) for i in (2, 3)] if call.opset >= 11 else [call.at(1), None]
    scales, sizes = given
    before = list(call.x.shape)
    if sizes is not None:
        after = _numbers(sizes)
    elif scales is not None:
        after = [int(np.floor(n * s)) for n, s in zip(before, scales.tolist(), strict=True)]
    else:
        raise NotImplementedError("neither scales nor sizes")
    if before[:2] != after[:2]:
        raise NotImplementedError("batch or channels resized")
    mode = call.get("mode", "nearest")
    whole = all(new % old == 0 for old, new in zip(before, after, strict=True))
    if mode == "nearest" and whole:
        return functional.interpolate(call.x, size=after[2:], mode="nearest")
    pixel = call.get("coordinate_transformation_mode", "half_pixel") in (
        "half_pixel",
        "pytorch_half_pixel",
    )
    if mode == "linear" and len(before) == 4 and pixel:
        return functional.interpolate(call.x, size=after[2:], mode="bilinear", align_corners=False)
    raise NotImplementedError(f"mode {mode}")


def _one_hot(call: Call) -> Tensor:
    depth, both = int(call.inputs[1]), call.inputs[2]  # type: ignore[arg-type]
    assert both is not None
    chosen = functional.one_hot(call.x.long() % depth, depth).bool()
    axis = call.get("axis", -1)
    made = torch.where(chosen, both[1], both[0])
    return made if axis in (-1, call.x.dim()) else made.movedim(-1, axis)


OPERATORS: Mapping[str, Operator] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": lambda call: torch.cat(call.inputs, dim=call.attributes["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "Expand": _expand,
    "Tile": lambda call: call.x.repeat(_numbers(call.inputs[1])),
    "Pad": _pad,
    "Shape": _shape,
    "Size": lambda call: torch.tensor(call.x.numel()),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Trilu": _trilu,
    "CumSum": _cum_sum,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
    "Upsample": _resize,
    "OneHot": _one_hot,
}
