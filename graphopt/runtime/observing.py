"""Values in the middle of a model as the optimised session computes them, handed out without copies.

Convolutions of ONNX Runtime on x86 and ARM keep their values in blocks of 8 or 16 channels; to hand them out in the
order that ONNX knows, it would turn each of them, which costs a fifth of a run.  So its optimised graph is written,
the turning is cut off, and what remains is run as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from graphopt.errors import ModelError
from graphopt.runtime import tapping
from graphopt.runtime.residuals import NCHWC, Blocked, fuse_sums
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """One value of one run.

    Attributes:
        array: what it holds; of blocked values [N, channels padded to blocks, H, W], laid out as [N, blocks, H, W,
            channels of a block].  The next run overwrites it.
        channels: how many channels a blocked value has; 0 where it is laid out as ONNX says.
        floor: what no element is below, as the operator that makes it says; None where it does not.
    """

    array: np.ndarray[Any, Any]
    channels: int = 0
    floor: float | None = None

    @property
    def blocks(self) -> np.ndarray[Any, Any] | None:
        """The value as [N, blocks, positions, channels of a block], the last block padded; None where it is none."""
        if not self.channels:
            return None
        size, padded = block_size(), self.array.shape[1]
        return self.array.reshape(len(self.array), padded // size, -1, size)

    @property
    def plain(self) -> np.ndarray[Any, Any]:
        """The value as ONNX lays it out."""
        if not self.channels:
            return self.array
        size, (count, padded, *space) = block_size(), self.array.shape
        blocks = self.array.reshape(count, padded // size, *space, size)
        turned = blocks.transpose(0, 1, 4, 2, 3).reshape(count, padded, *space)
        return turned[:, : self.channels]

    def row(self, index: int) -> Observed:
        """One sample of a batch."""
        return dataclasses.replace(self, array=self.array[index : index + 1])


class Observer:
    """A model that tells some of its values, fused as it will be deployed.

    Args:
        model: the model; external data of a path lies beside it.
        names: values of the main graph; what is told of an input is what is fed.
        threads: inside one operator.

    Raises:
        ModelError: the runtime refuses the model, or it has no such value.
    """

    def __init__(self, model: bytes | Path, names: Sequence[str], *, threads: int = 1) -> None:
        folder = model.parent if isinstance(model, Path) else None
        options = SessionOptions(threads=threads, external_folder=folder)
        proto = tapping.only(model, names)
        inputs = {value.name for value in proto.graph.input}
        self._fed = tuple(name for name in names if name in inputs)
        self._sources = {name: (name, 0) for name in names if name not in inputs}
        self._floors = _floors(proto.graph)
        self._session = self._made(proto, options) if self._sources else None
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._shapes: tuple[object, ...] = ()
        self._again: Callable[[Mapping[str, Any]], None] | None = None

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Observed]:
        """The values of one sample by name; their arrays hold until the next run.

        Raises:
            DataError, ModelError: as a session does.
        """
        if self._session is not None:
            self._fill(self._session, feeds)
        found = {name: Observed(np.asarray(feeds[name])) for name in self._fed if name in feeds}
        return found | {
            name: Observed(self._arrays[source], channels, self._floors.get(name))
            for name, (source, channels) in self._sources.items()
        }

    def _fill(self, session: Session, feeds: Mapping[str, Any]) -> None:
        """Runs the model, into the arrays of the last run where they fit."""
        shapes = tuple((name, np.shape(value)) for name, value in feeds.items())
        if shapes == self._shapes and self._is_refilled(feeds):
            return
        # What the arrays of the last run held is given free before more is taken.
        self._arrays, self._again = {}, None
        self._arrays = session.run(feeds, list(dict.fromkeys(s for s, _ in self._sources.values())))
        self._shapes = shapes
        if _are_tensors(feeds) and _are_tensors(self._arrays):
            self._again = session.into(self._arrays)

    def _is_refilled(self, feeds: Mapping[str, Any]) -> bool:
        """Whether the outputs fit the arrays of the last run: their shapes may hang on more than those of inputs."""
        if self._again is None:
            return False
        try:
            self._again(feeds)
        except ModelError:
            return False
        return True

    def _made(self, proto: onnx.ModelProto, options: SessionOptions) -> Session:
        tapping.keep_outputs(proto.graph, list(self._sources))
        data = proto.SerializeToString()
        if any(node.op_type == "Conv" for node in proto.graph.node):
            # The runtime may refuse to write its graph; then values are turned.
            with (
                contextlib.suppress(ModelError),
                tempfile.TemporaryDirectory(prefix="graphopt-") as folder,
            ):
                path = Path(folder) / "optimized.onnx"
                once = dataclasses.replace(
                    options, prepack=False, optimized_path=path, optimized_weights="weights.bin"
                )
                Session(data, level=OptimizationLevel.ALL, options=once)
                if session := self._cut(path, options):
                    return session
        return Session(data, level=OptimizationLevel.ALL, options=options)

    def _cut(self, path: Path, options: SessionOptions) -> Session | None:
        proto = onnx.load(path, load_external_data=False)
        makers = {output: node for node in proto.graph.node for output in node.output}
        blocked = {
            name: (node.input[0], channels)
            for name in self._sources
            if (node := makers.get(name)) is not None and (channels := _reordered_channels(node))
        }
        if not blocked:
            return None
        sources = self._sources | blocked
        shapes = {value.name: _dims(value) for value in proto.graph.output}
        known = {
            source: Blocked(channels, shapes[name])
            for name, (source, channels) in blocked.items()
            if shapes.get(name)
        }
        tapping.keep_outputs(proto.graph, [source for source, _ in sources.values()])
        fuse_sums(proto.graph, known, block_size())
        there = dataclasses.replace(options, external_folder=path.parent)
        session = Session(proto.SerializeToString(), options=there)
        self._sources = sources
        return session


def _reordered_channels(node: onnx.NodeProto) -> int:
    """How many channels a node brings from blocks to the order of ONNX; 0 for any other node."""
    if node.domain != NCHWC or node.op_type != "ReorderOutput":
        return 0
    given = {attribute.name: attribute.i for attribute in node.attribute}
    return 0 if given.get("channels_last") else int(given.get("channels", 0))


def _dims(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """The dimensions that a value states, where all are numbers or named; else none."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_param or d.dim_value for d in dims) if all(map(_is_stated, dims)) else ()


def _is_stated(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return bool(dim.dim_param) or dim.HasField("dim_value")


def _floors(graph: onnx.GraphProto) -> dict[str, float]:
    """What no element of a value is below, where the node that makes it says so: Relu, and Clip by a constant."""
    numbers = {
        tensor.name: tensor
        for tensor in (*graph.initializer, *_constants(graph))
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.external_data
        if math.prod(tensor.dims) == 1
    }
    found: dict[str, float] = {}
    for node in graph.node:
        if node.domain not in {"", "ai.onnx"}:
            continue
        if node.op_type == "Relu":
            found[node.output[0]] = 0.0
        elif node.op_type == "Clip" and len(node.input) > 1 and node.input[1] in numbers:
            found[node.output[0]] = float(onnx.numpy_helper.to_array(numbers[node.input[1]]).item())
        elif node.op_type == "Clip" and (least := [a.f for a in node.attribute if a.name == "min"]):
            found[node.output[0]] = least[0]
    return found


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Single numbers that Constant nodes hold, under the names of their outputs."""
    for node in graph.node:
        given = node.attribute[0] if node.op_type == "Constant" and node.attribute else None
        if given is not None and given.name == "value" and math.prod(given.t.dims) == 1:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(given.t)
            tensor.name = node.output[0]
            yield tensor


def _are_tensors(values: Mapping[str, Any]) -> bool:
    """Whether all are arrays of dtypes that NumPy has itself, so that they can be written in place."""
    return all(isinstance(v, np.ndarray) and v.dtype.kind in "fiub" for v in values.values())


@cache
def block_size() -> int:
    """How many channels a block has on this machine: asked of the runtime's own reordering."""
    proto = onnx.ModelProto(ir_version=7)
    proto.opset_import.add(domain="", version=13)
    proto.opset_import.add(domain=NCHWC, version=1)
    proto.graph.name = "blocks"
    proto.graph.node.add(op_type="ReorderInput", domain=NCHWC, input=["x"], output=["y"])
    taken = proto.graph.input.add(name="x").type.tensor_type
    taken.elem_type = onnx.TensorProto.FLOAT
    for size in (1, _PROBED, 1, 2):
        taken.shape.dim.add(dim_value=size)
    proto.graph.output.add(name="y")
    x = np.arange(2 * _PROBED, dtype=np.float32).reshape(1, _PROBED, 1, 2)
    found = Session(proto.SerializeToString()).run({"x": x})["y"].reshape(-1)
    return int(np.flatnonzero(found == 1)[0])  # the second position of the first channel


_PROBED = 64
"""Channels, of which every block size is a part."""
