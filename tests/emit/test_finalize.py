"""Opset and IR version within the target's limits, or a word why not."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest

from graphopt.emit import finalize
from graphopt.errors import TargetError
from graphopt.ir.model_file import load_model
from graphopt.targets import Target, get_target

GELU = "g (float[4] x) => (float[4] y) { y = Gelu(x) }"


def target(opset: tuple[int, int] = (7, 21), version: tuple[int, int] = (4, 10)) -> Target:
    return dataclasses.replace(get_target("cpu"), name="tight", opset=opset, ir_version=version)


def model(body: str, *, opset: int = 18, version: int = 9, more: str = "") -> ir.Model:
    return load_model(f'<ir_version: {version}, opset_import: ["" : {opset}{more}]> {body}')


@pytest.mark.parametrize(("opset", "left"), [(23, 21), (21, 21), (18, 18), (7, 7)])
def test_an_opset_is_moved_only_where_it_must_be(opset: int, left: int) -> None:
    given = model("g (float[4] x) => (float[4] y) { y = Sqrt(x) }", opset=opset)
    assert finalize(given, target()) == ()
    assert given.opset_imports[""] == left


def test_an_operator_that_came_later_is_refused() -> None:
    with pytest.raises(
        TargetError,
        match=r"imports ai.onnx opset 20, target tight takes 7 to 19.*: Gelu\. Export at opset 19",
    ):
        finalize(model(GELU, opset=20), target((7, 19)))


def test_an_operator_that_changed_is_a_warning_below_the_limit() -> None:
    text = "g (float[2,3] x) => (float[2,3] y) { y = Softmax(x) }"
    given = model(text, opset=11)
    (warning,) = finalize(given, target((13, 21)))
    assert "opset 11" in warning
    assert "Softmax may behave differently there; export at opset 13 or newer" in warning
    assert given.opset_imports[""] == 11


def test_types_that_only_the_newer_operator_takes_are_refused() -> None:
    text = "g (bfloat16[4] x) => (bfloat16[4] y) { y = Sqrt(x) }"
    with pytest.raises(TargetError, match="Sqrt"):
        finalize(model(text, opset=13), target((7, 12)))
    halves = model(text.replace("bfloat16", "float16"), opset=13)
    finalize(halves, target((7, 12)))
    assert halves.opset_imports[""] == 12


def test_imports_that_nobody_uses_go() -> None:
    given = model(GELU, opset=20, more=', "house" : 3, "com.microsoft" : 1')
    finalize(given, target())
    assert dict(given.opset_imports) == {"": 20}


def test_functions_and_their_imports_are_kept() -> None:
    given = load_model("""<ir_version: 9, opset_import: ["" : 23, "my" : 1]>
        g (float[4] x) => (float[4] y) { y = my.twice(x) }
        <domain: "my", opset_import: ["" : 23, "house" : 1]> twice (a) => (c) { b = Sqrt(a)  c = Sqrt(b) }""")
    finalize(given, target())
    (function,) = given.functions.values()
    assert dict(function.opset_imports) == {"": 21}
    assert dict(given.opset_imports) == {"": 21, "my": 1}


@pytest.mark.parametrize(("version", "left"), [(3, 8), (9, 9), (11, 10)])
def test_the_ir_version_is_held_within_the_limits(version: int, left: int) -> None:
    given = model("g (float[4] x) => (float[4] y) { y = Sqrt(x) }", version=version)
    finalize(given, target(version=(8, 10)))
    assert given.ir_version == left


def test_the_ir_version_is_what_the_model_needs() -> None:
    given = model(
        "g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) }", version=4
    )
    given.ir_version = 3
    finalize(given, target(version=(3, 10)))
    assert given.ir_version == 4


def test_element_types_that_the_target_is_too_old_for() -> None:
    text = "g (uint4[4] x) => (float[4] y) { y = Cast<to = 1>(x) }"
    given = model(text, opset=21, version=10)
    with pytest.raises(TargetError, match="needs IR version 10, target tight takes at most 9"):
        finalize(given, target(version=(4, 9)))


def test_a_model_without_the_main_domain_is_left_alone() -> None:
    given = load_model(
        '<ir_version: 9, opset_import: ["house" : 1]> g (float[4] x) => (float[4] y) { y = house.F(x) }'
    )
    assert finalize(given, target()) == ()
    assert dict(given.opset_imports) == {"house": 1}
