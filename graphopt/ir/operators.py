"""Questions about operators: schema, attribute values, purity, elementwise, commutative.

What an operator is, follows from its domain, its type and the opset that its graph imports. A
subgraph of `onnx_ir` carries no imports of its own and no link to its parent, so every question
that depends on the opset takes the imports (`scopes.all_graphs` yields them with each graph). A
domain without a schema in `onnx.defs` is opaque: never pure.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar, overload

import onnx
import onnx.defs
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir import values

Opsets: TypeAlias = Mapping[str, int]
T = TypeVar("T")

MICROSOFT = "com.microsoft"
_MAX_VERSION = 2**31 - 1  # what onnx's own C++ can hold; a file may say more

# Marked random or unknown in the schemas of onnx 1.23, but a function of their inputs (control
# flow: see `is_pure`).
_DETERMINISTIC_AFTER_ALL = frozenset({"AffineGrid", "If", "Loop", "Scan", "SequenceMap", "Dropout"})
_RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
# Contrib operators of ONNX Runtime that graphopt emits or reads; all are functions of their inputs.
_PURE_CONTRIB = frozenset(
    {
        "Attention",
        "BiasGelu",
        "BiasSplitGelu",
        "ConvTransposeWithDynamicPads",
        "DequantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "EmbedLayerNormalization",
        "ExpandDims",
        "FastGelu",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "GatherBlockQuantized",
        "GatherND",
        "Gelu",
        "GroupNorm",
        "GroupQueryAttention",
        "Inverse",
        "MatMulBnb4",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MultiHeadAttention",
        "NhwcConv",
        "NhwcMaxPool",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "Pad",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMul",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
        "QMoE",
        "MoE",
        "QuantizeLinear",
        "QuickGelu",
        "Range",
        "RelativePositionBias",
        "RotaryEmbedding",
        "SkipGroupNorm",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "SparseToDenseMatMul",
        "TransposeMatMul",
        "Trilu",
        "Unique",
        "CDist",
    }
)
# ONNX Runtime registers these two in the default domain, without a schema in onnx.
_PURE_UNLISTED = frozenset({"SimplifiedLayerNormalization", "FusedConv"})

_UNARY = frozenset(
    {
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BitwiseNot",
        "Cast",
        "CastLike",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Cosh",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsInf",
        "IsNaN",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
    }
)
_UNARY_CONTRIB = frozenset({"Gelu", "FastGelu", "QuickGelu"})
_BINARY = frozenset(
    {
        "Add",
        "And",
        "BitShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Mod",
        "Mul",
        "Or",
        "Pow",
        "PRelu",
        "Sub",
        "Xor",
    }
)
_VARIADIC = frozenset({"Max", "Mean", "Min", "Sum"})
_COMMUTATIVE = frozenset(
    {
        "Add",
        "And",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Equal",
        "Max",
        "Mean",
        "Min",
        "Mul",
        "Or",
        "Sum",
        "Xor",
    }
)
_QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})

HOLDERS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""The operators of ai.onnx with graphs among their attributes (onnx 1.23)."""

_PYTHON_TYPES: Mapping[ir.AttributeType, type] = {
    ir.AttributeType.INT: int,
    ir.AttributeType.FLOAT: float,
    ir.AttributeType.STRING: str,
    ir.AttributeType.INTS: tuple,
    ir.AttributeType.FLOATS: tuple,
    ir.AttributeType.STRINGS: tuple,
}


def opset(node: ir.Node, opsets: Opsets) -> int | None:
    """The version at which the node's domain is imported, or None where it is not imported."""
    if node.version is not None:
        return node.version
    return opsets.get(node.domain) or (None if node.domain else opsets.get("ai.onnx"))


def schema(node: ir.Node, opsets: Opsets) -> onnx.defs.OpSchema | None:
    """The schema that rules the node, or None where onnx defines no such operator."""
    version = opset(node, opsets)
    return None if version is None else find_schema(node.op_type, version, node.domain)


@functools.lru_cache(maxsize=4096)
def find_schema(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    """The newest schema of an operator that is not newer than `version`, or None."""
    if version > _MAX_VERSION:
        return None
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


@overload
def attribute(node: ir.Node, name: str, default: T, opsets: Opsets | None = None) -> T: ...
@overload
def attribute(
    node: ir.Node, name: str, default: None = None, opsets: Opsets | None = None
) -> Any: ...  # noqa: ANN401 - what an attribute holds is known to the caller alone
def attribute(node: ir.Node, name: str, default: Any = None, opsets: Opsets | None = None) -> Any:
    """The value of an attribute: the node's, else the schema's default, else `default`.

    The schema is looked at where `opsets` is given. Lists are tuples. An integer is accepted where
    `default` is a float.

    Raises:
        ModelError: the attribute has another type than `default`, or refers to a parameter of the
            enclosing function and so has no value before the call.
    """
    held = node.attributes.data.get(name)  # the dictionary within, which answers sooner
    if held is None:
        found = None if opsets is None else _schema_default(node, name, opsets)
        return default if found is None else found
    if held.is_ref():
        raise ModelError(
            f"attribute {name!r} of {describe(node)} refers to parameter {held.ref_attr_name!r} of "
            "the enclosing function and has no value there: inline the function first"
        )
    if isinstance(default, float) and held.type == ir.AttributeType.INT:
        return float(held.value)
    expected = None if default is None else type(default)
    if expected not in (None, bool) and expected is not _PYTHON_TYPES.get(held.type, expected):
        raise ModelError(
            f"attribute {name!r} of {describe(node)} is {held.type.name}, expected "
            f"{type(default).__name__}: the model does not follow the operator's schema"
        )
    return bool(held.value) if expected is bool else held.value


def has_references(node: ir.Node) -> bool:
    """Whether an attribute of the node takes its value from the call of its function."""
    return any(attribute.is_ref() for attribute in node.attributes.data.values())


def describe(node: ir.Node) -> str:
    """How messages name a node: operator, and its name or else its first output."""
    kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    label = node.name or next((f"-> {out.name}" for out in node.outputs if out.name), "unnamed")
    return f"{kind} ({label})"


def subgraphs(node: ir.Node) -> tuple[ir.Graph, ...]:
    """The graphs that the node holds as attributes, in the order of its attributes."""
    if not node.domain and node.op_type not in HOLDERS:
        return ()  # asked of every node of every walk
    graphs: list[ir.Graph] = []
    for held in node.attributes.data.values():
        if held.is_ref():
            continue
        if held.type == ir.AttributeType.GRAPH:
            graphs.append(held.as_graph())
        elif held.type == ir.AttributeType.GRAPHS:
            graphs.extend(held.as_graphs())
    return tuple(graphs)


def has_subgraph(node: ir.Node) -> bool:
    """Whether the node holds graphs (If, Loop, Scan, SequenceMap and custom ones)."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(held.type in kinds for held in node.attributes.data.values())


def is_pure(node: ir.Node, opsets: Opsets, functions: Iterable[ir.OperatorIdentifier] = ()) -> bool:
    """Whether equal inputs always give equal outputs and nothing else happens.

    Such a node may be folded and merged. Random operators are not, nor is Dropout that may run in
    training mode, nor any operator without a schema here: a custom operator, or one of the model's
    `functions` (inline it first). Control flow is as pure as its bodies.
    """
    if node.op_identifier() in functions:
        return False
    if node.domain == MICROSOFT:
        return node.op_type in _PURE_CONTRIB
    rule = schema(node, opsets)
    if rule is None:
        return not node.domain and node.op_type in _PURE_UNLISTED
    if not _is_deterministic(rule) or (node.op_type == "Dropout" and _may_train(node, opsets)):
        return False
    return all(is_pure(inner, opsets, functions) for graph in subgraphs(node) for inner in graph)


def is_elementwise_unary(node: ir.Node) -> bool:
    """Whether output element i depends on element i of input 0 only (others are scalars)."""
    if node.domain == MICROSOFT:
        return node.op_type in _UNARY_CONTRIB
    return not node.domain and node.op_type in _UNARY


def is_elementwise_binary(node: ir.Node) -> bool:
    """Whether the node combines two inputs element by element with broadcasting."""
    if node.domain:
        return False
    return node.op_type in _BINARY or (node.op_type in _VARIADIC and len(node.inputs) == 2)


def is_elementwise(node: ir.Node) -> bool:
    """Whether each output element depends on the elements at its (broadcast) position only."""
    if not node.domain and node.op_type in (_VARIADIC | {"Where"}):
        return True
    return is_elementwise_unary(node) or is_elementwise_binary(node)


def is_commutative(node: ir.Node) -> bool:
    """Whether the inputs may be exchanged without any change of the result (NaN payloads aside)."""
    return commutes(node.op_type, node.domain)


def commutes(op_type: str, domain: str) -> bool:
    """As `is_commutative`, of the operator."""
    return not domain and op_type in _COMMUTATIVE


def is_quantization(node: ir.Node) -> bool:
    """Whether the node converts to or from quantised integers: folding it undoes that."""
    return node.domain in ("", MICROSOFT) and node.op_type in _QUANTIZATION


def _schema_default(node: ir.Node, name: str, opsets: Opsets) -> Any:  # noqa: ANN401
    """The default that the schema gives an attribute, in onnx_ir's Python form, or None."""
    rule = schema(node, opsets)
    return None if rule is None else default_of(rule, name)


def default_of(rule: onnx.defs.OpSchema, name: str) -> Any:  # noqa: ANN401
    """The default that a schema gives an attribute, in onnx_ir's Python form, or None."""
    return _default_of(rule.name, rule.since_version, rule.domain, name)


@functools.lru_cache(maxsize=4096)
def _default_of(op_type: str, version: int, domain: str, name: str) -> Any:  # noqa: ANN401
    """The default of one attribute of one version of an operator, or None."""
    rule = onnx.defs.get_schema(op_type, version, domain)
    held = rule.attributes.get(name)
    if held is None or not held.default_value.name:
        return None
    return ir.serde.deserialize_attribute(held.default_value).value


def _is_deterministic(rule: onnx.defs.OpSchema) -> bool:
    """Whether an operator of onnx draws no random numbers.

    onnx 1.23 marks control flow and AffineGrid as random, DepthToSpace as unknown; older releases
    mark nothing.
    """
    if rule.name in _RANDOM:
        return False
    if rule.name in _DETERMINISTIC_AFTER_ALL:
        return True
    determinism = getattr(rule, "node_determinism", None)
    return determinism is None or determinism.name != "NonDeterministic"


def _may_train(node: ir.Node, opsets: Opsets) -> bool:
    """Whether a Dropout may drop: `is_test` unset (opset 6), `training_mode` not false (12)."""
    version = opset(node, opsets) or 0
    if version < 7:
        return not attribute(node, "is_test", 0)
    if version < 12 or len(node.inputs) < 3:
        return False
    mode = node.inputs[2]
    return mode is not None and _constant_bool(mode) is not False


def _constant_bool(value: ir.Value) -> bool | None:
    """The truth of a constant scalar, or None."""
    found = values.scalar(value)
    return None if found is None else bool(found)
