"""Changing a model into the specialised one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.ir.build import Names
from graphopt.ir.scopes import all_graphs
from graphopt.ir.shapes import Shapes
from graphopt.specialize import ports
from graphopt.specialize.plan import InputPort, OutputPort, Plan
from graphopt.specialize.wanted import Specialization

Array: TypeAlias = "np.ndarray[Any, Any]"
Sizes: TypeAlias = "dict[ir.Value | str, dict[int, int] | int]"
"""Of dimensions: by symbol, or by value and axis where they have no name."""


def specialize(model: ir.Model, wanted: Specialization) -> Plan:
    """Changes `model` as wanted; returns how its inputs and outputs stand to those it had.

    Raises:
        OptionError: a name is unknown, a value does not fit, or two wishes contradict each other.
    """
    _fix_dims(model, _wanted_dims(model, wanted.dims))
    bound = {name: _bound(model, name, value) for name, value in wanted.bind.items()}
    _fix_dims(model, _implied_dims(model, bound))
    names = Names.of(model)
    for name, array in bound.items():
        _bind(model, name, array, names)
    if wanted.outputs:
        _choose_outputs(model, wanted.outputs)
    _check_names(model, wanted)
    inputs, outputs = ports.change(model, wanted, names)
    renamed = _rename(model, wanted.rename, names)
    return Plan(
        tuple(_renamed(port, renamed) for port in inputs),
        tuple(_renamed_output(port, renamed) for port in outputs),
        bound,
    )


def _renamed(port: InputPort, renamed: Mapping[str, str]) -> InputPort:
    return dataclasses.replace(port, name=renamed.get(port.name, port.name))


def _renamed_output(port: OutputPort, renamed: Mapping[str, str]) -> OutputPort:
    return dataclasses.replace(port, name=renamed.get(port.name, port.name))


def _input(model: ir.Model, name: str, what: str) -> ir.Value:
    """An input, or a default that may be overridden.

    Raises:
        OptionError: there is none of that name.
    """
    for value in model.graph.inputs:
        if value.name == name:
            return value
    raise _unknown(f"{what} {name!r}: the model has no such input", name, model.graph.inputs)


def _unknown(told: str, name: str, known: Iterable[ir.Value | str]) -> OptionError:
    names = [str(each.name if isinstance(each, ir.Value) else each) for each in known]
    close = difflib.get_close_matches(name, names, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return OptionError(f"{told}{hint}; there are: {', '.join(names[:32]) or 'none'}")


def _bound(model: ir.Model, name: str, given: object) -> Array:
    """The value of an input as an array of its type and rank; one number fills it.

    Raises:
        OptionError: it does not fit.
    """
    value = _input(model, name, "bind")
    if not isinstance(value.type, ir.TensorType):
        raise OptionError(f"bind {name!r}: it is {value.type}; only tensors can be bound")
    array = _converted(name, given, value.type.dtype)
    if value.shape is None:
        return array
    if array.ndim == 0 and len(value.shape) > 0:
        sizes = [dim if isinstance(dim, int) else None for dim in value.shape]
        if None in sizes:
            raise OptionError(
                f"bind {name!r}: one number cannot fill {value.shape}, whose size is not known; fix its dimensions "
                "too (--set-dim), or give an array"
            )
        return np.full([size for size in sizes if size is not None], array)
    fits = array.ndim == len(value.shape) and all(
        not isinstance(dim, int) or dim == size
        for dim, size in zip(value.shape, array.shape, strict=False)
    )
    if not fits:
        raise OptionError(
            f"bind {name!r}: the value has shape {list(array.shape)}, the input {value.shape}"
        )
    return array


def _converted(name: str, given: object, dtype: ir.DataType) -> Array:
    """The value in the type of the input, if nothing is lost by it."""
    if dtype == ir.DataType.STRING:
        return np.asarray(given, dtype=object)
    try:
        seen = np.asarray(given)
        with np.errstate(over="ignore", invalid="ignore"):
            array = seen.astype(dtype.numpy())
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"bind {name!r}: {given!r} is no array of {dtype.name}: {error}"
        ) from error
    whole = dtype.is_integer() or dtype == ir.DataType.BOOL
    if whole and not np.array_equal(seen.astype(np.float64), array.astype(np.float64)):
        raise OptionError(f"bind {name!r}: {given!r} cannot be written in {dtype.name}")
    return array


def _wanted_dims(model: ir.Model, wanted: Mapping[str, int]) -> Sizes:
    """What becomes of which dimension."""
    found: Sizes = {}
    for text, size in wanted.items():
        if size < 1:
            raise OptionError(f"dimension {text} = {size}: sizes are at least 1")
        for value, axis in _places(model, text):
            _note(found, value, axis, size)
    return found


def _implied_dims(model: ir.Model, bound: Mapping[str, Array]) -> Sizes:
    """A value that is bound fixes the dimensions that it shares with other inputs."""
    found: Sizes = {}
    for name, array in bound.items():
        value = _input(model, name, "bind")
        for axis, size in enumerate(array.shape if value.shape is not None else ()):
            _note(found, value, axis, size)
    return found


def _places(model: ir.Model, text: str) -> list[tuple[ir.Value, int]]:
    """The inputs and axes that a name, or `INPUT:AXIS`, speaks of.

    Raises:
        OptionError: none.
    """
    dims = [
        (value, axis, dim)
        for value in model.graph.inputs
        for axis, dim in enumerate(value.shape or ())
    ]
    named = [(v, a) for v, a, dim in dims if isinstance(dim, ir.SymbolicDim) and dim.value == text]
    exact = [(v, a) for v, a, _ in dims if f"{v.name}:{a}" == text]
    if named or exact:
        return named or exact
    free = [
        (dim.value or f"{value.name}:{axis}")
        for value, axis, dim in dims
        if isinstance(dim, ir.SymbolicDim)
    ]
    told = f"dimension {text!r}: no input has such a dynamic dimension"
    raise _unknown(told, text, dict.fromkeys(free))


def _note(found: Sizes, value: ir.Value, axis: int, size: int) -> None:
    """Notes the size of one dimension, and refuses another one.

    Raises:
        OptionError: the dimension has another size.
    """
    assert value.shape is not None
    dim = value.shape[axis]
    symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
    if isinstance(dim, int):
        before: int | None = dim
    elif symbol is not None:
        held = found.setdefault(symbol, size)
        before = held if isinstance(held, int) else None
    else:
        axes = found.setdefault(value, {})
        assert isinstance(axes, dict)
        before = axes.setdefault(axis, size)
    if before != size:
        raise OptionError(
            f"dimension {symbol or axis} of input {value.name!r} is {before} and shall be {size}: give one size"
        )


def _fix_dims(model: ir.Model, sizes: Sizes) -> None:
    """Puts the sizes into every shape that the model states; what follows from them is inferred later."""
    if not sizes:
        return
    for scope in all_graphs(model):
        for value in _values(scope.graph):
            if value.shape is None:
                continue
            own = sizes.get(value, {})
            dims = [
                _fixed(dim, sizes, own.get(axis) if isinstance(own, dict) else None)
                for axis, dim in enumerate(value.shape)
            ]
            if dims != list(value.shape):
                words = [value.shape.get_denotation(axis) for axis in range(len(dims))]
                value.shape = ir.Shape(dims, words)


def _fixed(dim: int | ir.SymbolicDim, sizes: Sizes, own: int | None) -> int | ir.SymbolicDim:
    if isinstance(dim, int):
        return dim
    size = own if own is not None else sizes.get(dim.value) if dim.value is not None else None
    return size if isinstance(size, int) else dim


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.outputs
    for node in graph:
        yield from node.outputs


def _bind(model: ir.Model, name: str, array: Array, names: Names) -> None:
    """Puts a constant in the place of an input."""
    graph, value = model.graph, _input(model, name, "bind")
    tensor = (
        ir.StringTensor(array.astype(bytes).reshape(-1).tolist(), shape=ir.Shape(array.shape))
        if (value.dtype == ir.DataType.STRING)
        else ir.Tensor(array)
    )
    node = ir.Node(
        "", "Constant", [], [ir.AttrTensor("value", tensor)], name=names.fresh(f"{name}_bound")
    )
    made = node.outputs[0]
    made.type, made.shape = value.type, ir.Shape(array.shape)
    graph.inputs.remove(value)
    if value.is_initializer():
        graph.initializers.pop(name)
    value.name, made.name = names.fresh(f"{name}_input"), name
    put_first(graph, [node])
    replace(graph, value, made)


def put_first(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Puts nodes before all others."""
    first = next(iter(graph), None)
    if first is None:
        graph.extend(nodes)
    else:
        graph.insert_before(first, nodes)


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value, *, but: Iterable[ir.Node] = ()) -> None:
    """Lets whatever reads `old` read `new`, outputs of the graph included."""
    spared = set(but)
    for use in old.uses():
        if use.node not in spared:
            use.node.replace_input_with(use.idx, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def _choose_outputs(model: ir.Model, wanted: Sequence[str]) -> None:
    """Makes the named values the outputs, in that order.

    Raises:
        OptionError: a name is unknown or given twice, or the type of its value is not known.
    """
    graph = model.graph
    if len(set(wanted)) < len(wanted):
        raise OptionError(f"outputs {', '.join(wanted)}: one is named twice")
    known = {value.name: value for value in _reachable(graph) if value.name}
    unknown = next((name for name in wanted if name not in known), None)
    if unknown is not None:
        told = f"output {unknown!r}: no output, and no value of the main graph, is called so"
        close = difflib.get_close_matches(unknown, [str(name) for name in known], 3)
        raise _unknown(told, unknown, dict.fromkeys([*map(_name, graph.outputs), *close]))
    Shapes(model)  # states types
    chosen = []
    for name in wanted:
        value = known[name]
        if value.type is None:
            raise OptionError(
                f"output {name!r}: its type is not known, so it cannot leave the model; choose another value"
            )
        chosen.append(value)
    graph.outputs.clear()
    graph.outputs.extend(chosen)


def _name(value: ir.Value) -> str:
    return value.name or ""


def _reachable(graph: ir.Graph) -> Iterable[ir.Value]:
    """Values that may become outputs: those that nodes compute, and the outputs there are."""
    for node in graph:
        yield from node.outputs
    yield from graph.outputs


def _check_names(model: ir.Model, wanted: Specialization) -> None:
    """Refuses what speaks of no input or output.

    Raises:
        OptionError: it does.
    """
    graph = model.graph
    both = [*graph.inputs, *graph.outputs]
    for kind, asked, among in (
        ("element type of", wanted.dtypes, both),
        ("layout of", wanted.layouts, both),
        ("image", wanted.images, list(graph.inputs)),
        ("rename", wanted.rename, both),
    ):
        for name in asked:
            if all(value.name != name for value in among):
                raise _unknown(f"{kind} {name!r}: no such input or output", name, among)


def _rename(model: ir.Model, wanted: Mapping[str, str], names: Names) -> dict[str, str]:
    """Renames inputs and outputs; whatever inside is called so gets another name.

    Raises:
        OptionError: two inputs or outputs would share a name.
    """
    graph = model.graph
    held = list(dict.fromkeys((*graph.inputs, *graph.outputs)))
    after = [wanted.get(value.name or "", value.name) for value in held]
    twice = next((name for name in after if after.count(name) > 1), None)
    if twice is not None:
        raise OptionError(f"rename: two inputs or outputs would be called {twice!r}")
    moving = [(value, wanted[value.name]) for value in held if value.name and value.name in wanted]
    new = {name for _, name in moving}
    for scope in all_graphs(model):
        for value in _named(scope.graph):
            if value.name in new and value not in held:
                value.name = names.fresh(f"{value.name}_inner")
    for value, name in moving:
        value.name = names.fresh(f"{name}_renamed")  # names may be swapped
    for value, name in moving:
        value.name = name
    return dict(wanted)


def _named(graph: ir.Graph) -> list[ir.Value]:
    return [
        *graph.inputs,
        *graph.initializers.values(),
        *(output for node in graph for output in node.outputs if output.name),
    ]
