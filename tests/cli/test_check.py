"""`graphopt check`: what it prints and returns."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run, save

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
