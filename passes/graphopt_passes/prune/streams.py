"""Runs a model piece by piece over all samples, twice side by side: as it was, and with what is pruned so far.

Layer by layer pruning needs the input of each layer in both models.  Running the whole model once a layer would take
time in the square of its depth; here each node runs once a sample, and only values that later pieces read are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.model_file import to_proto
from graphopt.ir.scopes import dependencies
from graphopt.runtime.session import Session, SessionOptions
from graphopt_passes.prune.layers import Array, Layer

Live = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive nodes of the main graph.

    Attributes:
        nodes: what runs.
        reads: values from outside that are no constants.
        makes: values that later pieces read.
        alive: values that are wanted after it has run.
    """

    nodes: tuple[ir.Node, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    alive: frozenset[str] = frozenset()


Beside = Sequence[Sequence[ir.Value]]
"""For each stop, other values that shall be known with it."""


def cut(graph: ir.Graph, stops: Sequence[ir.Value], beside: Beside = ()) -> list[Piece]:
    """The pieces after each of which the next stop is known; nodes that no stop needs are left out.

    Args:
        graph: sorted.
        stops: values, in the order in which the graph makes them.
        beside: values that shall be known with each stop, as `partners` finds them; none by default.
    """
    wanted = [[stop, *(beside[i] if beside else ())] for i, stop in enumerate(stops)]
    needed = ancestors([value for several in wanted for value in several])
    nodes = [node for node in graph if node in needed]
    place = {node: index for index, node in enumerate(nodes)}
    parts: list[list[ir.Node]] = []
    done: set[ir.Node] = set()
    begin = 0
    for stop, *others in wanted:
        end = max(0 if (p := stop.producer()) is None else place[p] + 1, begin)
        chosen = {*nodes[begin:end], *ancestors(others)} - done
        parts.append(sorted(chosen, key=lambda node: place[node]))
        done |= chosen
        begin = end
    kept = [[value for several in wanted[i:] for value in several] for i in range(len(wanted))]
    pieces = [_piece(part, parts[i + 1 :], kept[i]) for i, part in enumerate(parts)]
    return [
        dataclasses.replace(piece, alive=_alive(pieces[i + 1 :], kept[i]))
        for i, piece in enumerate(pieces)
    ]


def _alive(later: Sequence[Piece], kept: Sequence[ir.Value]) -> frozenset[str]:
    return frozenset({name for piece in later for name in piece.reads} | set(_names(kept)))


def partners(groups: Sequence[Sequence[Layer]]) -> list[list[ir.Value]]:
    """What is added to the outputs of layers that are fitted together, where no later layer has a part in it.

    Of recurrent weights, what their node reads: it runs once more when they are known.
    """
    later = {layer.node for group in groups for layer in group}
    found: list[list[ir.Value]] = []
    for group in groups:
        near = dict.fromkeys(value for layer in group if (value := layer.partner) is not None)
        known = [value for value in near if not ancestors([value]) & later]
        found.append(known + [v for layer in group if layer.is_hidden for v in _read(layer.node)])
        later.difference_update(layer.node for layer in group)
    return found


def _read(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that are no constants."""
    return [v for v in dependencies(node) if not values.is_constant(v)]


def ancestors(stops: Sequence[ir.Value]) -> set[ir.Node]:
    """The nodes from which some values follow."""
    found: set[ir.Node] = set()
    stack = [stop.producer() for stop in stops]
    while stack:
        node = stack.pop()
        if node is None or node in found:
            continue
        found.add(node)
        stack.extend(value.producer() for value in dependencies(node))
    return found


def _piece(
    part: Sequence[ir.Node], later: Sequence[Sequence[ir.Node]], stops: Sequence[ir.Value]
) -> Piece:
    made = {value for node in part for value in node.outputs if value.name}
    read = [
        v
        for node in part
        for v in dependencies(node)
        if v not in made and not values.is_constant(v)
    ]
    after = {value for nodes in later for node in nodes for value in dependencies(node)}
    kept = [value for node in part for value in node.outputs if value in after or value in stops]
    return Piece(tuple(part), _names(read), _names(kept))


def _names(several: Sequence[ir.Value]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value.name for value in several if value.name))


class Streams:
    """All samples on their way through a model, as it was and as it becomes.

    Attributes:
        dense: by sample, the values that later pieces read.
        pruned: the same in the model with new weights; shares arrays with `dense` up to the first of them.
    """

    def __init__(
        self, model: ir.Model, feeds: Sequence[Mapping[str, Array]], threads: int = 2
    ) -> None:
        self._model = model
        self._threads = threads
        self._altered: set[str] = set()
        self.dense: list[Live] = [dict(feed) for feed in feeds]
        self.pruned: list[Live] = [dict(feed) for feed in feeds]

    def run(self, piece: Piece, new: Mapping[str, ir.TensorProtocol]) -> None:
        """Runs a piece over all samples and forgets what is not alive afterwards.

        Args:
            piece: the next one.
            new: weights that differ from those in the model, by name.
        """
        if piece.nodes:
            constants = _constants(piece)
            given = {name: tensor.numpy() for name, tensor in new.items() if name in constants}
            altered = bool(given) or any(name in self._altered for name in piece.reads)
            session = self._session(piece, given)
            old = {name: self._stored(name, piece) for name in given}
            for dense, pruned in zip(self.dense, self.pruned, strict=True):
                made = _run(session, dense, piece, old)
                dense.update(made)
                # Until a weight changes, both models compute the same.
                pruned.update(_run(session, pruned, piece, given) if altered else made)
            if altered:
                self._altered.update(piece.makes)
        for live in (*self.dense, *self.pruned):
            _forget(live, piece)

    def again(self, node: ir.Node) -> Piece:
        """A piece that runs a node once more, whose inputs are still known, for what is kept of its outputs."""
        held = frozenset(self.dense[0])
        makes = tuple(v.name for v in node.outputs if v.name in held)
        return Piece((node,), _names(_read(node)), makes, held)

    def run_apart(self, dense: Piece, other: Piece, model: ir.Model) -> None:
        """Runs corresponding pieces of two models: of the one that this began with, and of `model`."""
        for lives, piece, owner in (
            (self.dense, dense, self._model),
            (self.pruned, other, model),
        ):
            if piece.nodes:
                data = piece_model(owner, piece, lives[0]).SerializeToString()
                session = Session(data, options=SessionOptions(threads=self._threads))
                for live in lives:
                    live.update(_run(session, live, piece, {}))
            for live in lives:
                _forget(live, piece)

    def pairs(self, name: str) -> Iterator[tuple[Array, Array]]:
        """The value in the dense and in the pruned model, by sample."""
        for dense, pruned in zip(self.dense, self.pruned, strict=True):
            yield dense[name], pruned[name]

    def gaps(self, name: str, keep: Mapping[int, Array]) -> Iterator[Array | None]:
        """What a value lacks in the pruned model, by sample; None where it is not known, or lacks nothing.

        Args:
            name: of the value.
            keep: which indices of which axes of it are left in the pruned model.
        """
        for dense, pruned in zip(self.dense, self.pruned, strict=True):
            one, other = dense.get(name), pruned.get(name)
            if one is None or other is None or one is other:
                yield None
                continue
            for axis, stay in keep.items():
                one = np.take(one, stay, axis=axis)
            yield one - other

    @property
    def bytes_held(self) -> int:
        """Of all values that are kept."""
        arrays = {id(a): a.nbytes for live in (*self.dense, *self.pruned) for a in live.values()}
        return sum(arrays.values())

    def _stored(self, name: str, piece: Piece) -> Array:
        tensor = _constants(piece)[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def _session(self, piece: Piece, given: Iterable[str]) -> Session:
        known = self.dense[0] | {name: self._stored(name, piece) for name in given}
        data = piece_model(self._model, piece, known).SerializeToString()
        return Session(data, options=SessionOptions(threads=self._threads))


def _run(session: Session, live: Live, piece: Piece, weights: Mapping[str, Array]) -> Live:
    feeds = {name: live[name] for name in piece.reads} | dict(weights)
    return session.run(feeds)


def _forget(live: Live, piece: Piece) -> None:
    for name in [name for name in live if name not in piece.alive]:
        del live[name]


def _constants(piece: Piece) -> dict[str, ir.Value]:
    found = [v for node in piece.nodes for v in dependencies(node) if values.is_constant(v)]
    return {value.name or "": value for value in found}


def piece_model(model: ir.Model, piece: Piece, known: Live) -> onnx.ModelProto:
    """A piece as a model of its own.

    Args:
        model: what the piece is of.
        piece: the nodes.
        known: what will be fed, by name: it says the types of the inputs; constants among them become inputs.
    """
    made = {value.name for node in piece.nodes for value in node.outputs}
    graph = ir.Graph((), (), nodes=(), opset_imports=dict(model.opset_imports), name="piece")
    functions = list(model.functions.values())
    proto = to_proto(ir.Model(graph, ir_version=max(model.ir_version, 8), functions=functions))
    reads = {v.name or "": v for node in piece.nodes for v in dependencies(node)}
    for name, value in reads.items():
        tensor = values.constant(value)
        if name in made:
            continue
        if tensor is None or name in known:
            proto.graph.input.append(_information(name, known[name]))
        else:
            own = ir.Tensor(tensor.numpy(), tensor.dtype, name=name)
            proto.graph.initializer.append(ir.serde.serialize_tensor(own))
    proto.graph.node.extend(ir.serde.serialize_node(node) for node in piece.nodes)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.makes)
    return proto


def _information(name: str, array: Array) -> onnx.ValueInfoProto:
    """An array as an input: its dims are left open, because pieces run on batches of any size."""
    info = onnx.ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = ir.DataType.from_numpy(array.dtype).value
    info.type.tensor_type.shape.SetInParent()
    for _ in array.shape:
        info.type.tensor_type.shape.dim.add()
    return info
