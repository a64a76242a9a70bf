"""What a caller would notice: names, order, dtypes, kinds and dims of inputs and outputs."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest

from graphopt.runtime.specs import Kind, TensorSpec
from graphopt.verify.contract import dropped_defaults, input_faults, output_faults

X = TensorSpec("x", ir.DataType.FLOAT, ("n", 3, None))
W = TensorSpec("w", ir.DataType.FLOAT, (1,), overridable=True)


def test_the_same_contract_has_no_faults() -> None:
    assert input_faults((X, W), (X, W)) == []
    assert output_faults((X,), (X,)) == []


@pytest.mark.parametrize(
    ("change", "as_input", "as_output"),
    [
        ({"name": "q"}, "the inputs are 'q'; the reference has 'x'", "the outputs are 'q'"),
        ({"dtype": ir.DataType.INT8}, "is int8, the reference has float", "is int8"),
        ({"kind": Kind.SEQUENCE}, "is a sequence, the reference has a tensor", "is a sequence"),
        ({"shape": None}, "is float[?], the reference has float[n,3,?]", "is float[?]"),
        ({"shape": ("n", 3)}, "is float[n,3], the reference", "is float[n,3]"),
        ({"shape": (2, 3, None)}, "axis 0 of input 'x' is 2, the reference has 'n'", ""),
        ({"shape": ("m", 3, None)}, "axis 0 of input 'x' is 'm', the reference has 'n'", ""),
        ({"shape": ("n", 3, 7)}, "axis 2 of input 'x' is 7, the reference has free", ""),
        (
            {"shape": ("n", None, None)},
            "axis 1 of input 'x' is free",
            "axis 1 of output 'x' is free, the reference has 3",
        ),
        ({"shape": ("n", 3, "k")}, "", ""),
    ],
)
def test_each_difference_is_told(change: dict[str, object], as_input: str, as_output: str) -> None:
    other = dataclasses.replace(X, **change)  # type: ignore[arg-type]
    for faults, message in (
        (input_faults((X,), (other,)), as_input),
        (output_faults((X,), (other,)), as_output),
    ):
        assert bool(faults) is bool(message), faults
        assert message in "".join(faults)


def test_order_and_number_matter() -> None:
    y = dataclasses.replace(X, name="y")
    assert output_faults((X, y), (y, X)) == ["the outputs are 'y', 'x'; the reference has 'x', 'y'"]
    assert input_faults((X,), ()) == ["the inputs are none; the reference has 'x'"]


def test_defaults_stay_overridable() -> None:
    fixed = dataclasses.replace(W, overridable=False)
    assert "can no longer be overridden" in input_faults((X, W), (X,))[0]
    assert input_faults((X, W), (X, fixed)) != []
    assert dropped_defaults((X, W), (X,)) == ["w"]
    assert dropped_defaults((X, W), (X, W)) == []


def test_an_output_without_a_stated_type_may_get_one() -> None:
    untyped = TensorSpec("y", ir.DataType.UNDEFINED, None)
    typed = TensorSpec("y", ir.DataType.FLOAT, (2, 3))
    assert not output_faults([untyped], [typed])
    assert output_faults([typed], [untyped])
