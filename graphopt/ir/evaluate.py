"""Computes constant subgraphs: NumPy for what is exact there, one ONNX Runtime session for the rest.

The results are those of ONNX Runtime with optimisations off, bit for bit. Large constants are
handed to the runtime as they lie in the file, and a reshaped one stays there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.ir import kernels, operators, scopes, values
from graphopt.ir.hazards import fatal_division, may_not_end, stopped_after

if TYPE_CHECKING:
    from types import ModuleType

Array: TypeAlias = np.ndarray[Any, Any]
Functions: TypeAlias = Mapping[ir.OperatorIdentifier, ir.Function]

_IR_VERSION = 10  # the oldest that has every dtype and overload that a runtime here can read
_EMBEDDED_BYTES = 1024  # larger constants are fed: they are neither copied nor serialised
_PROTOBUF_BYTES = 1 << 30
_LOOP_SECONDS = (
    10.0  # for a loop without a limit of its own: one that takes longer is no constant to store
)


class Evaluation(NamedTuple):
    """What was computed, and why the rest was not.

    Attributes:
        tensors: the wanted values that were computed.
        reasons: for each node that could not be computed, why; nodes that need its results
        included.
    """

    tensors: dict[ir.Value, ir.TensorProtocol]
    reasons: dict[ir.Node, str]


def evaluate(
    nodes: Sequence[ir.Node],
    wanted: Iterable[ir.Value],
    opsets: operators.Opsets,
    *,
    known: Mapping[ir.Value, ir.TensorProtocol] | None = None,
    functions: Functions | None = None,
) -> Evaluation:
    """Runs nodes whose inputs are constants, results of earlier ones, or given in `known`.

    Args:
        nodes: the nodes in topological order; the caller answers for their purity.
        wanted: the values to return.
        opsets: the opset imports that rule the nodes.
        known: tensors of further values.
        functions: the model's functions, where nodes call them.

    A node that fails, or that the runtime has no kernel for, takes nothing down but what needs it.
    Sequences and optionals are computed on the way but not returned.
    """
    run = _Run(opsets, dict(known or {}), dict(functions or {}))
    left = [node for node in nodes if not run.by_numpy(node)]
    targets = list(wanted)
    if left:
        run.by_runtime(left, targets)
    tensors = {value: found for value in targets if (found := run.tensor(value)) is not None}
    return Evaluation(tensors, run.reasons)


def numpy_kernel(node: ir.Node, opsets: operators.Opsets) -> Callable[..., Any] | None:
    """A function from input arrays to output arrays, or None where the node has no exact kernel here.

    The function returns None for inputs on which it is not sure of the last bit, and raises one of
    `kernels.REFUSALS` where node and inputs do not fit together.
    """
    chosen = kernels.kernel(node)
    if chosen is None or operators.has_references(node):
        return None
    operation = kernels.Operation(node, operators.opset(node, opsets) or 0)
    return lambda *inputs: kernels.run(chosen, operation, inputs)


class _Run:
    """One evaluation: what is known so far."""

    def __init__(
        self,
        opsets: operators.Opsets,
        known: dict[ir.Value, ir.TensorProtocol],
        functions: Functions,
    ) -> None:
        self.reasons: dict[ir.Node, str] = {}
        self.opsets = opsets
        self._known = known
        self.functions = functions

    def tensor(self, value: ir.Value) -> ir.TensorProtocol | None:
        """The tensor of a value, or None."""
        return self._known.get(value) or values.constant(value)

    def by_numpy(self, node: ir.Node) -> bool:
        """Computes a node by its kernel; whether that was possible."""
        if node.op_type == "Constant" and not node.domain:
            return values.constant(node.outputs[0]) is not None
        kernel = None if node.op_identifier() in self.functions else numpy_kernel(node, self.opsets)
        tensors = [None if value is None else self.tensor(value) for value in node.inputs]
        absent = (v is not None and t is None for v, t in zip(node.inputs, tensors, strict=True))
        if kernel is None or any(absent):
            return False
        try:
            results = kernel(*(None if tensor is None else tensor.numpy() for tensor in tensors))
        except kernels.REFUSALS:
            return False  # the runtime has the last word, and the better message
        if results is None:
            return False
        for value, array in zip(node.outputs, results, strict=False):
            self._known[value] = _tensor(array)
        return True

    def by_runtime(self, nodes: Sequence[ir.Node], wanted: Iterable[ir.Value]) -> None:
        """Computes nodes in one session; one by one where that fails."""
        made = {value for node in nodes for value in node.outputs}
        targets = [value for value in wanted if value in made]
        # What may end the process is looked at again when its inputs are known.
        safe = not any(self._peril(node) for node in nodes)
        if targets and safe and self._session(nodes, targets, embed=False) is None:
            return
        if not targets:
            return
        for node in nodes:
            self._alone(node)

    def _alone(self, node: ir.Node) -> None:
        """Computes one node, or notes why not."""
        for value in scopes.dependencies(node):
            if self.tensor(value) is None:
                producer = value.producer()
                name = "an input" if producer is None else operators.describe(producer)
                self.reasons[node] = f"needs the result of {name}, which was not computed"
                return
        if self.by_numpy(node):
            return
        if peril := self._peril(node):
            self.reasons[node] = f"{peril}: the runtime would not survive it"
            return
        outputs = [value for value in node.outputs if value.name != "" or value.uses()]
        refusal = self._session([node], outputs, embed=True)
        if refusal is not None:
            self.reasons[node] = refusal
        elif any(self.tensor(value) is None for value in outputs):
            self.reasons[node] = "its result has no NumPy form"

    def _peril(self, node: ir.Node) -> str:
        """Why running a node may end the process, or ""."""
        function = self.functions.get(node.op_identifier())
        inner = () if function is None else scopes.all_nodes(function.graph)
        found = (fatal_division(each, self.tensor) for each in (node, *inner))
        return next(filter(None, found), "")

    def _session(
        self, nodes: Sequence[ir.Node], targets: Sequence[ir.Value], *, embed: bool
    ) -> str | None:
        """Runs nodes in a session and keeps the targets; the reason where that fails, or None."""
        ort = _onnxruntime()
        try:
            plan = _plan(self, nodes, targets, embed=embed)
            session = ort.InferenceSession(
                plan.model.SerializeToString(), _options(ort), providers=["CPUExecutionProvider"]
            )
            feeds = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in plan.feeds.items()}
            names = [plan.names[value] for value in targets]
            limit = _LOOP_SECONDS if may_not_end(nodes) else None
            with stopped_after(limit) as options:
                found = session.run_with_ort_values(names, feeds, options)
        except _failures() as error:
            return str(error).strip().splitlines()[0]
        for value, result in zip(targets, found, strict=True):
            array = _numpy(result)
            if array is not None:
                self._known[value] = _tensor(array)
        return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A model that computes the targets, the name of each value in it, and what to feed."""

    model: onnx.ModelProto
    names: Mapping[ir.Value, str]
    feeds: Mapping[str, Array]


def _plan(
    run: _Run, nodes: Sequence[ir.Node], targets: Sequence[ir.Value], *, embed: bool
) -> _Plan:
    """Wraps nodes into a model of their own."""
    graph = onnx.GraphProto(name="constants")
    names = _names(nodes)
    for node in nodes:
        proto = ir.serde.serialize_node(node)
        proto.input[:] = ["" if value is None else names[value] for value in node.inputs]
        outputs = [
            "" if value.name == "" and not value.uses() else names[value] for value in node.outputs
        ]
        proto.output[:] = outputs
        graph.node.append(proto)
    made = {value for node in nodes for value in node.outputs}
    feeds: dict[str, Array] = {}
    for value, name in names.items():
        tensor = None if value in made else run.tensor(value)
        if tensor is None:
            continue
        if _is_embedded(tensor, embed=embed):
            graph.initializer.append(_initializer(tensor, name))
        else:
            feeds[name] = np.ascontiguousarray(tensor.numpy())
            graph.input.append(_input(tensor, name))
    for value in targets:
        graph.output.add().name = names[value]
    return _Plan(_model(run, graph), names, feeds)


def _names(nodes: Sequence[ir.Node]) -> dict[ir.Value, str]:
    """A name for each value; those that subgraphs capture keep theirs, because they are written there."""
    names: dict[ir.Value, str] = {}
    taken: set[str] = set()
    for node in nodes:
        for graph in operators.subgraphs(node):
            names.update((value, value.name or "") for value in scopes.captures(graph))
            for inner in scopes.all_nodes(graph):
                taken.update(value.name or "" for value in (*inner.outputs, *inner.inputs) if value)
            taken.update(value.name or "" for value in graph.inputs)
    taken.update(names.values())
    fresh = (name for i in itertools.count() if (name := f"c{i}") not in taken)
    for node in nodes:
        for value in (*scopes.dependencies(node), *node.outputs):
            if value not in names:
                names[value] = next(fresh)
    return names


def _is_embedded(tensor: ir.TensorProtocol, *, embed: bool) -> bool:
    """Whether a constant goes into the model rather than being fed.

    Some kernels insist on constants, NumPy knows no bfloat16 that the runtime takes, and strings
    are few.
    """
    native = tensor.dtype != ir.DataType.STRING and tensor.dtype.numpy().kind in "biufc"
    if not native or values.size_bytes(tensor) <= _EMBEDDED_BYTES:
        return True
    return embed and values.size_bytes(tensor) < _PROTOBUF_BYTES


def _initializer(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    """A constant inside the model."""
    if tensor.dtype == ir.DataType.STRING:
        texts = [bytes(text) for text in tensor.numpy().reshape(-1).tolist()]
        proto = onnx.TensorProto(data_type=onnx.TensorProto.STRING, name=name, string_data=texts)
    else:
        proto = onnx.TensorProto(data_type=int(tensor.dtype), name=name, raw_data=tensor.tobytes())
    proto.dims.extend(tensor.shape.numpy())
    return proto


def _input(tensor: ir.TensorProtocol, name: str) -> onnx.ValueInfoProto:
    """A constant that is fed."""
    info = onnx.ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = int(tensor.dtype)
    info.type.tensor_type.shape.SetInParent()
    for size in tensor.shape.numpy():
        info.type.tensor_type.shape.dim.add().dim_value = size
    return info


def _model(run: _Run, graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model of one graph with the imports and functions that it may need."""
    model = onnx.ModelProto(ir_version=_IR_VERSION, graph=graph)
    for domain, version in run.opsets.items():
        model.opset_import.add(domain=domain, version=version)
    for function in run.functions.values():
        model.functions.append(ir.serde.serialize_function(function))
    return model


def _tensor(array: Array) -> ir.TensorProtocol:
    """A result as a tensor; strings as bytes."""
    if array.dtype.kind not in "OUS":
        return ir.Tensor(array)
    texts = [t if isinstance(t, bytes) else str(t).encode() for t in array.reshape(-1).tolist()]
    return ir.StringTensor(texts, shape=ir.Shape(array.shape))


def _numpy(result: Any) -> Array | None:  # noqa: ANN401 - an OrtValue, which has no stubs
    """A result of the runtime as an array, or None where it is no tensor or NumPy has no such type."""
    try:
        return np.asarray(result.numpy()) if result.is_tensor() else None
    except _failures():
        return None


def _onnxruntime() -> ModuleType:
    """ONNX Runtime, imported when first needed: most shape arithmetic never gets here."""
    import onnxruntime  # noqa: PLC0415

    module: ModuleType = onnxruntime
    return module


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: types of its own, which derive from Exception, and built-in ones."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: PLC0415

    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NotImplemented",
        "RuntimeException",
    )
    own: list[Any] = [getattr(state, name) for name in (*names, "EPFail") if hasattr(state, name)]
    return (*own, RuntimeError, ValueError, TypeError)


def _options(ort: ModuleType) -> Any:  # noqa: ANN401 - SessionOptions has no stubs
    """One thread, no optimisation, no repacked weights: the same bits on every run, and those of the reference."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options
