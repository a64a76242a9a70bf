"""Inference by onnx's own code, one node at a time, for the operators that have no rule here.

Dimensions travel through as names, so that a size that onnx passes along is recognised as the dim
it was. Only nodes that satisfy the arity of their schema are handed over: the code is C++ and
trusts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.checker
import onnx.shape_inference
import onnx_ir as ir

from graphopt.ir import operators
from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim
from graphopt.ir.shapes.facts import UNKNOWN, Dims, Facts
from graphopt.ir.shapes.query import Query

_FAILURES = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
)


def infer(q: Query, opsets: operators.Opsets) -> Sequence[Facts] | None:
    """The facts of the outputs, or None where onnx does not know the operator or cannot tell."""
    schema = operators.find_schema(q.node.op_type, q.version, q.node.domain)
    if schema is None or schema.deprecated or not schema.has_type_and_shape_inference_function:
        return None
    if not _is_legal(q, schema):
        return None
    translation = _Names()
    types = {}
    for index, given in enumerate(q.inputs):
        if given is None:
            continue
        kind = translation.type_proto(given)
        if kind is None:
            return None
        types[f"i{index}"] = kind
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema,
            _node_proto(q),
            types,
            _constants(q),
            None,
            [onnx.OperatorSetIdProto(domain=d, version=v) for d, v in opsets.items()],
            onnx.IR_VERSION,
        )
    except _FAILURES:
        return None
    return [
        translation.facts(found[f"o{index}"], q, index) if f"o{index}" in found else UNKNOWN
        for index in range(len(q.node.outputs))
    ]


def _is_legal(q: Query, schema: onnx.defs.OpSchema) -> bool:
    """Whether number of inputs and outputs and the required attributes satisfy the schema."""
    count, outputs = len(q.inputs), len(q.node.outputs)
    if not schema.min_input <= count <= schema.max_input:
        return False
    if not schema.min_output <= outputs <= schema.max_output:
        return False
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    for formal, given in zip(schema.inputs, q.inputs, strict=False):
        if given is None and formal.option != optional:
            return False
    required = (name for name, held in schema.attributes.items() if held.required)
    return all(q.operation.held(name) is not None for name in required)


def _node_proto(q: Query) -> onnx.NodeProto:
    """The node with plain names, parameters of the function replaced by their values."""
    proto = onnx.NodeProto(op_type=q.node.op_type, domain=q.node.domain)
    proto.input.extend("" if given is None else f"i{index}" for index, given in enumerate(q.inputs))
    proto.output.extend(f"o{index}" for index in range(len(q.node.outputs)))
    for name in q.node.attributes:
        held = q.operation.held(name)
        if held is not None and held.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            bound = ir.Attr(name, held.type, held.value)
            proto.attribute.append(ir.serde.serialize_attribute(bound))
    return proto


def _constants(q: Query) -> dict[str, onnx.TensorProto]:
    """The small inputs that are known numbers, for operators whose shapes depend on them."""
    result = {}
    for index, given in enumerate(q.inputs):
        array = None if given is None or given.data is None else given.data.static()
        if array is not None:
            result[f"i{index}"] = ir.serde.serialize_tensor(ir.Tensor(array))
    return result


class _Names:
    """Dims as dim_params and back, within one question."""

    def __init__(self) -> None:
        self._names: dict[Dim, str] = {}
        self._dims: dict[str, Dim] = {}

    def type_proto(self, given: Facts) -> onnx.TypeProto | None:
        """The type of an input in onnx's form, or None where even the element type is not known."""
        if given.type is None:
            return None
        proto: onnx.TypeProto = ir.serde.serialize_type(given.type)
        inner = _tensor_part(proto)
        if given.dims is not None and inner is not None:
            inner.shape.SetInParent()
            for dim in given.dims:
                if dim.value is not None:
                    inner.shape.dim.add().dim_value = dim.value
                else:
                    inner.shape.dim.add().dim_param = self._name(dim)
        return proto

    def facts(self, proto: onnx.TypeProto, q: Query, output: int) -> Facts:
        """An inferred type as facts; a dimension that onnx leaves open is an unknown one."""
        if proto.WhichOneof("value") is None:
            return UNKNOWN
        inner = _tensor_part(proto)
        if inner is None or not inner.elem_type:
            return UNKNOWN
        dims: Dims | None = None
        if inner.HasField("shape"):
            sizes = enumerate(inner.shape.dim)
            dims = tuple(self._dim(size) or q.fresh(output, axis) for axis, size in sizes)
        if proto.HasField("tensor_type"):
            return facts.tensor(ir.DataType(inner.elem_type), dims)
        return Facts(
            ir.serde.deserialize_type_proto_for_type(proto), _closed(dims, proto, q, output)
        )

    def _name(self, dim: Dim) -> str:
        name = self._names.setdefault(dim, f"d{len(self._names)}")
        self._dims[name] = dim
        return name

    def _dim(self, size: onnx.TensorShapeProto.Dimension) -> Dim | None:
        if size.HasField("dim_value"):
            return Dim.of(size.dim_value) if size.dim_value >= 0 else None
        return self._dims.get(size.dim_param)


def _closed(dims: Dims | None, proto: onnx.TypeProto, q: Query, output: int) -> Dims | None:
    """The dims of a container, or None where one is open: its tensors may differ there."""
    if proto.HasField("sparse_tensor_type"):
        return dims
    fresh = None if dims is None else {q.fresh(output, axis) for axis in range(len(dims))}
    return None if dims is None or fresh is None or fresh & set(dims) else dims


def _tensor_part(proto: onnx.TypeProto) -> onnx.TypeProto.Tensor | None:
    """The innermost tensor type of a type."""
    while True:
        kind = proto.WhichOneof("value")
        if kind == "sequence_type":
            proto = proto.sequence_type.elem_type
        elif kind == "optional_type":
            proto = proto.optional_type.elem_type
        elif kind == "tensor_type":
            return proto.tensor_type
        elif kind == "sparse_tensor_type":
            return proto.sparse_tensor_type
        else:
            return None
