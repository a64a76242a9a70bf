"""Constant subgraphs: exact kernels, the runtime for the rest, and failures that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphopt.ir import evaluate as module
from graphopt.ir.evaluate import evaluate, numpy_kernel

IMPORTS = '"":18, "f":1, "mine":1'
Array = np.ndarray[Any, Any]


def model_of(body: str, results: str = "y", opset: int = 18) -> ir.Model:
    imports = IMPORTS.replace('"":18', f'"":{opset}')
    return ir.from_onnx_text(
        f"<ir_version: 10, opset_import: [{imports}]> g () => ({results}) {{ {body} }}"
    )


def computed(
    model: ir.Model, known: Mapping[ir.Value, ir.TensorProtocol] | None = None
) -> module.Evaluation:
    return evaluate(
        list(model.graph),
        model.graph.outputs,
        model.opset_imports,
        known=known,
        functions=model.functions,
    )


def reference(model: ir.Model) -> list[Array]:
    """What ONNX Runtime gives with optimisations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto: onnx.ModelProto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return [np.asarray(array) for array in session.run(None, {})]


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("a session was made")

    monkeypatch.setattr(module, "_onnxruntime", refuse)


X = "x = Constant<value = float[2, 3] {1.5, -2.5, 3.0, 0.25, -0.0, 7.0}>()  "
INTEGERS = "i = Constant<value = int64[3] {5, -7, 9}>()  "


def ints(name: str, *elements: int) -> str:
    return f"{name} = Constant<value_ints = [{', '.join(map(str, elements))}]>()  "


def tensor(name: str, kind: str, *elements: float) -> str:
    return f"{name} = Constant<value = {kind} {{{', '.join(map(str, elements))}}}>()  "


NINE = tensor("x", "float[3, 3]", 1, 2, 3, 4, 5, 6, 7, 8, 9)

EXACT = [
    X + "y = Transpose(x)",
    X + ints("s", 3, -1) + "y = Reshape(x, s)",
    X + ints("a", 0) + "y = Unsqueeze(x, a)",
    X + "y = Flatten<axis = 0>(x)",
    X + "y = Concat<axis = 1>(x, x)",
    X + ints("j", 1, -1) + "y = Gather<axis = 1>(x, j)",
    X + ints("b", 2) + ints("e", -100) + ints("a", 1) + ints("p", -2) + "y = Slice(x, b, e, a, p)",
    X + ints("b", -1) + ints("e", 9223372036854775807) + ints("a", 0) + "y = Slice(x, b, e, a)",
    X + "y, z = Split<axis = 1, num_outputs = 2>(x)",
    X + ints("s", 4, 1, 3) + "y = Expand(x, s)",
    X + ints("r", 2, 1) + "y = Tile(x, r)",
    X + ints("p", 1, 0, 0, 2) + "y = Pad(x, p)",
    X + ints("p", 1, 0, 0, 2) + 'y = Pad<mode = "reflect">(x, p)',
    X + "y = Shape<start = -1>(x)",
    X + "y = Size(x)",
    X + "y = Trilu<upper = 0>(x)",
    X + "c = Constant<value = bool[1, 3] {1, 0, 1}>() n = Neg(x)  y = Where(c, x, n)",
    X + "y = Div(x, x)",
    X + "y = Cast<to = 6>(x)",
    X + "y = Cast<to = 10>(x)",
    X + "y = NonZero(x)",
    X + "n = Neg(x)  y = Less(n, x)",
    X + "y = Floor(x)",
    X + "y = Round(x)",
    ints("s", 2, 0) + "y = ConstantOfShape<value = int64[1] {7}>(s)",
    INTEGERS + ints("d", 2, 2, -4) + "y = Div(i, d)",
    INTEGERS + ints("d", 3, 3, -4) + "y = Mod(i, d)",
    INTEGERS + ints("d", 3, 3, -4) + "y = Mod<fmod = 1>(i, d)",
    INTEGERS + "y = Mul(i, i)",
    INTEGERS + "z = Constant<value_int = 0>() y = CumSum<reverse = 1>(i, z)",
    INTEGERS + "y = ReduceProd<keepdims = 0>(i)",
    INTEGERS + "y = Max(i, i)",
    "b = Constant<value_int = 9>() l = Constant<value_int = 0>() s = Constant<value_int = -2>() y = Range(b, l, s)",
    NINE + tensor("i", "int64[1, 2]", 2, 0) + "y = GatherElements<axis = 1>(x, i)",
    NINE + tensor("i", "int64[2, 1]", 2, -3) + "y = GatherElements(x, i)",
    NINE + tensor("i", "int64[2, 3]", 2, 0, 1, 1, 1, -1) + "y = GatherElements<axis = -1>(x, i)",
    NINE + tensor("i", "int64[2, 2]", 2, 0, -1, -1) + "y = GatherND(x, i)",
    NINE + tensor("i", "int64[2, 1]", 2, 0) + "y = GatherND(x, i)",
    NINE
    + tensor("i", "int64[1, 2]", 2, 0)
    + tensor("u", "float[1, 2]", 50, 60)
    + "y = ScatterElements<axis = 1>(x, i, u)",
    NINE
    + tensor("i", "int64[2, 1]", 2, 0)
    + tensor("u", "float[2, 1]", 50, 60)
    + "y = ScatterElements(x, i, u)",
    NINE
    + tensor("i", "int64[2, 1]", 2, 0)
    + tensor("u", "float[2, 3]", 5, 6, 1, 2, 3, 4)
    + "y = ScatterND(x, i, u)",
    X + ints("b", 9) + ints("e", -9) + ints("a", 1) + ints("p", -1) + "y = Slice(x, b, e, a, p)",
    X + ints("b", -9) + ints("e", -9) + ints("a", 1) + ints("p", -1) + "y = Slice(x, b, e, a, p)",
    X + ints("s", 1, 1, 1) + "y, z, w = Split<axis = 1>(x, s)",
    INTEGERS
    + "a = Constant<value = int64[0] {}>()  "
    + "y = ReduceSum<noop_with_empty_axes = 1>(i, a)",
    INTEGERS + "y = ReduceSum(i)",
    tensor("o", "float[1, 3]", 1, 2, 3) + ints("z", 0, 3) + "e = Expand(o, z)  y = Cast<to = 6>(e)",
    INTEGERS
    + "d = Constant<value_int = 4>() v = Constant<value = float[2] {0.0, 2.0}>() y = OneHot(i, d, v)",
]


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("body", EXACT)
def test_kernels_give_the_bits_of_the_runtime(body: str) -> None:
    model = model_of(body)
    tensor = computed(model).tensors[model.graph.outputs[0]]
    (expected,) = reference(model)
    assert tensor.numpy().dtype == expected.dtype
    assert tensor.numpy().shape == expected.shape
    assert tensor.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "body",
    [
        X + "t = Exp(x)  y = Transpose(t)",
        X + "y = Softmax(x)",
        X + "y = ReduceMean(x)",
        X + "y = ReduceSum(x)",
        X + "y = Max(x, x)",
        X + "y = Mod<fmod = 1>(x, x)",
        X + "z = Constant<value_int = 0>()  y = CumSum(x, z)",
        X + ints("p", -1, 0, 0, 0) + "y = Pad(x, p)",
        X + ints("p", 1, 0, 0, 0) + 'y = Pad<mode = "wrap">(x, p)',
        NINE + tensor("i", "int64[3, 1]", 2, 0, 1) + "y = GatherND<batch_dims = 1>(x, i)",
        NINE
        + tensor("i", "int64[1, 1]", 2)
        + tensor("u", "float[1, 1]", 5)
        + 'y = ScatterElements<reduction = "add">(x, i, u)',
        NINE
        + tensor("i", "int64[1, 1]", 2)
        + tensor("u", "float[1, 3]", 5, 6, 7)
        + 'y = ScatterND<reduction = "max">(x, i, u)',
        X + "n = Sqrt(x)  y = Cast<to = 7>(n)",
        X + "c = Constant<value = bool {1}>() y = If(c) <then_branch = a () => (o) { o = Exp(x) }, "
        "else_branch = b () => (p) { p = Abs(x) }>",
        'a = Constant<value_strings = ["p", "q"]>() b = StringConcat(a, a) y = Identity(b)',
    ],
)
def test_the_runtime_does_what_kernels_do_not(body: str) -> None:
    model = model_of(body, opset=20)
    tensor = computed(model).tensors[model.graph.outputs[0]]
    (expected,) = reference(model)
    if tensor.dtype == ir.DataType.STRING:
        assert [text.decode() for text in tensor.numpy()] == expected.tolist()
    else:
        assert tensor.numpy().tobytes() == expected.tobytes()


def test_one_session_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = ort.InferenceSession

    def counted(*args: Any, **options: Any) -> ort.InferenceSession:
        made.append(args)
        return original(*args, **options)

    monkeypatch.setattr(ort, "InferenceSession", counted)
    model = model_of(X + "a = Exp(x)  b = Transpose(a)  c = Log(b)  y = Add(c, c)")
    assert len(computed(model).tensors) == 1
    assert len(made) == 1


def test_functions_are_run() -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: [{IMPORTS}]> g () => (y) {{ {X} y = f.twice(x) }}
        <opset_import: ["":18], domain: "f"> twice (v) => (w) {{ w = Add(v, v) }}"""
    )
    tensor = computed(model).tensors[model.graph.outputs[0]]
    assert tensor.numpy().tolist() == [[3.0, -5.0, 6.0], [0.5, -0.0, 14.0]]


def test_given_values_are_inputs() -> None:
    model = ir.from_onnx_text(
        f"<ir_version: 10, opset_import: [{IMPORTS}]> g (float[2] x) => (y) {{ y = Exp(x) }}"
    )
    x = model.graph.inputs[0]
    large = np.linspace(0, 1, 1000, dtype=np.float32)  # beyond what is embedded: fed
    for array in (np.zeros(2, np.float32), large):
        found = computed(model, {x: ir.Tensor(array)}).tensors[model.graph.outputs[0]]
        assert np.allclose(found.numpy(), np.exp(array))


def test_a_failing_node_takes_down_only_what_needs_it() -> None:
    body = X + ints("s", 5, 5) + "bad = Reshape(x, s)  t = Exp(bad)  u = Abs(t)  y = Exp(x)"
    model = model_of(body, "t, u, y")
    found = computed(model)
    assert [value.name for value in found.tensors] == ["y"]
    reasons = {node.outputs[0].name: reason for node, reason in found.reasons.items()}
    assert set(reasons) == {"bad", "t", "u"}
    assert "needs the result of Reshape (-> bad)" in reasons["t"]


def test_what_the_runtime_has_no_kernel_for_is_not_computed() -> None:
    model = model_of(X + "y = mine.Foo(x)")
    found = computed(model)
    assert found.tensors == {}
    assert list(found.reasons) == [model.graph[-1]]


@pytest.mark.usefixtures("no_session")
def test_dtypes_without_kernels_move_and_cast_all_the_same() -> None:
    model = model_of(X + "b = Cast<to = 16>(x)  y = Transpose(b)")
    tensor = computed(model).tensors[model.graph.outputs[0]]
    assert tensor.dtype == ir.DataType.BFLOAT16
    assert tensor.numpy().astype(np.float32).tolist() == [[1.5, 0.25], [-2.5, -0.0], [3.0, 7.0]]


def test_results_that_numpy_cannot_hold_are_declined() -> None:
    model = model_of(X + "b = Cast<to = 16>(x)  y = Exp(b)")
    found = computed(model)
    assert found.tensors == {}
    assert len(found.reasons) == 1


def test_sequences_are_passed_on_but_not_returned() -> None:
    model = model_of(
        X + "s = SequenceConstruct(x, x)  z = Constant<value_int = 0>() y = SequenceAt(s, z)",
        "s, y",
    )
    assert [value.name for value in computed(model).tensors] == ["y"]


def test_a_reshaped_constant_is_a_view() -> None:
    large = np.zeros((1000, 10), np.float32)
    model = ir.from_onnx_text(
        f"<ir_version: 10, opset_import: [{IMPORTS}]> g (x) => (y) {{ {ints('s', 10, -1)} y = Reshape(x, s) }}"
    )
    found = computed(model, {model.graph.inputs[0]: ir.Tensor(large)})
    assert np.shares_memory(found.tensors[model.graph.outputs[0]].numpy(), large)


def test_names_of_inner_graphs_do_not_collide() -> None:
    """The names that the evaluation makes up (c0, c1, …) are also names in the branches."""
    body = (
        X + "c = Constant<value = bool {1}>() e = Exp(x) "
        "y = If(c) <then_branch = a () => (c1) { c0 = Exp(e)  c1 = Add(c0, e) }, "
        "else_branch = b () => (c2) { c2 = Abs(e) }>"
    )
    model = model_of(body)
    (expected,) = reference(model)
    assert computed(model).tensors[model.graph.outputs[0]].numpy().tobytes() == expected.tobytes()


def test_numpy_kernel_is_a_function_of_arrays() -> None:
    model = model_of(X + "y = Transpose(x)")
    kernel = numpy_kernel(model.graph[-1], model.opset_imports)
    assert kernel is not None
    (result,) = kernel(np.eye(2, 3))
    assert result.shape == (3, 2)
    assert numpy_kernel(model_of(X + "y = Exp(x)").graph[-1], {"": 18}) is None


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan], np.float32),
        np.array([3e9], np.float32),
        np.array([1.0], ml_dtypes.float8_e4m3fn),
    ],
)
def test_casts_on_which_runtimes_differ_are_left_to_them(array: Array) -> None:
    model = model_of(X + "y = Cast<to = 6>(x)")
    kernel = numpy_kernel(model.graph[-1], model.opset_imports)
    assert kernel is not None
    assert kernel(array) is None


def test_integer_division_by_zero_is_not_computed_here() -> None:
    model = model_of(INTEGERS + "y = Div(i, i)")
    kernel = numpy_kernel(model.graph[-1], model.opset_imports)
    assert kernel is not None
    assert kernel(np.array([1]), np.array([0])) is None


@pytest.mark.parametrize(
    "body",
    [
        tensor("x", "float[1, 3]", 1, 2, 3)
        + ints("p", 1, 0, 0, 0)
        + 'y = Pad<mode = "reflect">(x, p)',
        tensor("x", "float[1, 3]", 1, 2, 3) + ints("s", 2, 2) + "y = Reshape(x, s)",
    ],
    ids=["Pad", "Reshape"],
)
def test_what_the_runtime_refuses_is_not_folded(body: str) -> None:
    model = model_of(body)
    with pytest.raises(Exception, match=r"Pad reflect|cannot be reshaped"):
        reference(model)
    assert model.graph.outputs[0] not in computed(model).tensors


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        (tensor("x", "float[2]", 1, 2) + "y = Unsqueeze(x)", 11),
        (
            tensor("x", "float[2]", 1, 2)
            + tensor("i", "int64[1, 1]", 0)
            + "y = GatherElements(x, i)",
            18,
        ),
        (
            tensor("x", "float[2]", 1, 2)
            + ints("a", 0)
            + ints("b", 2)
            + "y = Slice(x, a, b, a, a)",
            18,
        ),
        (tensor("x", "float[2]", 1, 2) + ints("n", 3, 3) + "y, z = Split(x, n)", 18),
    ],
    ids=["Unsqueeze", "GatherElements", "Slice", "Split"],
)
def test_what_makes_no_sense_is_left_to_the_runtime_and_not_folded(body: str, opset: int) -> None:
    model = model_of(body, opset=opset)
    evaluation = computed(model)
    assert model.graph.outputs[0] not in evaluation.tensors
    assert evaluation.reasons[model.graph[-1]]


LEAST = str(-(2**63))


@pytest.mark.parametrize("op", ["Div", "Mod", "Mod<fmod = 1>"])
def test_a_quotient_that_ends_the_process_is_not_computed(op: str) -> None:
    """ONNX Runtime 1.31 on x86-64 is ended by SIGFPE on the least integer by -1."""
    text = f"a = Constant<value_ints = [{LEAST}, 6]>() b = Constant<value_ints = [-1, 3]>() y = {op}(a, b)"
    model = model_of(text)
    found = computed(model)
    assert found.tensors == {}
    (reason,) = found.reasons.values()
    assert "divides the least integer by -1" in reason
    fine = computed(model_of(text.replace(LEAST, "-6")))
    assert fine.reasons == {}


def test_a_divisor_that_the_runtime_computes_is_looked_at_first() -> None:
    """Det has no kernel here: what depends on it is known only after the runtime ran."""
    text = f"""m = Constant<value = float[1,1] {{-1}}>() d = Det(m) b = Cast<to = 7>(d)
               a = Constant<value_int = {LEAST}>() y = Div(a, b)"""
    found = computed(model_of(text))
    assert "divides the least integer by -1" in "".join(found.reasons.values())
    other = computed(model_of(text.replace("{-1}", "{3}")))
    assert [int(t.numpy()) for t in other.tensors.values()] == [-(2**63) // 3 + 1]


def test_a_loop_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOP_SECONDS", 0.2)
    text = """c = Constant<value = bool {1}>() x = Constant<value_float = 1.0>()
      y = Loop(, c, x) <body = b (int64 i, bool k, float v) => (bool k2, float w) { k2 = Identity(k) w = Cos(v) }>"""
    (reason,) = computed(model_of(text)).reasons.values()
    assert "terminate" in reason
