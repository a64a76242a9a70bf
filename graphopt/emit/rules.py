"""The conditions that operator tables state, one function each: what is wrong with a node, or None."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.emit.sites import Site
from graphopt.ir import operators, values
from graphopt.targets.operators import Rule

Check: TypeAlias = Callable[[Site, Rule], str | None]
Array: TypeAlias = "np.ndarray[Any, Any]"

MAX_READ_ELEMENTS = 1 << 22
"""Of a scale or zero point: beyond, it is a weight, which is not read for a question."""


def broken(site: Site, rule: Rule) -> str | None:
    """What the node has against `rule`, in words with the values seen; None where the rule holds.

    Raises:
        KeyError: a rule of a kind that nobody knows: a fault of the table.
    """
    if rule.when is not None and _text(site.attribute(rule.when[0])) != rule.when[1]:
        return None
    if rule.input is not None and site.input(rule.input) is None:
        return None  # what is absent and required, the schema refuses
    if rule.dtypes and site.dtype(0) not in rule.dtypes:
        return None
    if rule.fixed and not site.is_foldable(site.input(rule.input or 0)):
        return None
    return CHECKS[rule.check](site, rule)


def _attr_in(site: Site, rule: Rule) -> str | None:
    seen = _text(site.attribute(rule.attr))
    if seen in rule.values or seen is None:
        return None
    return f"{rule.attr} = {seen!r}, allowed: {_list(rule.values)}"


def _attr_all(site: Site, rule: Rule) -> str | None:
    seen = site.attribute(rule.attr)
    if not isinstance(seen, tuple | list) or all(each == rule.values[0] for each in seen):
        return None
    return f"{rule.attr} = {list(seen)}, all must be {rule.values[0]}"


def _attr_min(site: Site, rule: Rule) -> str | None:
    seen = site.attribute(rule.attr)
    if not isinstance(seen, int | float) or seen >= rule.values[0]:
        return None
    return f"{rule.attr} = {seen}, at least {rule.values[0]}"


def _attr_matches(site: Site, rule: Rule) -> str | None:
    seen = _text(site.attribute(rule.attr))
    if not isinstance(seen, str) or re.fullmatch(rule.values[0], seen):
        return None
    return f"{rule.attr} = {seen!r} does not match {rule.values[0]}"


def _attr_absent(site: Site, rule: Rule) -> str | None:
    held = site.node.attributes.get(rule.attr)
    return None if held is None else f"attribute {rule.attr} is there"


def _attr_halves(site: Site, rule: Rule) -> str | None:
    seen = site.attribute(rule.attr)
    half = int(rule.values[0])
    if not isinstance(seen, tuple | list) or list(seen[:half]) == list(seen[half:]):
        return None
    return f"{rule.attr} = {list(seen)}: forward and reverse differ"


def _inputs_at_most(site: Site, rule: Rule) -> str | None:
    extra = [v for v in site.node.inputs[rule.values[0] :] if v is not None]
    return f"{rule.values[0] + len(extra)} inputs, at most {rule.values[0]}" if extra else None


def _outputs_at_most(site: Site, rule: Rule) -> str | None:
    extra = [v for v in site.node.outputs[rule.values[0] :] if v.name]
    return f"output {extra[0].name!r}, at most {rule.values[0]} outputs" if extra else None


def _dtype_in(site: Site, rule: Rule) -> str | None:
    seen = site.dtype(rule.input or 0)
    if seen is None or seen in rule.values or (seen == "DOUBLE" and "FLOAT" in rule.values):
        return None
    return f"input {rule.input} is {seen}, allowed: {_list(rule.values)}"


def _dtype_not_in(site: Site, rule: Rule) -> str | None:
    seen = site.dtype(rule.input or 0)
    return f"input {rule.input} is {seen}" if seen in rule.values else None


def _same_dtypes(site: Site, rule: Rule) -> str | None:
    del rule
    seen = {site.dtype(index) for index in range(len(site.node.inputs))} - {None}
    return f"inputs are of types {_list(sorted(map(str, seen)))}" if len(seen) > 1 else None


def _rank_in(site: Site, rule: Rule) -> str | None:
    seen = site.rank(rule.input or 0)
    if seen is None or seen in rule.values:
        return None
    return f"input {rule.input} has rank {seen}, allowed: {_list(rule.values)}"


def _rank_from(site: Site, rule: Rule) -> str | None:
    seen = site.rank(rule.input or 0)
    return (
        f"input {rule.input} has rank {seen}"
        if seen is not None and seen < rule.values[0]
        else None
    )


def _rank_to(site: Site, rule: Rule) -> str | None:
    seen = site.rank(rule.input or 0)
    return (
        f"input {rule.input} has rank {seen}"
        if seen is not None and seen > rule.values[0]
        else None
    )


def _rank_pair_not(site: Site, rule: Rule) -> str | None:
    seen = [site.rank(0), site.rank(1)]
    return (
        f"ranks {seen[0]} and {seen[1]}" if seen in [list(pair) for pair in rule.values] else None
    )


def _static_shape(site: Site, rule: Rule) -> str | None:
    value = site.input(rule.input or 0)
    dims = None if value is None else site.shapes.dims(value)
    if dims is None or all(dim.is_static for dim in dims):
        return None
    return f"input {rule.input} has dynamic dimensions ({', '.join(map(str, dims))})"


def _constant(site: Site, rule: Rule) -> str | None:
    value = site.input(rule.input or 0)
    if site.is_foldable(value):
        return None
    return (
        f"input {rule.input} ({value.name if value else None!r}) is computed while the model runs"
    )


def _absent(site: Site, rule: Rule) -> str | None:
    value = site.input(rule.input or 0)
    return None if value is None else f"input {rule.input} ({value.name!r}) is given"


def _mask_fits(site: Site, rule: Rule) -> str | None:
    """An attention mask is as long as the keys, or broadcast."""
    mask, keys = site.static_dims(rule.input or 3), site.static_dims(1)
    if not mask or keys is None or len(keys) < 3 or mask[-1] in (keys[-2], 1):
        return None
    return f"the mask ends in {mask[-1]}, the keys are {keys[-2]}"


def _constant_is(site: Site, rule: Rule) -> str | None:
    value = site.input(rule.input or 0)
    seen = values.scalar(value)
    if seen is None:
        return f"input {rule.input} is not a constant"
    return None if seen == rule.values[0] else f"input {rule.input} is {seen}"


def _constant_below(site: Site, rule: Rule) -> str | None:
    value = site.input(rule.input or 0)
    array = _small(site, rule)
    if value is None or array is None or not array.size or array.max() < rule.values[0]:
        return None
    return f"input {rule.input} is {array.max()}, must be below {rule.values[0]}"


def _all_zero(site: Site, rule: Rule) -> str | None:
    array = _small(site, rule)
    if array is None or not np.any(array.astype(np.float64)):
        return None
    return f"zero point {_first(array)} is not 0"


def _all_positive(site: Site, rule: Rule) -> str | None:
    array = _small(site, rule)
    if array is None or bool((array.astype(np.float64) > 0).all()):
        return None
    return f"a scale is {array.astype(np.float64).min()}: every scale must be positive"


def _per_tensor_activation(site: Site, rule: Rule) -> str | None:
    """T2: vectors of scales are for constant weights."""
    del rule
    value, scale = site.input(0), site.rank(1)
    if value is None or not scale or site.is_foldable(value) or _dequantizes_constant(site):
        return None
    dims = site.static_dims(1)
    if dims == (1,) or _held_dtype(site) in ("INT4", "FLOAT4E2M1"):
        return None
    return "an activation is quantised with one scale a channel"


def _dequantizes_constant(site: Site) -> bool:
    """Whether the node is the DequantizeLinear behind a QuantizeLinear of a constant."""
    producer = site.node.inputs[0].producer() if site.node.inputs and site.node.inputs[0] else None
    if producer is None or producer.op_type != "QuantizeLinear" or not producer.inputs:
        return False
    return site.is_foldable(producer.inputs[0])


def _axis_written(site: Site, rule: Rule) -> str | None:
    """T2: without the attribute TensorRT takes axis 0, where ONNX means 1."""
    del rule
    dims = site.static_dims(1)
    if not site.rank(1) or dims == (1,) or "axis" in site.node.attributes:
        return None
    return (
        "one scale a channel without the attribute axis: ONNX means axis 1, TensorRT takes axis 0"
    )


def _scale_length(site: Site, rule: Rule) -> str | None:
    """T2: as many scales as the axis is long."""
    del rule
    dims, scales = site.static_dims(0), site.static_dims(1)
    axis = site.attribute("axis")
    if dims is None or scales is None or len(scales) != 1 or scales == (1,):
        return None
    index = axis if isinstance(axis, int) else 1
    if not -len(dims) <= index < len(dims) or scales[0] == dims[index]:
        return None
    return f"{scales[0]} scales for {dims[index]} channels of axis {index}"


def _even_elements(site: Site, rule: Rule) -> str | None:
    """T3: two 4-bit numbers share a byte."""
    del rule
    dims = site.static_dims(0)
    if _held_dtype(site) not in ("INT4", "FLOAT4E2M1") or not dims or dims[-1] % 2 == 0:
        return None
    return f"4-bit data with an odd last dimension, {dims[-1]}"


def _held_dtype(site: Site) -> str | None:
    """The type of what is quantised."""
    if site.node.op_type == "DequantizeLinear":
        return site.dtype(0)
    return site.dtype_of(site.node.outputs[0]) if site.node.outputs else None


def _scale_opset(site: Site, rule: Rule) -> str | None:
    """T4: before opset 19 the scale is float32 by definition."""
    del rule
    seen = site.dtype(1)
    if site.opset >= 19 or seen in (None, "FLOAT"):
        return None
    return f"a {seen} scale needs opset 19, the model imports {site.opset}"


def _same_head_size(site: Site, rule: Rule) -> str | None:
    del rule
    query, value = site.static_dims(0), site.static_dims(2)
    if query is None or value is None or len(query) != 4 or len(value) != 4:
        return _head_size_of_three(site, query, value)
    return None if query[3] == value[3] else f"head sizes {query[3]} of Q and K, {value[3]} of V"


def _head_size_of_three(
    site: Site, query: tuple[int, ...] | None, value: tuple[int, ...] | None
) -> str | None:
    """[batch, sequence, heads * size] with the heads as attributes."""
    heads, kv_heads = site.attribute("q_num_heads"), site.attribute("kv_num_heads")
    if query is None or value is None or len(query) != 3 or len(value) != 3:
        return None
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or 0 in (heads, kv_heads):
        return None
    sizes = (query[2] // heads, value[2] // kv_heads)
    return None if sizes[0] == sizes[1] else f"head sizes {sizes[0]} of Q and K, {sizes[1]} of V"


def _axes_are_all(site: Site, rule: Rule) -> str | None:
    """Axes count with scales only where they are 0, 1, … rank - 1."""
    axes, rank = site.attribute(rule.attr), site.rank(0)
    if not isinstance(axes, tuple | list) or rank is None or list(axes) == list(range(rank)):
        return None
    return f"{rule.attr} = {list(axes)} with scales, must name all {rank} axes in order"


def _branch_names_differ(site: Site, rule: Rule) -> str | None:
    del rule
    first, second = _branches(site)
    same = {v.name for v in first} & {v.name for v in second}
    return f"both branches call an output {min(map(str, same))!r}" if same else None


def _branch_ranks_equal(site: Site, rule: Rule) -> str | None:
    del rule
    for a, b in zip(*_branches(site), strict=False):
        first, second = site.shapes.dims(a), site.shapes.dims(b)
        if first is not None and second is not None and len(first) != len(second):
            return f"branch outputs {a.name!r} and {b.name!r} have ranks {len(first)} and {len(second)}"
    return None


def _branches(site: Site) -> tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]:
    graphs = operators.subgraphs(site.node)
    return (tuple(graphs[0].outputs), tuple(graphs[1].outputs)) if len(graphs) == 2 else ((), ())


def _loop_carried_shapes(site: Site, rule: Rule) -> str | None:
    """What goes round a Loop keeps its shape."""
    del rule
    graphs = operators.subgraphs(site.node)
    if not graphs:
        return None
    for first, given in zip(site.node.inputs[2:], graphs[0].inputs[2:], strict=False):
        before = None if first is None else site.shapes.dims(first)
        # Inference gives up on a value whose rank differs from one iteration to the next.
        if before is not None and site.shapes.dims(given) is None:
            return f"the carried value {given.name!r} starts with rank {len(before)} and changes its rank"
    return None


def _note(site: Site, rule: Rule) -> str | None:
    del site
    return rule.note


def _small(site: Site, rule: Rule) -> Array | None:
    """A constant operand's elements; None where it is computed or large."""
    tensor = values.constant(site.input(rule.input or 0))
    if tensor is None or tensor.size > MAX_READ_ELEMENTS:
        return None
    return np.asarray(tensor.numpy())


def _first(array: Array) -> float:
    flat = array.astype(np.float64).reshape(-1)
    return float(flat[np.flatnonzero(flat)[0]])


def _text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def _list(allowed: object) -> str:
    items = allowed if isinstance(allowed, tuple | list) else (allowed,)
    return ", ".join(str(each) for each in items if each is not None)


CHECKS: Mapping[str, Check] = {
    "attr-in": _attr_in,
    "attr-all": _attr_all,
    "attr-min": _attr_min,
    "attr-matches": _attr_matches,
    "attr-absent": _attr_absent,
    "attr-halves": _attr_halves,
    "inputs-at-most": _inputs_at_most,
    "outputs-at-most": _outputs_at_most,
    "dtype-in": _dtype_in,
    "dtype-not-in": _dtype_not_in,
    "same-dtypes": _same_dtypes,
    "rank-in": _rank_in,
    "rank-from": _rank_from,
    "rank-to": _rank_to,
    "rank-pair-not": _rank_pair_not,
    "static-shape": _static_shape,
    "constant": _constant,
    "absent": _absent,
    "mask-fits": _mask_fits,
    "constant-is": _constant_is,
    "constant-below": _constant_below,
    "all-zero": _all_zero,
    "all-positive": _all_positive,
    "per-tensor-activation": _per_tensor_activation,
    "axis-written": _axis_written,
    "scale-length": _scale_length,
    "even-elements": _even_elements,
    "scale-opset": _scale_opset,
    "same-head-size": _same_head_size,
    "axes-are-all": _axes_are_all,
    "branch-names-differ": _branch_names_differ,
    "branch-ranks-equal": _branch_ranks_equal,
    "loop-carried-shapes": _loop_carried_shapes,
    "note": _note,
}
