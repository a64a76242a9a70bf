"""Small random graphs, valid by construction: what passes meet in the wild, in all the wrong orders.

Subgraphs that capture, shared constants, omitted optional inputs, outputs in the middle, duplicated nodes, unused
outputs of multi-output nodes, symbolic dims, shape arithmetic, training leftovers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.checker
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
BATCH = 3  # what the symbolic dim N is when the graph runs


@dataclasses.dataclass(frozen=True)
class Item:
    """A value in reach: its name, its concrete shape at N = BATCH, and whether N is its first dim."""

    name: str
    shape: tuple[int, ...]


class Grower:
    """Grows a graph node by node; every choice is drawn from hypothesis, so that failures shrink."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any], prefix: str = "") -> None:
        self.draw = draw
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.values: list[Item] = []
        self.count = 0

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{self.prefix}{kind}{self.count}"

    def pick(self, keep: Callable[[Item], bool] = lambda _: True) -> Item | None:
        fitting = [item for item in self.values if keep(item)]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    def constant(self, array: np.ndarray[Any, Any], name: str | None = None) -> str:
        name = name or self.fresh("c")
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def floats(self, shape: tuple[int, ...]) -> str:
        """A constant: shared with an earlier one of the same shape, a special number, or random."""
        same = [n for n, t in self.constants.items() if tuple(t.dims) == shape and t.data_type == 1]
        kind = self.draw(st.sampled_from(["random", "one", "zero", "shared", "two"]))
        if kind == "shared" and same:
            return str(self.draw(st.sampled_from(same)))
        fill = {"one": 1.0, "zero": 0.0, "two": 2.0}.get(kind)
        seed = self.draw(st.integers(0, 3))
        data = np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)
        return self.constant(data if fill is None else np.full(shape, fill, np.float32))

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> Item:
        name = self.fresh("v")
        label = self.draw(st.sampled_from(["", f"{self.prefix}{op}_{self.count}"]))
        self.nodes.append(helper.make_node(op, inputs, [name], name=label, **attributes))
        item = Item(name, shape)
        self.values.append(item)
        return item

    def grow(self) -> None:
        """Adds one construct."""
        step = self.draw(st.sampled_from(STEPS))
        step(self)


def unary(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    op = g.draw(
        st.sampled_from(["Relu", "Neg", "Abs", "Identity", "Sigmoid", "Tanh", "Floor", "Sign"])
    )
    g.node(op, [x.name], x.shape)


def twice(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    g.node("Sigmoid", [x.name], x.shape)
    g.node("Sigmoid", [x.name], x.shape)


def binary(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    y = g.pick(lambda item: item.shape == x.shape)
    assert y is not None
    op = g.draw(st.sampled_from(["Add", "Mul", "Sub", "Max", "Min"]))
    g.node(op, [x.name, y.name], x.shape)


def with_constant(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    shapes = [(), (1,), x.shape[-1:], x.shape[1:] or (1,)]
    c = g.floats(g.draw(st.sampled_from([s for s in shapes if len(s) <= len(x.shape)])))
    op = g.draw(st.sampled_from(["Add", "Mul", "Sub", "Div", "Pow"]))
    if op in ("Add", "Mul") and g.draw(st.booleans()):
        g.node(op, [c, x.name], x.shape)
        return
    if op == "Pow":  # of a non-negative number: NaN would hide every later difference
        x = g.node("Abs", [x.name], x.shape)
    if op == "Div":
        c = g.constant(np.full((), g.draw(st.sampled_from([1.0, 2.0, 3.0])), np.float32))
    g.node(op, [x.name, c], x.shape)


def casts(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    to = g.draw(st.sampled_from([TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.FLOAT16]))
    name = g.fresh("v")
    g.nodes.append(helper.make_node("Cast", [x.name], [name], to=to))
    g.node("Cast", [name], x.shape, to=TensorProto.FLOAT)


def dropout(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    ratio = g.constant(np.array(0.25, np.float32))
    inputs = g.draw(st.sampled_from([[x.name], [x.name, "", ""], [x.name, ratio]]))
    name, mask = g.fresh("v"), g.fresh("v")
    outputs = g.draw(st.sampled_from([[name], [name, mask], [name, ""]]))
    g.nodes.append(helper.make_node("Dropout", inputs, outputs))
    g.values.append(Item(name, x.shape))


def clip(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    low = g.constant(np.array(g.draw(st.sampled_from([0.0, -1.0])), np.float32))
    high = g.constant(np.array(g.draw(st.sampled_from([6.0, 1.0])), np.float32))
    g.node(
        "Clip",
        g.draw(st.sampled_from([[x.name], [x.name, low], [x.name, "", high], [x.name, low, high]])),
        x.shape,
    )


def transpose(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    perm = g.draw(st.permutations(range(len(x.shape))))
    g.node("Transpose", [x.name], tuple(x.shape[i] for i in perm), perm=list(perm))


def views(g: Grower) -> None:
    x = g.pick(lambda item: len(item.shape) < 5)
    assert x is None or x.shape is not None
    if x is None:
        return
    axis = g.draw(st.integers(0, len(x.shape)))
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    y = g.node("Unsqueeze", [x.name, g.ints(axis)], shape)
    if g.draw(st.booleans()):
        g.node("Squeeze", [y.name, g.ints(axis)], x.shape)


def reshape(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    size = int(np.prod(x.shape))
    last = g.draw(st.sampled_from([d for d in (1, 2, 4, x.shape[-1]) if size % d == 0]))
    flat = g.node("Reshape", [x.name, g.ints(-1, last)], (size // last, last))
    if g.draw(st.booleans()) and x.shape[0] == BATCH:
        g.node("Reshape", [flat.name, g.ints(-1, size // BATCH)], (BATCH, size // BATCH))


def shape_path(g: Grower) -> None:
    """What exporters write for `x.view(x.size(0), -1)`."""
    x = g.pick()
    assert x is not None
    whole, dim, dims, target = (g.fresh("s") for _ in range(4))
    g.nodes.append(helper.make_node("Shape", [x.name], [whole]))
    g.nodes.append(
        helper.make_node("Gather", [whole, g.constant(np.array(0, np.int64))], [dim], axis=0)
    )
    g.nodes.append(helper.make_node("Unsqueeze", [dim, g.ints(0)], [dims]))
    g.nodes.append(helper.make_node("Concat", [dims, g.ints(-1)], [target], axis=0))
    g.node("Reshape", [x.name, target], (x.shape[0], int(np.prod(x.shape[1:]))))


def slices(g: Grower) -> None:
    x = g.pick(lambda item: item.shape[-1] >= 2)
    if x is None:
        return
    whole = g.draw(st.booleans())
    end = np.iinfo(np.int64).max if whole else x.shape[-1] - 1
    shape = x.shape if whole else (*x.shape[:-1], x.shape[-1] - 1)
    g.node("Slice", [x.name, g.ints(0), g.ints(int(end)), g.ints(-1)], shape)


def concat_split(g: Grower) -> None:
    x = g.pick(lambda item: int(np.prod(item.shape)) <= 256)
    if x is None:
        return
    axis = len(x.shape) - 1
    count = g.draw(st.integers(1, 2))
    joined = g.node("Concat", [x.name] * count, (*x.shape[:-1], x.shape[-1] * count), axis=axis)
    if count == 2 and g.draw(st.booleans()):
        left, right = g.fresh("v"), g.fresh("v")
        g.nodes.append(
            helper.make_node("Split", [joined.name], [left, right], axis=axis, num_outputs=2)
        )
        g.values.append(Item(left, x.shape))
        if g.draw(st.booleans()):
            g.values.append(Item(right, x.shape))


def reduce(g: Grower) -> None:
    x = g.pick(lambda item: len(item.shape) >= 2)
    if x is None:
        return
    op = g.draw(st.sampled_from(["ReduceSum", "ReduceMean", "ReduceMax"]))
    keep = g.draw(st.integers(0, 1))
    shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
    g.node(op, [x.name, g.ints(-1)], shape, keepdims=keep)


def linear(g: Grower) -> None:
    x = g.pick(lambda item: len(item.shape) >= 2)
    if x is None:
        return
    width = g.draw(st.sampled_from([2, 4]))
    y = g.node("MatMul", [x.name, g.floats((x.shape[-1], width))], (*x.shape[:-1], width))
    if g.draw(st.booleans()):
        g.node("Add", [y.name, g.floats((width,))], y.shape)


def expand(g: Grower) -> None:
    x = g.pick()
    assert x is not None
    target = g.draw(st.sampled_from([(1,), x.shape]))
    g.node("Expand", [x.name, g.ints(*target)], x.shape)


def choose(g: Grower) -> None:
    x = g.pick()
    y = None if x is None else g.pick(lambda item: item.shape == x.shape)
    assert x is not None
    assert y is not None
    c = g.constant(np.array(g.draw(st.booleans())))
    g.node("Where", [c, x.name, y.name], x.shape)


def branch(g: Grower) -> None:
    """An If whose branches capture values of the graph around it."""
    x = g.pick()
    assert x is not None
    constant = g.draw(st.booleans())
    cond = g.constant(np.array(g.draw(st.booleans()))) if constant else "flag"
    graphs = []
    for side in ("t", "e"):
        inner = Grower(g.draw, f"{g.fresh('b')}{side}_")
        inner.values = [x]
        for _ in range(g.draw(st.integers(1, 2))):
            unary(inner)
        result = inner.node("Identity", [inner.values[-1].name], x.shape)
        info = helper.make_tensor_value_info(result.name, TensorProto.FLOAT, None)
        graphs.append(
            helper.make_graph(
                inner.nodes, f"{side}_branch", [], [info], list(inner.constants.values())
            )
        )
    g.node("If", [cond], x.shape, then_branch=graphs[0], else_branch=graphs[1])


def twin_branches(g: Grower) -> None:
    """An If with two results: equal branches or not, a value of the outside or a constant given back, one unread."""
    x = g.pick()
    assert x is not None
    equal = g.draw(st.booleans())
    graphs = []
    for side in ("t", "e"):
        inner = Grower(g.draw, f"{g.fresh('b')}{side}_")
        work = inner.node("Neg" if equal or side == "t" else "Abs", [x.name], x.shape)
        inner.node("Add", [work.name, inner.constant(np.array(2.0, np.float32))], x.shape)
        kind = "Identity" if equal else g.draw(st.sampled_from(["Identity", "Sign"]))
        other = inner.node(kind, [x.name], x.shape)
        ends = [inner.values[1].name, other.name]
        infos = [helper.make_tensor_value_info(e, TensorProto.FLOAT, None) for e in ends]
        graphs.append(
            helper.make_graph(inner.nodes, side, [], infos, list(inner.constants.values()))
        )
    names = [g.fresh("v"), g.fresh("v")]
    g.nodes.append(
        helper.make_node("If", ["flag"], names, then_branch=graphs[0], else_branch=graphs[1])
    )
    g.values += [Item(name, x.shape) for name in names if g.draw(st.booleans())]


def loop(g: Grower) -> None:
    """A Loop that carries one value it changes, one it does not, and one that feeds only itself; and stacks rows."""
    x = g.pick(lambda item: len(item.shape) < 4)
    if x is None:
        return
    turns = g.draw(st.sampled_from([0, 1, 2, 40]))
    inner = Grower(g.draw, f"{g.fresh('l')}_")
    p = inner.prefix
    outer = inner.node("Exp" if g.draw(st.booleans()) else "Sign", [x.name], x.shape)
    half = inner.constant(np.array(0.5, np.float32))
    scaled = inner.node("Mul", [f"{p}a", half], x.shape)
    changed = inner.node("Add", [scaled.name, outer.name], x.shape)
    row = inner.node("Sub", [changed.name, f"{p}k"], x.shape)
    alone = inner.node("Tanh", [f"{p}s"], x.shape)
    inner.nodes.append(helper.make_node("Identity", [f"{p}c"], [f"{p}d"]))
    kept = f"{p}k" if g.draw(st.booleans()) else inner.node("Identity", [f"{p}k"], x.shape).name
    if kept == f"{p}k":
        kept = inner.node("Abs", [f"{p}k"], x.shape).name
    info = helper.make_tensor_value_info
    inputs = [info(f"{p}i", TensorProto.INT64, []), info(f"{p}c", TensorProto.BOOL, [])]
    inputs += [info(f"{p}{n}", TensorProto.FLOAT, None) for n in "aks"]
    ends = [changed.name, kept, alone.name, row.name]
    outputs = [info(f"{p}d", TensorProto.BOOL, [])]
    outputs += [info(n, TensorProto.FLOAT, None) for n in ends]
    body = helper.make_graph(
        inner.nodes, f"{p}body", inputs, outputs, list(inner.constants.values())
    )
    count = g.constant(np.array(turns, np.int64)) if g.draw(st.booleans()) else "turns"
    names = [g.fresh("v") for _ in range(4)]
    g.nodes.append(helper.make_node("Loop", [count, "", x.name, x.name, x.name], names, body=body))
    made = [Item(name, x.shape) for name in names[:3]]
    g.values += [item for item in made if g.draw(st.booleans())]


def scan(g: Grower) -> None:
    """A Scan along the last axis, forwards or backwards, with a state that no turn changes and an input unread."""
    x = g.pick(lambda item: len(item.shape) == 2)
    if x is None:
        return
    inner = Grower(g.draw, f"{g.fresh('n')}_")
    p = inner.prefix
    start = g.node("ReduceSum", [x.name, g.ints(-1)], x.shape[:-1], keepdims=0)
    g.values.pop()
    total = inner.node("Add", [f"{p}a", f"{p}v"], start.shape)
    row = inner.node("Mul", [total.name, f"{p}k"], start.shape)
    same = inner.node("Identity", [f"{p}k"], start.shape)
    info = helper.make_tensor_value_info
    inputs = [info(f"{p}{n}", TensorProto.FLOAT, None) for n in "akvu"]
    outputs = [info(n, TensorProto.FLOAT, None) for n in (total.name, same.name, row.name)]
    names = [g.fresh("v") for _ in range(3)]
    way = g.draw(st.integers(0, 1))
    g.nodes.append(
        helper.make_node(
            "Scan",
            [start.name, start.name, x.name, x.name],
            names,
            num_scan_inputs=2,
            scan_input_axes=[1, -1],
            scan_input_directions=[way, 0],
            scan_output_axes=[-1],
            scan_output_directions=[way],
            body=helper.make_graph(inner.nodes, f"{p}body", inputs, outputs),
        )
    )
    g.values.append(Item(names[2], x.shape))


STEPS = (
    unary, twice, binary, with_constant, with_constant, casts, dropout, clip, transpose, views, reshape,
    shape_path, slices, concat_split, reduce, linear, expand, choose, branch,
    twin_branches, loop, scan,
)  # fmt: skip


@st.composite
def models(draw: Callable[[st.SearchStrategy[Any]], Any]) -> onnx.ModelProto:
    """A valid model of 5 to 15 constructs with inputs x [N, 4], z [N, 2, 4], flag and turns."""
    g = Grower(draw)
    g.values = [Item("x", (BATCH, 4)), Item("z", (BATCH, 2, 4))]
    for _ in range(draw(st.integers(4, 12))):
        g.grow()
    made = [item for item in g.values if item.name not in ("x", "z")]
    outputs = draw(
        st.lists(st.sampled_from(made), min_size=1, max_size=3, unique_by=lambda i: i.name)
    )
    info = helper.make_tensor_value_info
    inputs = [
        info("x", TensorProto.FLOAT, ["N", 4]),
        info("z", TensorProto.FLOAT, ["N", 2, 4]),
        info("flag", TensorProto.BOOL, []),
        info("turns", TensorProto.INT64, []),
    ]
    declared = [
        helper.make_tensor_value_info(item.name, TensorProto.FLOAT, [None] * len(item.shape))
        for item in outputs
    ]
    graph = helper.make_graph(g.nodes, "g", inputs, declared, list(g.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def feeds(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs at N = BATCH."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((BATCH, 4)).astype(np.float32),
        "z": rng.standard_normal((BATCH, 2, 4)).astype(np.float32),
        "flag": np.array(bool(seed % 2)),
        "turns": np.array(seed, np.int64),
    }
