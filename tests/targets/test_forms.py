"""Forms of use: an operator may pay in one and not in another."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.ir import operators
from graphopt.targets import get_target
from graphopt.targets.kernels import packaged_kernels


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


PACKAGED = 26
"""The newest opset of the runtime that the packaged tables were read from."""

NEWEST = {"Attention": 24}
"""The newest version that ONNX Runtime 1.31 knows, where the standard has a newer one: it serves later opsets too."""


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_what_is_emitted_has_a_kernel_at_every_opset(name: str) -> None:
    """A kernel that is registered for an older version of an operator alone serves no newer one."""
    target, lacking = get_target(name), set()
    table = packaged_kernels(target.kernels[0])
    for fused in target.fused:
        last = fused.until or PACKAGED
        for opset in (1,) if fused.domain else range(max(fused.since, 7), last + 1):
            version = operators.find_schema(fused.op_type, opset, fused.domain)
            since = 1 if version is None else version.since_version
            since = min(since, NEWEST.get(fused.op_type, since))
            kernels = [k for k in table.find(fused.domain, fused.op_type) if k.serves(since)]
            taken = {t for k in kernels for key in ("T", "T1") for t in k.types.get(key, ())}
            lacks = {each.lower() for each in fused.dtypes} - taken
            lacking |= {(fused.op_type, opset, each) for each in lacks}
    assert not lacking


def test_last_opset_of_a_kernel() -> None:
    cuda = get_target("cuda")
    assert cuda.emits("InstanceNormalization", opset=21, dtype=ir.DataType.FLOAT16)
    assert not cuda.emits("InstanceNormalization", opset=22, dtype=ir.DataType.FLOAT16)
    assert cuda.emits("LayerNormalization", opset=22, dtype=ir.DataType.FLOAT, form="groups")
    assert not cuda.emits("LayerNormalization", opset=21, dtype=ir.DataType.FLOAT, form="groups")
