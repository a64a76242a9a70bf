"""Which nodes run on integers: products first, then what lies between them and would force a way back to float.

Source: ONNX Runtime 1.31.1, qdq_selectors.cc; each row checked by building the graph and reading the optimised model.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator

import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.rewrite import name_of
from graphopt_passes.quantize.moves import MOVES, is_move
from graphopt_passes.quantize.reading import addend_of
from graphopt_passes.quantize.styles import MICROSOFT, Style

Allow = Callable[[ir.Node], bool]

POINTWISE = frozenset({"Add", "Mul"})
UNARY = frozenset({"AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})
ABSORBED = frozenset({"Relu", "Clip"})
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_KERNELS = frozenset({*(("", name) for name in PRODUCTS), (MICROSOFT, "FusedMatMul")})
QUANTISED = PRODUCTS | POINTWISE | UNARY | MOVES | {"Concat", "FusedMatMul"}
"""Operators that may run on integers."""


class Role(enum.Enum):
    """What a quantised node is."""

    PRODUCT = "product"  # Conv, Gemm, MatMul with a constant weight
    POINTWISE = "pointwise"  # every operand quantised, the result too
    UNARY = "unary"
    CONCAT = "concat"
    MOVE = "move"  # the same codes elsewhere: one scale before and after


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One node that runs on integers.

    Attributes:
        node: the node.
        role: what it is.
        activations: positions of the inputs that are quantised and not constant.
        result: what is stored: the output of the node, or of the activation behind it.
        absorbed: the Relu or Clip that storing makes redundant, or None.
        stores: whether the result is quantised.
        more: further outputs, those of a Split; stored like the first.
    """

    node: ir.Node
    role: Role
    activations: tuple[int, ...]
    result: ir.Value
    absorbed: ir.Node | None
    stores: bool
    more: tuple[ir.Value, ...] = ()

    @property
    def results(self) -> tuple[ir.Value, ...]:
        """All that it makes."""
        return (self.result, *self.more)

    @property
    def held(self) -> tuple[ir.Value, ...]:
        """All that it stores."""
        return self.results if self.stores else ()


def place(
    graph: ir.Graph,
    style: Style,
    allow: Allow,
    opset: int | None = None,
    stated: frozenset[str] = frozenset(),
) -> dict[ir.Node, Site]:
    """The sites of one graph in order; every node among them satisfies `allow`.

    Args:
        graph: whose nodes may run on integers.
        style: of the runtime.
        allow: which nodes may.
        opset: of the model, where the graph is a body and states none.
        stated: names of nodes that are stored by the user's word, whatever reads them and makes what they read.
    """
    opset = graph.opset_imports.get("", 0) if opset is None else opset
    sites: dict[ir.Node, Site] = {}
    stored: set[ir.Value] = set()
    for node in graph:
        if not allow(node):
            continue
        known = None if name_of(node) in stated and is_passive(node, opset) else stored
        site = _site(node, style, opset, known)
        if site is not None:
            sites[node] = site
            stored.update(site.held)
    if not style.stores_outputs:
        return sites
    return _stored_where_read(_pruned(sites, stated))


def is_passive(node: ir.Node, opset: int) -> bool:
    """Whether a node may be stored in other types though no product does: it computes in float32 alone."""
    operands = node.inputs[:1] if is_move(node, opset) else node.inputs
    kinds = {None if v is None else v.dtype for v in (*operands, *node.outputs)}
    return kinds == {ir.DataType.FLOAT} and _passive_role(node, opset) is not None


def _site(node: ir.Node, style: Style, opset: int, stored: set[ir.Value] | None) -> Site | None:
    """The site of a node, if all that it reads is among what is stored; of None, wherever that comes from."""
    if is_product(node):
        needs = style.stores_outputs and node.op_type == "Conv"
        return _made(node, Role.PRODUCT, (0,), stores=needs)
    is_passed_on = style.stores_outputs and style.activation.bitwidth in (8, 16)
    is_passed_on &= style.activation.is_integer()
    role = _passive_role(node, opset) if is_passed_on or stored is None else None
    if role is None or node.domain:
        return None
    count = 1 if role in (Role.UNARY, Role.MOVE) else len(node.inputs)
    inputs = node.inputs[:count]
    known = stored if stored is not None else {v for v in inputs if v is not None}
    if any(v is None or (v not in known and not values.is_constant(v)) for v in inputs):
        return None
    active = tuple(i for i, v in enumerate(inputs) if not values.is_constant(v))
    constants = [v for v in inputs if values.is_constant(v)]
    if not active or any(v is None or v.dtype is not ir.DataType.FLOAT for v in constants):
        return None
    if role is Role.CONCAT and constants:
        return None
    return _made(node, role, active, stores=True)


def is_product(node: ir.Node) -> bool:
    """Whether the node is a product of float32 with a constant weight that an integer kernel takes.

    Such as Conv, Gemm, MatMul and FusedMatMul; what a Gemm adds may be computed, and is added behind then.
    """
    if (node.domain, node.op_type) not in _KERNELS or len(node.inputs) < 2:
        return False
    weight, data = values.constant(node.inputs[1]), node.inputs[0]
    if weight is None or weight.dtype is not ir.DataType.FLOAT or values.is_constant(data):
        return False
    rank = len(weight.shape)
    if node.op_type == "Conv":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return 3 <= rank <= 5 and (bias is None or values.is_constant(bias))
    turns = ("transA", "transBatchA", "transBatchB")
    return rank == 2 and not any(operators.attribute(node, name, 0) for name in turns)


def _passive_role(node: ir.Node, opset: int) -> Role | None:
    if is_move(node, opset):
        return Role.MOVE
    if len(node.outputs) != 1:
        return None
    if node.op_type in POINTWISE:
        return Role.POINTWISE
    if node.op_type in UNARY:
        return Role.UNARY
    return Role.CONCAT if node.op_type == "Concat" else None


def _made(node: ir.Node, role: Role, active: tuple[int, ...], *, stores: bool) -> Site:
    output = node.outputs[0]
    alone = role is Role.POINTWISE or (role is Role.PRODUCT and addend_of(node) is None)
    after = _absorbed(output) if alone else None
    result = output if after is None else after.outputs[0]
    return Site(node, role, active, result, after, stores, tuple(node.outputs[1:]))


def _absorbed(value: ir.Value) -> ir.Node | None:
    """The Relu, or Clip with constant bounds around zero, that alone reads a value."""
    uses = tuple(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    node = uses[0].node
    if node.domain or node.op_type not in ABSORBED or node.graph is not value.graph:
        return None
    return node if clip_bounds(node) is not None else None


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or Clip lets through, where that is constant and holds zero."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = []
    for index, name, default in ((1, "min", -float("inf")), (2, "max", float("inf"))):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None and not value.is_initializer():
            return None  # the runtime looks at initializers only
        found = operators.attribute(node, name, default) if value is None else values.scalar(value)
        if found is None:
            return None
        ends.append(float(found))
    return (ends[0], ends[1]) if ends[0] <= 0 <= ends[1] else None


def _pruned(sites: dict[ir.Node, Site], stated: frozenset[str]) -> dict[ir.Node, Site]:
    """Without passive sites that no product reads in the end: nothing would be gained behind them."""
    kept: dict[ir.Node, Site] = {}
    for node, site in reversed(sites.items()):
        if site.role is Role.PRODUCT or name_of(node) in stated or _feeds(site, kept):
            kept[node] = site
    return dict(reversed(kept.items()))


def _feeds(site: Site, kept: dict[ir.Node, Site]) -> bool:
    return any(
        use.node in kept and use.idx in kept[use.node].activations
        for value in site.results
        for use in value.uses()
    )


def _stored_where_read(sites: dict[ir.Node, Site]) -> dict[ir.Node, Site]:
    """Gemm and MatMul store what another site reads: a result that is both quantised and float fuses with neither.

    Not where something is added behind: the sum is float.
    """
    return {
        node: dataclasses.replace(
            site, stores=site.stores or (addend_of(node) is None and _feeds(site, sites))
        )
        for node, site in sites.items()
    }


def residual_inputs(graph: ir.Graph, sites: dict[ir.Node, Site]) -> list[tuple[ir.Node, int]]:
    """For runtimes that fuse Conv and Add: which operand of each residual Add is the identity, to be quantised.

    The other, made by a convolution for this Add alone, stays float and is fused with it.  Where both are, the one
    nearer to where the branches part is the identity: its convolution reads what others read too.
    """
    found = []
    for node in graph:
        if node.op_type != "Add" or node.domain:
            continue
        fused = [_ends_in_conv(value, sites) for value in node.inputs]
        if any(values.is_constant(value) for value in node.inputs) or not any(fused):
            continue
        if all(fused):
            short = [_reads_shared(value) for value in node.inputs]
            if short[0] != short[1]:
                found.append((node, short.index(True)))
        else:
            found.append((node, fused.index(False)))
    return found


def candidates(
    graph: ir.Graph, style: Style, allow: Allow, stated: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Names of all values that a placement may quantise: those to be observed."""
    sites = place(graph, style, allow, stated=stated)
    found: dict[str, None] = {}
    for site in sites.values():
        for index in site.activations:
            value = site.node.inputs[index]
            assert value is not None
            found[value.name or ""] = None
        found.update((value.name or "", None) for value in site.held)
    for value in () if style.stores_outputs else _summands(graph, sites):
        found[value.name or ""] = None
    return tuple(found)


def _summands(graph: ir.Graph, sites: dict[ir.Node, Site]) -> Iterator[ir.Value]:
    """What may be the identity of a residual sum: either operand, by which convolutions stay float in the end."""
    for node in graph:
        if node.op_type == "Add" and not node.domain:
            operands = [v for v in node.inputs if v is not None and not values.is_constant(v)]
            if len(operands) > 1 and any(_ends_in_conv(each, sites) for each in operands):
                yield from operands


def _ends_in_conv(value: ir.Value | None, sites: dict[ir.Node, Site]) -> bool:
    producer = value.producer() if value is not None else None
    return (
        producer is not None
        and producer in sites
        and producer.op_type == "Conv"
        and value is not None
        and len(value.uses()) == 1
    )


def _reads_shared(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    source = producer.inputs[0] if producer is not None else None
    return source is not None and len(source.uses()) > 1
