"""`graphopt check`: what it prints and returns."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.cli.conftest import Run, save
from tests.rewriting import parse

REFUSED = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[K] y) { a = Relu(x)  y = Unique(a) }"""


def test_a_model_that_is_taken(run: Run, model: Path) -> None:
    ran = run("check", model)
    assert ran.status == 0
    assert "is taken" in ran.out
    assert "CPUExecutionProvider" in ran.out
    assert "Identity" not in ran.out


def test_every_node_on_request(run: Run, model: Path) -> None:
    assert "Identity" in run("check", model, "--all").out


def test_a_model_that_is_refused(run: Run, tmp_path: Path) -> None:
    ran = run("check", save(tmp_path / "m.onnx", REFUSED), "--target", "tensorrt")
    assert ran.status == 3
    assert "Unique is not supported" in ran.out
    assert "remedy:" in ran.out
    assert "rule:" in ran.out


def test_json_has_every_node(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", REFUSED)
    body = run("check", path, "-t", "tensorrt", "--json").json
    assert (body["verdict"], body["target"]) == ("refused", "tensorrt")
    assert [node["verdict"] for node in body["nodes"]] == ["ok", "refused"]
    assert body["findings"][0]["op"] == "Unique"
    assert body["copies"] == {"to_host": [], "to_device": []}


def test_falling_back_is_no_failure(run: Run, tmp_path: Path) -> None:
    ran = run("check", save(tmp_path / "m.onnx", REFUSED), "-t", "cuda")
    assert ran.status == 0
    assert "falls-back: CUDAExecutionProvider has no kernel for Unique" in ran.out
    assert "predicted copies in each run: 1 to the host" in ran.out


def test_quiet_says_nothing(run: Run, model: Path) -> None:
    assert run("check", model, "-q").out == ""


def test_output_needs_fix(run: Run, model: Path, out: Path) -> None:
    ran = run("check", model, "-o", out)
    assert ran.status == 2
    assert "goes with --fix" in ran.message


def test_an_unknown_target(run: Run, model: Path) -> None:
    assert run("check", model, "-t", "tpu").status == 2


CONTRIB = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[N, 4] x) => (float[N, 4] y) { y = com.microsoft.QuickGelu(x) }"""


def test_fix_mends_verifies_and_writes(run: Run, tmp_path: Path, out: Path) -> None:
    path = save(tmp_path / "m.onnx", CONTRIB)
    ran = run("check", path, "-t", "portable", "--json")
    assert (ran.status, ran.json["findings"][0]["fix"]) == (3, "expand-contrib")
    ran = run("check", path, "-t", "portable", "--fix", "-o", out, "--json")
    assert (ran.status, ran.json["fixed"]) == (0, ["expand-contrib"])
    assert run("check", out, "-t", "portable").status == 0
    assert run("verify", path, out).status == 0


def test_fix_without_output_writes_nothing(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", CONTRIB)
    ran = run("check", path, "-t", "tensorrt", "--fix")
    assert ran.status == 0
    assert "after expand-contrib" in ran.out
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


def test_what_no_pass_mends_stays_refused(run: Run, tmp_path: Path) -> None:
    ran = run("check", save(tmp_path / "m.onnx", REFUSED), "-t", "tensorrt", "--fix")
    assert ran.status == 3
    assert "after" not in ran.out


def test_what_stays_refused_is_not_written(run: Run, tmp_path: Path, out: Path) -> None:
    out.write_bytes(b"old")
    path = save(tmp_path / "m.onnx", REFUSED)
    assert run("check", path, "-t", "tensorrt", "--fix", "-o", out).status == 3
    assert [each.name for each in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == b"old"


def test_what_needs_no_mending_is_written_all_the_same(run: Run, model: Path, out: Path) -> None:
    assert run("check", model, "--fix", "-o", out).status == 0
    assert run("verify", model, out).status == 0
    bundle = out.parent / "bundle"
    assert run("check", model, "--fix", "-o", bundle).status == 0
    assert (bundle / "manifest.json").is_file()


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    run: Run, tmp_path: Path, out: Path
) -> None:
    path = save(tmp_path / "m.onnx", REFUSED)
    ran = run("check", path, "-t", "tensorrt", "--fix", "-o", out.parent / "none" / "x.onnx")
    assert ran.status == 2
    assert "mkdir" in ran.message


def test_reasons_that_differ_in_numbers_alone_are_told_once(run: Run, tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g () => (float[2] y, float[2] w) <int8[2] q = {1, 2}, float s = {1}, int8 a = {3}, int8 b = {4}> {
      y = DequantizeLinear(q, s, a)
      w = DequantizeLinear(q, s, b)
    }"""
    ran = run("check", save(tmp_path / "m.onnx", text), "-t", "tensorrt")
    assert ran.out.count("zero point") == 2  # the reason and the remedy
    assert "y (main), w (main)" in ran.out


ODD = {
    "bytes with zero points": (
        "float[2,4] x",
        "<float s = {0.11}, uint8 z = {121}> "
        "{ q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)  y = Relu(r) }",
        18,
        {"symmetrize-quantization"},
    ),
    "an integer convolution": (
        "uint8[1,2,5,5] x",
        "<float s = {0.11}, uint8 z = {121}, int8[3,2,3,3] w, int8 o = {0}> "
        "{ y = QLinearConv(x, s, z, w, s, o, s, z) }",
        18,
        {"write-out-integers"},
    ),
    "words of 16 bits": (
        "float[2,4] x",
        "<float s = {0.001}, uint16 z = {30000}> { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        21,
        {"write-out-integers"},
    ),
    "a loss": (
        "float[3,5] x, int64[3] t",
        "{ y = SoftmaxCrossEntropyLoss(x, t) }",
        17,
        {"decompose"},
    ),
    "a constant that folds": (
        "float[5,4] x",
        "<int64 n = {4}, int64 d = {6}, int64 r = {8000}, float a = {0}, float b = {4000}> "
        "{ m = MelWeightMatrix(n, d, r, a, b)  y = MatMul(x, m) }",
        17,
        {"fold-constants"},
    ),
    "a sequence": (
        "float[2,4] x",
        "<int64 i = {1}> { s = SequenceConstruct(x, x)  e = SequenceAt(s, i)  y = Relu(e) }",
        18,
        {"tidy"},
    ),
    "an old branch": (
        "float[1,1,2,2] x, bool c",
        "{ y = If(c) <then_branch = t () => (float[1,1,4,4] a) { a = Upsample<scales = [1.0, 1.0, 2.0, 2.0]>(x) }, "
        "else_branch = e () => (float[1,1,4,4] b) { d = Concat<axis = 3>(x, x)  b = Concat<axis = 2>(d, d) }> }",
        8,
        {"convert-opset"},
    ),
}


@pytest.mark.parametrize("case", list(ODD))
def test_fix_mends_odd_models(run: Run, tmp_path: Path, out: Path, case: str) -> None:
    inputs, body, opset, passes = ODD[case]
    text = f'<ir_version: {10 if opset > 19 else 8}, opset_import: ["" : {opset}]> g ({inputs}) => (y) {body}'
    path = tmp_path / "m.onnx"
    onnx.save(parse(text), path)
    ran = run("check", path, "-t", "tensorrt", "--fix", "-o", out, "--json")
    assert ran.status == 0, ran.out
    assert set(ran.json["fixed"]) >= passes
    assert run("check", out, "-t", "tensorrt").status == 0


def test_what_is_fed_is_to_be_bound(run: Run, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[1,1,4,4] x, float[4] s) => (float[1,1,A,B] y) { y = Resize(x, , s) }"""
    ran = run("check", save(tmp_path / "m.onnx", text), "-t", "tensorrt")
    assert ran.status == 3
    assert "--bind s=VALUE" in ran.out
