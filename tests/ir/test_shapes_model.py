"""Whole models: subgraphs, functions, what is written into the model, and updates."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.ir.shapes import Shapes


def model_of(text: str, imports: str = '"":18, "f":1, "mine":1') -> ir.Model:
    return ir.from_onnx_text(f"<ir_version: 10, opset_import: [{imports}]> {text}")


def value_of(model: ir.Model, name: str) -> ir.Value:
    graphs = [model.graph, *model.graph.subgraphs(), *(f.graph for f in model.functions.values())]
    found = (v for graph in graphs for node in graph for v in node.outputs if v.name == name)
    return next(found)


def dims_of(model: ir.Model, shapes: Shapes, name: str) -> list[str] | None:
    dims = shapes.dims(value_of(model, name))
    return None if dims is None else [str(dim) for dim in dims]


IF = """g (float[N, 4] x, float[M, 4] z, bool c) => (y) {
  y = If(c) <then_branch = a () => (o) { o = Relu(x) }, else_branch = b () => (p) { p = Abs(z) }> }"""


def test_branches_keep_what_they_agree_on() -> None:
    model = model_of(IF)
    shapes = Shapes(model)
    dims = shapes.dims(model.graph.outputs[0])
    assert dims is not None
    assert not dims[0].is_named()
    assert dims[1] == 4
    assert dims_of(model, shapes, "p") == ["M", "4"]


def test_a_constant_condition_chooses_the_branch() -> None:
    model = model_of(
        IF.replace("bool c) => (y) {", "bool d) => (y) { c = Constant<value = bool {0}>()")
    )
    assert dims_of(model, Shapes(model), "y") == ["M", "4"]


LOOP = """g (float[N, 4] x, int64 n, bool c) => (last, all) {
  last, all = Loop(n, c, x) <body = b (int64 i, bool go, float[A, B] s) => (stay, t, u) {
    stay = Identity(go)  u = Relu(s)  STEP }> }"""


def test_loops_keep_invariant_dims() -> None:
    model = model_of(LOOP.replace("STEP", "t = Abs(s)"))
    shapes = Shapes(model)
    assert dims_of(model, shapes, "last") == ["N", "4"]
    stacked = dims_of(model, shapes, "all")
    assert stacked is not None
    assert stacked[1:] == ["N", "4"]


def test_loops_open_dims_that_change_and_no_symbol_of_the_body_leaves() -> None:
    model = model_of(LOOP.replace("STEP", "t = Concat<axis = 0>(s, s)"))
    shapes = Shapes(model)
    last, body = shapes.dims(value_of(model, "last")), shapes.dims(value_of(model, "u"))
    stacked = shapes.dims(value_of(model, "all"))
    assert last is not None
    assert body is not None
    assert stacked is not None
    assert last[1] == body[1] == stacked[2] == 4
    assert not last[0].is_named()
    assert body[0].symbols().isdisjoint(last[0].symbols())
    assert body[0].symbols().isdisjoint(stacked[1].symbols())


def test_loops_with_a_known_number_of_iterations() -> None:
    model = model_of(
        """g (float[N] x) => (all) { n = Constant<value_int = 5>()  c = Constant<value = bool {1}>()
        last, all = Loop(n, c, x) <body = b (int64 i, bool go, s) => (stay, t, u) {
          stay = Identity(go)  t = Abs(s)  u = Relu(s) }> }"""
    )
    assert dims_of(model, Shapes(model), "all") == ["5", "N"]


def test_scan_stacks_along_the_scanned_axis() -> None:
    model = model_of(
        """g (float[H] x, float[T, H] xs) => (last, ys) {
        last, ys = Scan(x, xs) <num_scan_inputs = 1,
          body = b (s, e) => (t, o) { t = Add(s, e)  o = Relu(t) }> }"""
    )
    shapes = Shapes(model)
    assert dims_of(model, shapes, "last") == ["H"]
    assert dims_of(model, shapes, "ys") == ["T", "H"]


FUNCTION = """<opset_import: ["":18], domain: "f"> half <axis> (v) => (w, i) {
  i = Shape(v)  w, r = Split<axis: int = @axis, num_outputs = 2>(v) }"""


def test_calls_of_functions_are_inferred_as_if_inlined() -> None:
    model = model_of(
        f"""g (float[8, N] x) => (y, z) {{
        y, i = f.half<axis = 0>(x)  z, j = f.half<axis = 1>(x) }} {FUNCTION}"""
    )
    shapes = Shapes(model)
    assert dims_of(model, shapes, "y") == ["4", "N"]
    assert dims_of(model, shapes, "z") == ["8", "((N + 1) // 2)"]
    assert dims_of(model, shapes, "i") == ["2"]
    inside = shapes.dims(value_of(model, "w"))
    assert inside is None or not all(dim.is_named() for dim in inside)


def test_the_body_of_a_function_with_one_call_is_as_that_call_makes_it() -> None:
    model = model_of(f"g (float[8, N] x) => (y) {{ y, i = f.half<axis = 0>(x) }} {FUNCTION}")
    shapes = Shapes(model)
    assert dims_of(model, shapes, "w") == ["4", "N"]
    assert value_of(model, "w").shape == ir.Shape([4, "N"])


def test_a_change_in_a_function_reaches_its_calls() -> None:
    model = model_of(f"g (float[8, N] x) => (y) {{ y, i = f.half<axis = 0>(x) }} {FUNCTION}")
    shapes = Shapes(model)
    function = next(iter(model.functions.values()))
    split = function.graph[1]
    turned = ir.Node("", "Transpose", [function.inputs[0]], num_outputs=1)
    function.graph.insert_before(split, turned)
    split.replace_input_with(0, turned.outputs[0])
    shapes.update([turned, split])
    assert dims_of(model, shapes, "y") == ["((N + 1) // 2)", "8"]


def test_the_model_gets_integers_and_its_own_names_only() -> None:
    model = model_of(
        "g (float[N, 4] x) => (float[K, L] y) { t = Concat<axis = 0>(x, x)  u = Transpose(x)  y = MatMul(t, u) }"
    )
    Shapes(model)
    assert value_of(model, "t").shape == ir.Shape([None, 4])
    assert value_of(model, "u").shape == ir.Shape([4, "N"])
    assert value_of(model, "y").shape == ir.Shape(["K", "L"])
    assert value_of(model, "t").dtype == ir.DataType.FLOAT


def test_wrong_value_info_is_replaced() -> None:
    model = model_of(
        "g (float[N, 4] x) => (float[N, 4] y) <float[7, 7] t> { t = Relu(x)  y = Abs(t) }"
    )
    shapes = Shapes(model)
    assert dims_of(model, shapes, "t") == ["N", "4"]
    assert value_of(model, "t").shape == ir.Shape(["N", 4])


def test_value_info_of_custom_operators_is_believed() -> None:
    model = model_of("g (float[N, 4] x) => (y) <float[N, 9] t> { t = mine.Foo(x)  y = Abs(t) }")
    assert dims_of(model, Shapes(model), "y") == ["N", "9"]


def test_declared_outputs_stay_and_contradictions_are_reported() -> None:
    model = model_of("g (float[N, 4] x) => (float[N, 5] y) { y = Relu(x) }")
    shapes = Shapes(model)
    (conflict,) = shapes.conflicts
    assert conflict.output == "y"
    assert "5" in conflict.declared
    assert conflict.inferred == "FLOAT [N, 4]"
    assert value_of(model, "y").shape == ir.Shape(["N", 5])
    assert dims_of(model, shapes, "y") == ["N", "4"]


def test_agreeing_outputs_are_no_conflict() -> None:
    model = model_of("g (float[N, 4] x) => (float[M, 4] y) { y = Relu(x) }")
    assert Shapes(model).conflicts == ()


def test_overridable_initializers_are_not_followed() -> None:
    model = model_of(
        "g (float[6] x, int64[2] s) => (y) <int64[2] s = {2, 3}> { y = Reshape(x, s) }"
    )
    dims = Shapes(model).dims(model.graph.outputs[0])
    assert dims is not None
    assert not any(dim.is_static for dim in dims)


def test_containers_have_types_and_no_dims() -> None:
    model = model_of(
        """g (float[N] x, float[N] z) => (y) { i = Constant<value_int = 0>()
        s = SequenceConstruct(x, z)  y = SequenceAt(s, i) }"""
    )
    shapes = Shapes(model)
    assert isinstance(shapes.facts(value_of(model, "s")).type, ir.SequenceType)
    assert shapes.dims(value_of(model, "s")) is None
    assert dims_of(model, shapes, "y") == ["N"]


def test_unsorted_graphs_are_inferred_all_the_same() -> None:
    model = model_of("g (float[N, 4] x) => (y) { t = Relu(x)  y = Transpose(t) }")
    relu = model.graph[0]
    model.graph.remove(relu)
    model.graph.append(relu)
    assert dims_of(model, Shapes(model), "y") == ["4", "N"]


CHAIN = """g (float[N, 4] x, bool c) => (y) { t = Relu(x)  u = Abs(t)
  y = If(c) <then_branch = a () => (o) { o = Neg(u) }, else_branch = b () => (p) { p = Exp(u) }> }"""


@pytest.mark.parametrize("target", ["Abs", "Neg"])
def test_update_follows_a_change_through_subgraphs(target: str) -> None:
    model = model_of(CHAIN)
    shapes = Shapes(model)
    node = next(n for n in model.graph.all_nodes() if n.op_type == target)
    turned = ir.Node("", "Transpose", [node.inputs[0]], num_outputs=1)
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, turned)
    node.replace_input_with(0, turned.outputs[0])
    shapes.update([turned, node])
    fresh = Shapes(model)
    for value in (out for n in model.graph.all_nodes() for out in n.outputs):
        ours, theirs = shapes.dims(value), fresh.dims(value)
        assert ours is not None
        assert theirs is not None
        assert [dim.value or dim.symbol for dim in ours] == [
            dim.value or dim.symbol for dim in theirs
        ]


def test_update_of_nodes_in_any_order() -> None:
    model = model_of("g (float[N, 4] x) => (y) { t = Relu(x)  y = Abs(t) }")
    shapes = Shapes(model)
    absolute = model.graph[1]
    first = ir.Node("", "Transpose", [model.graph.inputs[0]], num_outputs=1)
    second = ir.Node("", "Shape", [first.outputs[0]], num_outputs=1)
    model.graph.insert_before(absolute, [first, second])
    absolute.replace_input_with(0, second.outputs[0])
    shapes.update([absolute, second, first])
    data = shapes.data(value_of(model, "y"))
    assert data is not None
    assert [str(dim) for dim in data.dims or ()] == ["4", "N"]


def test_forgotten_nodes_leave_nothing() -> None:
    model = model_of("g (float[N, 4] x) => (y) { t = Relu(x)  y = Abs(x) }")
    shapes = Shapes(model)
    relu = model.graph[0]
    model.graph.remove(relu, safe=True)
    shapes.forget(relu)
    assert shapes.dims(relu.outputs[0]) is None
    shapes.update([relu])
    assert shapes.dims(relu.outputs[0]) is None


def test_a_replaced_constant_is_read_again() -> None:
    model = model_of("g (float[N, 4] x) => (y) <int64[1] s = {-1}> { y = Reshape(x, s) }")
    shapes = Shapes(model)
    assert dims_of(model, shapes, "y") == ["4*N"]
    model.graph.initializers["s"].const_value = ir.tensor(
        [2, -1], name="s", dtype=ir.DataType.INT64
    )
    shapes.update([model.graph[0]])
    assert dims_of(model, shapes, "y") == ["2", "2*N"]


PARAMETERS = """<ir_version: 10, opset_import: ["" : 18, "l" : 1]>
g (float[6] x) => (a, b, c) { a = l.F(x)  b = l.F<k = [6, 1]>(x)  c = l.G(x) }
<domain: "l", opset_import: ["" : 18]> F <k: ints = [2, 3]>(p) => (q)
{ s = Constant<value_ints: ints = @k>()  q = Reshape(p, s) }
<domain: "l", opset_import: ["" : 18]> G <n>(p) => (q) { q = Flatten<axis: int = @n>(p) }"""


def test_parameters_of_functions_have_the_value_of_the_call_or_their_default() -> None:
    model = ir.from_onnx_text(PARAMETERS)
    shapes = Shapes(model)
    found = [shapes.dims(value) for value in model.graph.outputs]
    assert [None if dims is None else [int(dim) for dim in dims] for dims in found] == [
        [2, 3],
        [6, 1],
        [6, 1],
    ]


@pytest.mark.parametrize(
    "body",
    [
        "y = Det(x, x)",
        "y = GridSample(x)",
        "y, z = Det(x)",
        "y = GridSample(, x)",
        "h = my.Op(x)  y = Det(h)",
    ],
)
def test_nothing_is_known_of_nodes_that_the_standard_forbids(body: str) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 18, "my" : 1]> g (float[3,3] x) => (y) {{ {body} }}'
    )
    assert Shapes(model).dims(model.graph.outputs[0]) is None


PLACED = """g (float[N, 4] x, float[4, N] z) => (y) {
  t = Transpose<perm = [1, 0]>(x) r = Relu(t) s = Shape(r) y = Reshape(r, s) }"""


def place(model: ir.Model, shapes: Shapes, old: ir.Value, node: ir.Node) -> None:
    """Puts a node in the place of one, as the engine does."""
    shapes.preview([node], [], model.graph)
    root, new = old.producer(), node.outputs[0]
    assert root is not None
    users = [use.node for use in old.uses()]
    stale = not shapes.agree(old, new)
    model.graph.insert_before(root, node)
    old.replace_all_uses_with(new)
    shapes.forget(root)
    model.graph.remove(root, safe=True)
    shapes.placed([node], users, stale=stale)


@pytest.mark.parametrize(
    ("op_type", "source", "dims"),
    [("Neg", "t", ["4", "N"]), ("Neg", "x", ["N", "4"]), ("Odd", "t", None)],
    ids=["alike", "other-dims", "unknown"],
)
def test_placed_is_as_if_all_were_inferred_anew(
    op_type: str, source: str, dims: list[str] | None
) -> None:
    model = model_of(PLACED)
    shapes = Shapes(model)
    domain = "mine" if op_type == "Odd" else ""
    value = model.graph.inputs[0] if source == "x" else value_of(model, source)
    node = ir.Node(domain, op_type, [value])
    node.outputs[0].name = "n"
    place(model, shapes, value_of(model, "r"), node)
    fresh = Shapes(model)
    for name in ("n", "s", "y"):
        assert dims_of(model, shapes, name) == dims_of(model, fresh, name)
    assert dims_of(model, shapes, "n") == dims
    data = shapes.data(value_of(model, "s"))
    assert data == fresh.data(value_of(model, "s"))


def test_an_operator_without_rules_is_as_declared_once_it_is_placed() -> None:
    model = model_of(PLACED)
    shapes = Shapes(model)
    node = ir.Node("mine", "Odd", [value_of(model, "t")])
    node.outputs[0].name = "n"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([3, 5])
    place(model, shapes, value_of(model, "r"), node)
    assert dims_of(model, shapes, "y") == ["3", "5"]


def test_a_constant_agrees_with_nothing() -> None:
    model = model_of("g (float[2] x) => (y) <float[2] w = {1, 2}> { y = Add(x, w) }")
    shapes = Shapes(model)
    given, weight = model.graph.inputs[0], model.graph.initializers["w"]
    assert shapes.agree(given, given)
    assert not shapes.agree(given, weight)  # known alike, but kernels see the elements of one
