"""Removes classes of channels from a model: slices of weights, group counts, and the sizes that constants state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Names
from graphopt.ir.sparse import thin
from graphopt_passes.prune.book import Ids
from graphopt_passes.prune.labels import Labels
from graphopt_passes.prune.parts import slice_bounds, split_sizes

Keep = Mapping[str, Mapping[int, Ids]]
"""Which indices stay, by name of the weight and axis; what is not named stays whole."""


def kept_indices(labels: Labels, dropped: frozenset[int]) -> dict[str, dict[int, Ids]]:
    """What stays of every value when classes are dropped, weights and activations alike."""
    gone = np.fromiter(dropped, np.int64, len(dropped))
    found: dict[str, dict[int, Ids]] = {}
    for value, axes in labels.axes.items():
        for axis in range(len(axes)):
            classes = labels.classes(value, axis)
            if classes is None or not value.name:
                continue
            stay = ~np.isin(classes, gone)
            if not stay.all():
                found.setdefault(value.name, {})[axis] = np.flatnonzero(stay)
    return found


def slim(model: ir.Model, keep: Keep, names: Names) -> None:
    """Cuts the main graph of `model` down to what stays, in place.

    `keep` comes from `kept_indices` of this model or of one that it is a clone of.  Shapes of values follow.
    """
    for name, value in tuple(model.graph.initializers.items()):
        if name in keep and value.const_value is not None:
            _cut(value, keep[name])
    for node in model.graph:
        change = _CHANGES.get(node.op_type)
        if change is not None and not node.domain:
            change(node, keep, names)
    for node in model.graph:
        for output in node.outputs:
            if output.name and output.name in keep:
                _reshape(output, keep[output.name])


def _cut(value: ir.Value, axes: Mapping[int, Ids]) -> None:
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy()
    for axis, stay in axes.items():
        array = np.take(array, stay, axis=axis)
    value.const_value = thin(np.ascontiguousarray(array), tensor.dtype, value.name)
    value.shape = ir.Shape(array.shape)


def _regroup(node: ir.Node, keep: Keep, _names: Names) -> None:
    """A depthwise convolution has as many groups as channels are left; others keep their groups, which get narrower."""
    group = node.attributes.get("group")
    source, kernel = node.inputs[0], node.inputs[1]
    weight = values.constant(kernel)
    if group is None or group.as_int() == 1 or weight is None or kernel is None or source is None:
        return
    if 1 in keep.get(kernel.name or "", {}) or weight.shape.numpy()[1] != 1:
        return
    left = keep.get(source.name or "", {}).get(1)
    if left is not None:
        node.attributes["group"] = ir.AttrInt64("group", len(left))


def _recount(node: ir.Node, keep: Keep, _names: Names) -> None:
    """Attention on unsplit heads states how many there are."""
    query, count = node.inputs[0], node.attributes.get("q_num_heads")
    cut = {} if query is None else keep.get(query.name or "", {})
    if count is None or 2 not in cut or query is None or query.shape is None:
        return
    # Values still have the extent that they had before the cut.
    width = query.shape[2]
    assert isinstance(width, int)
    left = len(cut[2]) * count.as_int() // width
    for name in ("q_num_heads", "kv_num_heads"):
        node.attributes[name] = ir.AttrInt64(name, left)


def _restate(node: ir.Node, keep: Keep, names: Names) -> None:
    """The target of a Reshape or Expand, where it states the extent of an axis that was cut."""
    cut = keep.get(node.outputs[0].name or "")
    stated = values.array(node.inputs[1])
    if not cut or stated is None:
        return
    least, lead = 0, 0
    if node.op_type == "Expand":  # 1 leaves the axis as it is, and leading axes may be left out
        shape = node.outputs[0].shape
        assert shape is not None
        least, lead = 1, len(shape) - len(stated)
    sizes = [
        len(cut[lead + axis]) if lead + axis in cut and size > least else int(size)
        for axis, size in enumerate(stated.tolist())
    ]
    _state(node, 1, sizes, names)


def _resplit(node: ir.Node, keep: Keep, names: Names) -> None:
    """The sizes of a Split, which are no longer equal."""
    shape = node.outputs[0].shape
    sizes = None if shape is None else split_sizes(node, keep, len(shape))
    if sizes is None:
        return
    graph = node.graph
    assert graph is not None
    if "split" in node.attributes or (
        len(node.inputs) == 1 and graph.opset_imports.get("", 1) < 13
    ):
        node.attributes["split"] = ir.AttrInt64s("split", sizes)
        return
    node.attributes.pop("num_outputs", None)
    _state(node, 1, sizes, names)


def _reslice(node: ir.Node, keep: Keep, names: Names) -> None:
    """Where a Slice begins and ends."""
    bounds = slice_bounds(node, keep)
    if bounds is None:
        return
    for index, (name, numbers) in enumerate(zip(("starts", "ends"), bounds, strict=True), 1):
        if name in node.attributes:  # up to opset 9
            node.attributes[name] = ir.AttrInt64s(name, numbers)
        else:
            _state(node, index, numbers, names)


def _state(node: ir.Node, index: int, numbers: Sequence[int], names: Names) -> None:
    """Gives a node other whole numbers as an input."""
    old = node.inputs[index] if len(node.inputs) > index else None
    graph = node.graph
    assert graph is not None
    name = names.fresh(f"{old.name if old is not None else node.outputs[0].name}_slim")
    tensor = ir.Tensor(np.asarray(numbers, np.int64), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=tensor,
    )
    graph.register_initializer(value)
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if old is not None and not old.uses() and old.is_initializer() and not old.is_graph_output():
        del graph.initializers[old.name or ""]


def _reshape(value: ir.Value, axes: Mapping[int, Ids]) -> None:
    if value.shape is None:
        return
    dims: Sequence[int | ir.SymbolicDim] = [
        len(axes[axis]) if axis in axes else dim for axis, dim in enumerate(value.shape)
    ]
    value.shape = ir.Shape(dims)


_CHANGES: Mapping[str, Callable[[ir.Node, Keep, Names], None]] = {
    "Conv": _regroup,
    "Reshape": _restate,
    "Expand": _restate,
    "Attention": _recount,
    "Split": _resplit,
    "Slice": _reslice,
}
