"""Forms of use: an operator may pay in one and not in another."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.targets import get_target


def test_softmax_over_an_inner_axis_is_for_targets_that_gain_by_it() -> None:
    for name, pays in (("cpu", False), ("tensorrt", True), ("portable", True)):
        assert get_target(name).emits("Softmax", opset=17, form="inner-axis") == pays
        assert not get_target(name).emits("Softmax", opset=17)


def test_forms_have_types_and_opsets_of_their_own() -> None:
    cpu = get_target("cpu")
    assert cpu.emits("Attention", opset=23, dtype=ir.DataType.FLOAT16)
    assert not cpu.emits("Attention", opset=23, dtype=ir.DataType.BFLOAT16, form="masked-rows")
    assert cpu.emits("Attention", opset=23, dtype=ir.DataType.FLOAT, form="masked-rows")
    assert not cpu.emits("Attention", opset=22, dtype=ir.DataType.FLOAT)


def test_statistics_in_float32_are_not_for_float64() -> None:
    for name in ("cpu", "cuda", "tensorrt", "portable"):
        target = get_target(name)
        assert target.emits("LayerNormalization", opset=17, dtype=ir.DataType.FLOAT)
        assert not target.emits("LayerNormalization", opset=17, dtype=ir.DataType.DOUBLE)
