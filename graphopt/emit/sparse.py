"""Writes constants that are mostly zero as (values, indices), where the target reads that and the file shrinks.

Sparse storage is a matter of the file: passes, checks and shape inference see dense tensors, because `onnx.checker`'s
full check, strict shape inference and most tools refuse `graph.sparse_initializer`.  So this is the last step before
writing, on a clone.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import Scope, all_graphs
from graphopt.ir.sparse import CooTensor
from graphopt.targets import SparseStyle

LEAST_ELEMENTS = 128
"""What is smaller stays dense: names and tags of a sparse tensor take about as much as it could save."""

WORTH_A_TENSOR = 0.90
"""A tensor is stored sparse only below this share of its dense bytes."""

WORTH_A_FILE = 0.95
"""... and only if all weights together shrink to this share."""

MAX_BYTES = 1_800_000_000
"""ONNX keeps sparse tensors inside the model, which protobuf limits to 2 GiB; dense ones may lie beside it."""

SPARSE_VALUE_OPSET = 11
"""From which on Constant has an attribute `sparse_value`."""

_INDEX_BYTES = 8
"""As `raw_data`.  Break-even is judged by this, although packed indices take two or three: who saves the file again
with a tool that knows `raw_data` alone shall not find it larger than the dense one."""

_OVERHEAD = (96, 32)  # names, dims and tags of a sparse and of a dense tensor, about
_CHUNK = 1 << 20
_STORED = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT32,
        ir.DataType.UINT32,
        ir.DataType.INT64,
        ir.DataType.UINT64,
    }
)
"""What ONNX Runtime 1.31 expands; it refuses 4-bit values."""


@dataclasses.dataclass(frozen=True)
class SparseFacts:
    """What storing weights sparse did, or would do, for the file.

    Attributes:
        style: the form in the file.
        tensors: how many are stored sparse.
        elements: of the constants at least half zero.
        zeros: among those.
        dense_bytes: all constants, dense.
        stored_bytes: all constants as they are in the file.
        compressed_bytes: all constants dense, those at least half zero deflated: what a zip of the dense file takes.
        reason: why nothing is stored sparse although the target reads it, or "".
        dense_left: bytes of the constants that stay dense.
        largest: name of the largest of these, "" where there is none.
        largest_bytes: what it takes.
        file_bytes: of the file, and of what lies beside it; 0 before it is written.
    """

    style: SparseStyle
    tensors: int
    elements: int
    zeros: int
    dense_bytes: int
    stored_bytes: int
    compressed_bytes: int
    reason: str = ""
    dense_left: int = 0
    largest: str = ""
    largest_bytes: int = 0
    file_bytes: int = 0

    def sentences(self) -> tuple[str, ...]:
        """What a user should know, in words."""
        sizes = (
            f"{self.zeros / max(self.elements, 1):.1%} of {self.elements} weights are zero: all constants take "
            f"{self.dense_bytes} bytes dense, {self.stored_bytes} in this file, {self.compressed_bytes} dense and "
            "deflated"
        )
        speed = (
            "zeros make the file smaller, not the model faster: runtimes expand sparse weights when they load, and "
            "dense kernels multiply by zero; only removed channels (--sparsity channels:R) and, on NVIDIA tensor "
            "cores, 2:4 patterns save time"
        )
        parts = self._parts()
        return (sizes, *([parts] if parts else []), speed, *([self.reason] if self.reason else []))

    def _parts(self) -> str:
        """What the file is made of, so that nobody takes it all for weights that could be zero."""
        if not self.file_bytes or not self.tensors:
            return ""
        sparse, whole = self.stored_bytes - self.dense_left, self.file_bytes
        shares = (
            f"of the {whole} bytes of the file {sparse / whole:.0%} are constants stored sparse, "
            f"{self.dense_left / whole:.0%} constants that stay dense"
        )
        most = (
            f" (the largest, '{self.largest}', {self.largest_bytes} bytes)" if self.largest else ""
        )
        return f"{shares}{most}, {1 - self.stored_bytes / whole:.0%} the graph itself"


def sparse_form(model: ir.Model, style: SparseStyle) -> tuple[ir.Model, SparseFacts | None]:
    """The model as it is to be written, and what that is about; None where no large constant is half zero.

    The model itself stays as it is; a clone is made only if something changes.  Bits are kept: -0.0 and NaN count as
    values.  Left dense: small tensors, graph inputs and outputs, types that ONNX Runtime cannot expand, and everything
    where the file would shrink by less than 5 %.  Tensors that came sparse come out in the chosen style as well.
    Initializers that are worth storing sparse stand behind the others in every style, as they do in a sparse file, so
    that the dense file is, byte for byte, what `densify` makes of the sparse one.

    Args:
        model: dense, or with `CooTensor`s from the file that it was read from.
        style: what the target reads.
    """
    plan = _Plan.of(model, came_only=style is SparseStyle.KEPT)
    style = plan.came if style is SparseStyle.KEPT else style
    style, reason = _possible(style, plan, model.opset_imports.get("", 0))
    chosen = plan.paying if style is not SparseStyle.DENSE else ()
    facts = plan.facts(style, chosen, reason)
    if not plan.paying and not plan.held_sparse:
        return model, facts
    made = load_model(model)
    for scope in all_graphs(made):
        _set_behind(scope, {entry.key for entry in plan.paying})
        _rewrite_graph(scope, style, {entry.key for entry in chosen})
    return made, facts


def densify(model: ir.Model) -> ir.Model:
    """The model with every constant dense; itself where it is dense already."""
    if not any(isinstance(tensor, CooTensor) for _, tensor, _ in _constants(model)):
        return model
    return sparse_form(model, SparseStyle.DENSE)[0]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A constant of at least `LEAST_ELEMENTS` of which half or more is zero."""

    key: tuple[str, str]
    tensor: ir.TensorProtocol
    nonzeros: int
    movable: bool

    @property
    def dense_bytes(self) -> int:
        return int(self.tensor.nbytes)

    @property
    def sparse_bytes(self) -> int:
        return self.nonzeros * (self.tensor.dtype.bitwidth // 8 + _INDEX_BYTES)

    @property
    def stored_bytes(self) -> int:
        """With packed indices, as they are written."""
        at = np.flatnonzero(_bits(self.tensor))
        indices = sum(int(np.count_nonzero(at >= 1 << bits)) for bits in range(7, 64, 7)) + at.size
        return self.nonzeros * (self.tensor.dtype.bitwidth // 8) + indices

    @property
    def saved(self) -> int:
        return self.dense_bytes - self.sparse_bytes

    @property
    def pays(self) -> bool:
        sparse, dense = _OVERHEAD
        return (
            self.movable
            and self.tensor.dtype in _STORED
            and self.sparse_bytes + sparse < WORTH_A_TENSOR * (self.dense_bytes + dense)
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What there is to decide on."""

    entries: tuple[_Entry, ...]
    sizes: tuple[tuple[tuple[str, str], int], ...]
    held_sparse: bool

    @property
    def total_bytes(self) -> int:
        """Of all constants, dense."""
        return sum(size for _, size in self.sizes)

    @classmethod
    def of(cls, model: ir.Model, *, came_only: bool = False) -> _Plan:
        entries: list[_Entry] = []
        sizes, held = [], False
        for key, tensor, movable in _constants(model):
            sizes.append((key, int(tensor.nbytes)))
            came = isinstance(tensor, CooTensor)
            held = held or came
            nonzeros = _nonzeros(tensor)
            if nonzeros is not None:
                free = movable and (came or not came_only)
                entries.append(_Entry(key, tensor, nonzeros, free))
        told = () if came_only and not held else tuple(entries)
        return cls(told, tuple(sizes), held)

    @property
    def came(self) -> SparseStyle:
        """The form of what came sparse; initializers where it came in both: one file does not mix them."""
        held = [each.tensor for each in self.entries if isinstance(each.tensor, CooTensor)]
        in_nodes = bool(held) and all(tensor.in_node for tensor in held)
        return SparseStyle.CONSTANT if in_nodes else SparseStyle.INITIALIZER

    @property
    def paying(self) -> tuple[_Entry, ...]:
        return tuple(entry for entry in self.entries if entry.pays)

    @property
    def saved(self) -> int:
        return sum(entry.saved for entry in self.paying)

    def facts(
        self, style: SparseStyle, chosen: tuple[_Entry, ...], reason: str
    ) -> SparseFacts | None:
        if not self.entries:
            return None
        saved = sum(entry.dense_bytes - entry.stored_bytes for entry in chosen)
        kept = {entry.key for entry in chosen}
        left = [each for each in self.sizes if each[0] not in kept]
        largest = max(left, key=lambda each: each[1], default=(("", ""), 0))
        squeezed = sum(entry.dense_bytes - _deflated(entry.tensor) for entry in self.entries)
        return SparseFacts(
            style=style if chosen else SparseStyle.DENSE,
            tensors=len(chosen),
            elements=sum(entry.tensor.size for entry in self.entries),
            zeros=sum(entry.tensor.size - entry.nonzeros for entry in self.entries),
            dense_bytes=self.total_bytes,
            stored_bytes=self.total_bytes - saved,
            compressed_bytes=self.total_bytes - squeezed,
            reason=reason,
            dense_left=sum(size for _, size in left),
            largest=largest[0][1],
            largest_bytes=largest[1],
        )


def _possible(style: SparseStyle, plan: _Plan, opset: int) -> tuple[SparseStyle, str]:
    """The style that the file can have, and why it is not the one asked for."""
    if style is SparseStyle.DENSE or not plan.entries:
        return SparseStyle.DENSE, ""
    if style is SparseStyle.CONSTANT and opset < SPARSE_VALUE_OPSET:
        reason = f"stored dense: Constant has sparse_value from opset {SPARSE_VALUE_OPSET} on, this model has {opset}"
        return SparseStyle.DENSE, reason
    inside = sum(entry.stored_bytes for entry in plan.paying)
    if inside > MAX_BYTES:
        reason = f"even sparse, {inside} bytes are too many to lie in the model, where ONNX keeps sparse weights"
        return SparseStyle.DENSE, f"{reason}: they stay dense, beside it"
    if plan.total_bytes - plan.saved > WORTH_A_FILE * plan.total_bytes:
        return (
            SparseStyle.DENSE,
            "stored dense: (value, index) pairs would take 95 % of the dense bytes or more",
        )
    return style, ""


def _constants(model: ir.Model) -> Iterator[tuple[tuple[str, str], ir.TensorProtocol, bool]]:
    """Each constant with a key that a clone shares, and whether it may take another form."""
    for scope in all_graphs(model):
        for name, value in scope.graph.initializers.items():
            if value.const_value is not None:
                movable = not (value.is_graph_input() or value.is_graph_output())
                yield (scope.path, name), value.const_value, movable
        for node in scope.graph:
            tensor = _held(node)
            if tensor is not None:
                yield (
                    (scope.path, node.outputs[0].name or ""),
                    tensor,
                    isinstance(tensor, CooTensor),
                )


def _held(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor in the attribute `value` of a Constant node."""
    attribute = (
        node.attributes.get("value") if node.op_type == "Constant" and not node.domain else None
    )
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        return None
    return attribute.as_tensor()


def _nonzeros(tensor: ir.TensorProtocol) -> int | None:
    """How many elements have a bit set; None for a tensor that is small, of another kind, or less than half zero.

    Dense weights are given up on as soon as half of them are known not to be zero.
    """
    if tensor.size < LEAST_ELEMENTS or not (tensor.dtype in _STORED or _is_wide(tensor.dtype)):
        return None
    if isinstance(tensor, CooTensor):
        bits = _bits(tensor.values)
        count = int(np.count_nonzero(bits))
        return count if 2 * count <= tensor.size else None
    bits, count = _bits(tensor), 0
    for start in range(0, bits.size, _CHUNK):
        count += int(np.count_nonzero(bits[start : start + _CHUNK]))
        if 2 * count > bits.size:
            return None
    return count


def _is_wide(dtype: ir.DataType) -> bool:
    """Whether elements fill whole bytes, so that their bits can be looked at."""
    return dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED) and dtype.bitwidth in (
        8,
        16,
        32,
        64,
    )


def _bits(tensor: ir.TensorProtocol) -> npt.NDArray[np.unsignedinteger]:
    """The elements as flat unsigned integers: 0 is +0.0 and nothing else."""
    array = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    return array.view(f"u{array.dtype.itemsize}")


def _deflated(tensor: ir.TensorProtocol) -> int:
    return min(len(zlib.compress(tensor.tobytes(), 1)), int(tensor.nbytes))


def _set_behind(scope: Scope, worth: set[tuple[str, str]]) -> None:
    """Orders the initializers of one graph of the clone: those that are worth storing sparse come last."""
    held = scope.graph.initializers
    last = [name for name in held if (scope.path, name) in worth]
    for name in last:
        held[name] = held.pop(name)


def _rewrite_graph(scope: Scope, style: SparseStyle, chosen: set[tuple[str, str]]) -> None:
    """Gives the constants of one graph of the clone their form."""
    graph = scope.graph
    for name, value in tuple(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        if (scope.path, name) not in chosen:
            value.const_value = _dense(tensor)
        elif style is SparseStyle.INITIALIZER:
            value.const_value = as_coo(tensor, name)
        else:
            _move_into_node(graph, value, as_coo(tensor, name))
    for node in graph:
        tensor = _held(node)
        if isinstance(tensor, CooTensor):
            name = node.outputs[0].name or ""
            keeps = (scope.path, name) in chosen
            made = as_coo(tensor, name) if keeps else _dense(tensor)
            node.attributes["value"] = ir.AttrTensor("value", made)


def _move_into_node(graph: ir.Graph, value: ir.Value, tensor: CooTensor) -> None:
    """Makes an initializer the output of a Constant node at the head of its graph."""
    name = value.name
    del graph.initializers[name or ""]
    node = ir.Node("", "Constant", [], attributes=[ir.AttrTensor("value", tensor)], num_outputs=1)
    output = node.outputs[0]
    output.type, output.shape = value.type, value.shape
    value.replace_all_uses_with(output)
    output.name = name
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        graph.insert_before(first, node)


def as_coo(tensor: ir.TensorProtocol, name: str) -> CooTensor:
    """The tensor as values and ascending flat int64 indices, the one form that checkers and runtimes agree on.

    They go into the file as packed integers, which is the same to protobuf's readers and takes a third of the bytes.
    """
    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    indices = np.flatnonzero(flat.view(f"u{flat.dtype.itemsize}"))
    values = ir.Tensor(flat[indices], tensor.dtype, name=name)
    dims = tensor.shape.numpy()
    return CooTensor(
        values,
        ir.Tensor(indices.astype(np.int64), name=f"{name}__idx"),
        dims,
        name=name,
        packed=True,
    )


def _dense(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, CooTensor):
        return tensor
    shape = ir.Shape(tensor.dims)
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy().reshape(-1).tolist(), shape=shape, name=tensor.name)
    return ir.Tensor(tensor.numpy(), tensor.dtype, shape=shape, name=tensor.name)
