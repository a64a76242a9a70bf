"""What ONNX Runtime's kernels, parsers and the standard say to models."""

from __future__ import annotations

import dataclasses

import onnx
import onnx.parser
import pytest

from graphopt.emit.findings import Finding, Legality, Verdict
from graphopt.emit.legality import check_legality
from graphopt.ir.model_file import load_model
from graphopt.targets import get_target

HEAD = '<ir_version: 9, opset_import: ["" : {opset}{more}]>\n'


def check(text: str, target: str, *, opset: int = 18, more: str = "") -> Legality:
    full = text if text.startswith("<") else HEAD.format(opset=opset, more=more) + text
    return check_legality(load_model(onnx.parser.parse_model(full)), get_target(target))


def only(found: Legality) -> Finding:
    assert len(found.findings) == 1, found.findings
    return found.findings[0]


def test_a_model_of_registered_kernels_is_fine() -> None:
    found = check("g (float[N] x) => (float[N] y) { y = Relu(x) }", "cpu")
    assert found.verdict is Verdict.OK
    assert found.placement() == {"CPUExecutionProvider": 1}
    assert "1 " not in found.checked_against[0]


def test_types_without_kernel_are_refused_with_those_that_have_one() -> None:
    fault = only(check("g (bfloat16[N] x) => (bfloat16[N] y) { y = Relu(x) }", "cpu"))
    assert fault.verdict is Verdict.REFUSED
    assert "T = bfloat16" in fault.reason
    assert "float" in fault.reason
    assert "get_all_opkernel_def" in fault.source
    assert "float32" in fault.remedy
    assert (fault.node, fault.op, fault.graph) == ("y", "Relu", "main")


def test_half_floats_on_the_cpu_are_casts() -> None:
    fault = only(check("g (float16[N] x) => (float16[N] y) { y = Erf(x) }", "cpu"))
    assert fault.verdict is Verdict.WARNING
    assert "between two Casts" in fault.reason


def test_operators_without_kernel_are_replaced_by_their_function() -> None:
    text = "g (float[N] x) => (float[N] y) { y = Celu(x) }"
    assert check(text, "cuda").verdict in (Verdict.OK, Verdict.FALLS_BACK)
    assert not check(text.replace("Celu", "Mish"), "cpu").findings


def test_a_function_whose_parts_have_no_kernel_is_refused() -> None:
    fault = only(check("g (bfloat16[N] x) => (bfloat16[N] y) { y = Mish(x) }", "cpu"))
    assert fault.verdict is Verdict.REFUSED
    assert "the function that defines Mish" in fault.reason


def test_unknown_operators_of_a_custom_domain_are_refused() -> None:
    more = ', "my.ops" : 1'
    fault = only(check("g (float[N] x) => (float[N] y) { y = my.ops.F(x) }", "cpu", more=more))
    assert fault.verdict is Verdict.REFUSED
    assert "register_custom_ops_library" in fault.remedy


def test_settings_that_kernels_throw_at_are_refused() -> None:
    text = (
        "g (float[1,2,3] x, float[1,4,3] w, float[1,4,4] r) => (y) "
        "{ y = RNN<hidden_size = 4, layout = 1>(x, w, r) }"
    )
    assert "layout = 1" in only(check(text, "cpu")).reason


def test_attributes_newer_than_the_runtime_are_refused() -> None:
    text = "g (float[N] x) => (float[N] y) { y = Relu<novel = 1>(x) }"
    assert "'novel'" in only(check(text, "cpu")).reason


def test_cuda_names_who_runs_what_it_has_not_and_counts_copies() -> None:
    text = "g (float[4,4] x) => (float[4,4] y) { a = Relu(x)  b = Det(a)  y = Mul(a, b) }"
    found = check(text, "cuda")
    fault = only(found)
    assert fault.verdict is Verdict.FALLS_BACK
    assert fault.provider == "CPUExecutionProvider"
    assert found.placement() == {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 1}
    assert found.copies.to_host == ("a",)
    assert found.copies.to_device == ("b",)
    assert found.copies.count == 2


def test_shape_arithmetic_stays_on_the_host_without_copies() -> None:
    text = (
        "g (float[N,4] x) => (float[M,K] y) <int64[1] two = {2}, int64[1] zero = {0}> "
        "{ s = Shape(x)  f = Gather(s, zero)  d = Mul(f, two)  h = Concat<axis = 0>(d, two)  y = Reshape(x, h) }"
    )
    found = check(text, "cuda")
    assert not found.findings
    assert found.placement() == {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 3}
    assert found.copies.count == 0


def test_an_input_that_both_sides_read_is_copied_once() -> None:
    found = check(
        "g (float[4,4] x) => (y, z) { y = Relu(x)  z = Det(x) }",
        "cuda",
    )
    assert found.copies.to_device == ("x",)


def test_constants_and_local_functions_run_nowhere() -> None:
    text = (
        '<ir_version: 9, opset_import: ["" : 18, "my" : 1]>\n'
        "g (float[N] x) => (float[N] y) { c = Constant<value = float {2}>() a = my.F(x)  y = Mul(a, c) }\n"
        '<domain: "my", opset_import: ["" : 18]> F (a) => (b) { b = Relu(a) }'
    )
    found = check(text, "cpu")
    assert not found.findings
    assert [node.provider for node in found.nodes][:2] == ["", ""]
    assert found.placement() == {"CPUExecutionProvider": 2}


def test_opsets_and_file_versions_beyond_the_runtime_are_refused() -> None:
    cpu = get_target("cpu")
    body = "g (float[N] x) => (float[N] y) { y = Relu(x) }"
    found = check(body, "cpu", opset=cpu.opset[1] + 1)
    assert found.refused[0].fix == "convert-opset"
    newer = cpu.ir_version[1] + 1
    text = f'<ir_version: {newer}, opset_import: ["" : 18]> {body}'
    assert f"IR version {newer}" in check(text, "cpu").refused[0].reason


def test_opsets_beyond_what_a_parser_vouches_for_are_worth_a_warning() -> None:
    found = check("g (float[N] x) => (float[N] y) { y = Relu(x) }", "tensorrt", opset=26)
    assert only(found).verdict is Verdict.WARNING
    old = check("g (float[N] x) => (float[N] y) { y = Relu(x) }", "tensorrt", opset=8)
    assert only(old).verdict is Verdict.WARNING


def test_portable_takes_standard_operators_alone() -> None:
    more = ', "com.microsoft" : 1'
    text = "g (float[N] x) => (float[N] y) { y = com.microsoft.Gelu(x) }"
    fault = only(check(text, "portable", more=more))
    assert (fault.verdict, fault.fix) == (Verdict.REFUSED, "expand-contrib")
    assert check(text, "cpu", more=more).verdict is Verdict.OK


def test_what_tensorrt_refuses_runs_on_cuda_under_onnx_runtime() -> None:
    det = "g (float[4,4] x) => (y) { a = Relu(x)  y = Det(a) }"
    assert check(det, "tensorrt").verdict is Verdict.REFUSED
    found = check(det, "ort-tensorrt")
    assert only(found).verdict is Verdict.FALLS_BACK
    assert found.placement() == {"TensorrtExecutionProvider": 1, "CPUExecutionProvider": 1}
    assert found.copies.to_host == ("a",)


def test_openvino_refuses_functions_and_doubts_what_was_not_tried() -> None:
    text = (
        '<ir_version: 9, opset_import: ["" : 18, "my" : 1]>\n'
        "g (float[N] x) => (float[N] y) { y = my.F(x) }\n"
        '<domain: "my", opset_import: ["" : 18]> F (a) => (b) { b = Relu(a) }'
    )
    assert only(check(text, "openvino")).fix == "inline-functions"
    bernoulli = check("g (float[N] x) => (float[N] y) { y = Bernoulli(x) }", "openvino")
    assert only(bernoulli).verdict is Verdict.REFUSED
    random = check("g () => (float[2] y) { y = RandomNormal<shape = [2]>() }", "openvino")
    assert only(random).verdict is Verdict.WARNING


def test_inputs_that_a_network_cannot_have_are_refused() -> None:
    found = check("g (int16[N] x) => (float[N] y) { y = Cast<to = 1>(x) }", "tensorrt")
    assert any("cannot enter or leave" in fault.reason for fault in found.refused)
    sequences = check("g (seq(float[N]) x) => (int64 y) { y = SequenceLength(x) }", "tensorrt")
    assert any("cannot enter or leave" in fault.reason for fault in sequences.refused)


def test_operators_newer_than_the_version_are_refused() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) <float[4] s = {1, 1, 1, 1}> { y = RMSNormalization(x, s) }"
    assert check(text, "tensorrt", opset=23).verdict is Verdict.OK
    faults = check(text, "tensorrt-10", opset=23).refused
    assert any("10.15" in fault.reason for fault in faults)


def test_the_worst_finding_is_the_verdict() -> None:
    base = Finding(Verdict.WARNING, "a", "b")
    worse = dataclasses.replace(base, verdict=Verdict.FALLS_BACK)
    assert Legality("t", (), (), (base, worse, base)).verdict is Verdict.FALLS_BACK
    assert Legality("t", (), (), ()).verdict is Verdict.OK


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt", "openvino", "portable"])
def test_nodes_of_branches_are_judged_where_they_are(target: str) -> None:
    text = (
        "g (bool c, float[N] x) => (float[N] y) { y = If(c) <"
        "then_branch = t () => (float[N] a) { a = Bernoulli<seed = 1.0>(x) }, "
        "else_branch = e () => (float[N] b) { b = Relu(x) }> }"
    )
    found = check(text, target)
    assert {node.graph for node in found.nodes} == {"main", "main/If (-> y)"}


def test_long_chains_of_shared_constants_are_judged_in_time() -> None:
    doubled = " ".join(f"c{i + 1} = Add(c{i}, c{i})" for i in range(40))
    text = (
        "g (float[4,4] x) => (y) <int64[1] k = {1}> "
        f"{{ c0 = Identity(k) {doubled} m = Sub(c40, c40)  y = ReduceSum(x, m) }}"
    )
    assert not check(text, "tensorrt").refused
