"""Fingerprints: what they see and what they do not."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.ir import fingerprint
from graphopt.ir.model_file import load_model

HEAD = '<ir_version: 10, opset_import: ["" : 17, "l" : 1]>\n'
BASE = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}>"


def model(body: str, head: str = BASE, tail: str = "") -> ir.Model:
    return load_model(f"{HEAD}{head} {{ {body} }} {tail}")


def both(candidate: ir.Model) -> tuple[str, str]:
    return fingerprint.structural(candidate), fingerprint.weights(candidate)


REFERENCE = "t = Relu (x)  u = Tanh (x)  v = Add (t, a)  w = Add (u, b)  y = Mul (v, w)"


def test_names_order_and_documentation_do_not_count() -> None:
    renamed = model(
        "r = Tanh (x)  s = Add (r, k)  p = Relu (x)  q = Add (p, m)  y = Mul (q, s)",
        "h (float[2] x) => (float[2] y) <float[2] k = {3, 4}, float[2] m = {1, 2}>",
    )
    renamed.producer_name, renamed.doc_string = "another", "words"
    renamed.graph.metadata_props["k"] = "v"
    renamed.graph[0].name = "n"
    assert both(renamed) == both(model(REFERENCE))


@pytest.mark.parametrize(
    "other",
    [
        "t = Relu (x)  u = Tanh (x)  v = Add (t, a)  w = Add (u, a)  y = Mul (v, w)",
        "t = Relu (x)  u = Tanh (x)  v = Sub (t, a)  w = Add (u, b)  y = Mul (v, w)",
        "t = Relu (x)  u = Tanh (x)  v = Add (a, t)  w = Add (u, b)  y = Mul (v, w)",
        "t = Relu (x)  u = Tanh (x)  v = Add (t, a)  w = Add (t, b)  y = Mul (v, w)",
        "t = Relu (x)  u = Tanh (x)  v = Add (t, a)  w = Add (u, b)  y = Mul (v, w)  z = Exp (x)",
        "t = Relu (x)  u = l.Tanh (x)  v = Add (t, a)  w = Add (u, b)  y = Mul (v, w)",
        "t = Relu (x)  u = Tanh <k = 1> (x)  v = Add (t, a)  w = Add (u, b)  y = Mul (v, w)",
    ],
)
def test_structure_counts(other: str) -> None:
    assert fingerprint.structural(model(other)) != fingerprint.structural(model(REFERENCE))


@pytest.mark.parametrize(
    "head",
    [
        BASE.replace("float[2] x", "float[3] x"),
        BASE.replace("float[2] x", "float16[2] x"),
        BASE.replace("float[2] a = {1, 2}", "double[2] a = {1, 2}"),
        BASE.replace("float[2] a = {1, 2}", "float[1,2] a = {1, 2}"),
    ],
)
def test_types_and_shapes_count(head: str) -> None:
    assert fingerprint.structural(model(REFERENCE, head)) != fingerprint.structural(
        model(REFERENCE)
    )


def test_opsets_count() -> None:
    newer = model(REFERENCE)
    newer.graph.opset_imports[""] = 18
    assert fingerprint.structural(newer) != fingerprint.structural(model(REFERENCE))


def test_elements_count_for_the_weights_alone() -> None:
    changed = model(REFERENCE, BASE.replace("{3, 4}", "{3, 5}"))
    assert fingerprint.structural(changed) == fingerprint.structural(model(REFERENCE))
    assert fingerprint.weights(changed) != fingerprint.weights(model(REFERENCE))


@pytest.mark.parametrize(
    "body",
    [
        REFERENCE,
        # told apart only by what becomes of the sums
        "v = Add (x, a)  w = Add (x, b)  t = Relu (v)  u = Tanh (w)  y = Mul (t, u)",
    ],
)
def test_swapped_weights_are_noticed(body: str) -> None:
    swapped = model(
        body, BASE.replace("{1, 2}", "{9}").replace("{3, 4}", "{1, 2}").replace("{9}", "{3, 4}")
    )
    assert fingerprint.structural(swapped) == fingerprint.structural(model(body))
    assert fingerprint.weights(swapped) != fingerprint.weights(model(body))


def test_one_constant_used_twice_is_not_two_constants() -> None:
    shared = model("y = Add (a, a)")
    apart = model("y = Add (a, b)", BASE.replace("{3, 4}", "{1, 2}"))
    assert fingerprint.structural(shared) != fingerprint.structural(apart)


BRANCHES = (
    "c = Constant <value = bool {1}> ()  y = If <then_branch = t () => (float[2] p) { p = Add (x, a) },"
    " else_branch = e () => (float[2] q) { q = Sub (x, b) }> (c)"
)


def test_subgraphs_and_what_they_capture_count() -> None:
    renamed = BRANCHES.replace("p)", "r)").replace("p =", "r =")
    assert both(model(renamed)) == both(model(BRANCHES))
    for changed in (BRANCHES.replace("Sub (x, b)", "Sub (x, a)"), BRANCHES.replace("Sub", "Mul")):
        assert fingerprint.structural(model(changed)) != fingerprint.structural(model(BRANCHES))


def test_functions_count() -> None:
    tail = '<domain: "l", opset_import: ["" : 17]> F <k> (p) => (r) { r = %s (p) }'
    first, second = (model("y = l.F <k = 1> (x)", tail=tail % op) for op in ("Relu", "Tanh"))
    assert fingerprint.structural(first) != fingerprint.structural(second)


def test_sparse_constants_count_by_what_they_hold() -> None:
    def sparse(value: float) -> ir.Model:
        values = onnx.numpy_helper.from_array(np.array([value], np.float32), "w")
        indices = onnx.numpy_helper.from_array(np.array([1]), "")
        proto = onnx.parser.parse_model(
            f"{HEAD}g (float[2] x) => (float[2] y) {{ y = Add (x, w) }}"
        )
        proto.graph.sparse_initializer.add(values=values, indices=indices, dims=[2])
        return load_model(proto)

    assert fingerprint.structural(sparse(1)) == fingerprint.structural(sparse(2))
    assert fingerprint.weights(sparse(1)) != fingerprint.weights(sparse(2))


def test_strings_count() -> None:
    first, second = (model(f'y = Constant <value = string {{"{text}"}}> ()') for text in "ab")
    assert fingerprint.structural(first) == fingerprint.structural(second)
    assert fingerprint.weights(first) != fingerprint.weights(second)


def test_parameters_and_types_count() -> None:
    tail = '<domain: "l", opset_import: ["" : 17]> F <k, m> (a) => (b) { b = LeakyRelu <alpha: float = @k> (a) }'
    first = model("y = l.F <k = 0.5, m = 0.1> (x)", tail=tail)
    assert both(first) == both(model("y = l.F <k = 0.5, m = 0.1> (x)", tail=tail))
    other = model("y = l.F <k = 0.5, m = 0.1> (x)", tail=tail.replace("@k", "@m"))
    assert both(first)[0] != both(other)[0]
    optional = "o = Optional <type = {}> ()  h = OptionalHasElement (o)  f = Cast <to = 1> (h)  y = Add (x, f)"
    kinds = [
        both(model(optional.format(kind)))[0]
        for kind in ("float[2]", "float[2]", "float[3]", "int64[2]")
    ]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3
