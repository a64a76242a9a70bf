"""`graphopt optimize`: what it writes, prints and returns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.cli.console import change, count, scaled, size
from graphopt.cli.optimize import parse_bytes
from graphopt.cli.run_tables import without_names
from graphopt.errors import OptionError
from tests.cli.conftest import Run, save

KEYS = {
    "graphopt", "input", "output", "target", "precision", "nodes", "parameter_bytes", "passes", "verification",
    "remarks", "rolled_back", "recipe", "seed", "warnings",
}  # fmt: skip


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_result_is_written_and_told(run: Run, model: Path, out: Path) -> None:
    ran = run("optimize", model, "-o", out)
    assert (ran.status, ran.err) == (0, "")
    assert operators(out) == ["Add", "Relu"]
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert f"{model} → {out}" in ran.out.replace("\n", "")
    assert "verified  bit-equal to the reference" in ran.out
    assert "−50 %" in ran.out  # noqa: RUF001
    assert max(map(len, ran.out.splitlines())) <= 100


def test_the_result_is_the_same_bytes_every_time(run: Run, model: Path, out: Path) -> None:
    again = out.with_name("again.onnx")
    run("optimize", model, "-o", out)
    run("optimize", model, "-o", again)
    assert out.read_bytes() == again.read_bytes()


def test_json_is_one_object_with_the_documented_keys(run: Run, model: Path, out: Path) -> None:
    ran = run("optimize", model, "-o", out, "--json")
    assert (ran.status, ran.err) == (0, "")
    body = ran.json
    assert set(body) >= KEYS
    assert body["nodes"] == {"before": 4, "after": 2}
    assert body["parameter_bytes"] == {"before": 32, "after": 16}
    assert (body["target"], body["precision"], body["seed"]) == ("cpu", "fp32", 0)
    assert body["output"]["path"] == str(out)
    assert body["output"]["size_bytes"] == out.stat().st_size
    assert body["verification"]["mode"] == "final"
    assert body["verification"]["passed"] is True
    assert [o["name"] for o in body["verification"]["outputs"]] == ["y"]
    assert all(
        set(p) == {"name", "changed", "rewrites", "seconds", "nodes_after"} for p in body["passes"]
    )


def test_nodes_are_explained_in_text_and_json(run: Run, model: Path, out: Path) -> None:
    last = onnx.load(model).graph.output[0].name
    half = ("--target", "cuda", "--precision", "fp16", "--explain", last)
    ran = run("optimize", model, "-o", out, *half)
    assert ran.status == 0
    assert (
        f"\n{last}\n  float32: Add: cost" in ran.out
        or f"\n{last}\n  float32: Relu: cost" in ran.out
    )
    sentences = run("optimize", model, "-o", out, "--json", *half).json["explained"][last]
    assert sentences[0].startswith("float32: ")


def test_quiet_says_nothing(run: Run, model: Path, out: Path) -> None:
    ran = run("optimize", model, "-o", out, "--quiet")
    assert (ran.status, ran.out, ran.err) == (0, "", "")
    assert out.exists()


@pytest.mark.parametrize("suffix", [".html", ".json", ".md"])
def test_reports_are_written_by_suffix(run: Run, model: Path, out: Path, suffix: str) -> None:
    report = out.with_suffix(suffix)
    assert run("optimize", model, "-o", out, "--report", report).status == 0
    text = report.read_text(encoding="utf-8")
    if suffix == ".json":
        assert json.loads(text)["nodes"] == {"before": 4, "after": 2}
    elif suffix == ".html":
        assert '<b id="nodes">4 → 2</b>' in text
        assert "Latency" in text
    else:
        assert "**Verified**" in text


@pytest.mark.parametrize("name", ["report.pdf", "report", "nowhere/report.json", "."])
def test_a_report_that_cannot_be_written_stops_the_run_before_it_starts(
    run: Run, model: Path, out: Path, name: str
) -> None:
    ran = run("optimize", model, "-o", out, "--report", out.parent / name)
    assert ran.status == 2
    assert "--report" in ran.message
    assert not out.exists()


def test_verification_can_be_left_out_and_that_is_said(run: Run, model: Path, out: Path) -> None:
    ran = run("optimize", model, "-o", out, "--verify", "off")
    assert ran.status == 0
    assert "unverified  --verify off: nothing was compared" in ran.out


def test_verify_each(run: Run, model: Path, out: Path) -> None:
    body = run("optimize", model, "-o", out, "--verify", "each", "--json").json
    assert (body["verification"]["mode"], body["verification"]["passed"]) == ("each", True)


def test_a_model_that_no_runtime_here_knows_is_unverified(
    run: Run, tmp_path: Path, out: Path
) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "house" : 1]>
    g (float[4] x) => (float[4] y) { a = Identity(x) y = house.Special(a) }"""
    ran = run("optimize", save(tmp_path / "custom.onnx", text), "-o", out)
    assert ran.status == 0
    assert "unverified" in ran.out
    assert "Special" in ran.out
    assert operators(out) == ["Special"]


def test_passes_and_rules_can_be_disabled(run: Run, model: Path, out: Path) -> None:
    body = run(
        "optimize", model, "-o", out, "--disable", "tidy/drop-identity", "--disable", "remove-dead-code",
        "--json",
    ).json  # fmt: skip
    assert "Identity" in operators(out)
    assert body["parameter_bytes"]["after"] == 32


def test_a_pass_can_be_added(run: Run, model: Path, out: Path) -> None:
    body = run("optimize", model, "-o", out, "--pass", "fold-constants", "--json").json
    assert body["passes"][-1]["name"] == "fold-constants"


def test_a_recipe_is_followed(run: Run, model: Path, tmp_path: Path, out: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'target = "portable"\npipeline = ["remove-dead-code"]\nverify = "off"\nseed = 7\n'
    )
    body = run("optimize", model, "-o", out, "--recipe", recipe, "--json").json
    assert (body["target"], body["seed"], body["recipe"]) == ("portable", 7, str(recipe))
    assert {each["name"] for each in body["passes"]} == {"remove-dead-code"}


def test_inputs_of_the_user_are_used(run: Run, model: Path, tmp_path: Path, out: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((3, 4), np.float32))
    body = run("optimize", model, "-o", out, "--inputs", tmp_path / "in.npz", "--json").json
    assert body["verification"]["feeds"] == 1


@pytest.mark.parametrize(
    ("where", "files"),
    [("auto", 1), ("never", 1), ("single", 2), ("per-tensor", 3)],
)
def test_weights_go_where_they_should(
    run: Run, tmp_path: Path, out: Path, where: str, files: int
) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]> g (float[N, 512] x) => (float[N, 512] y)
    { a = Add(x, v) y = Mul(a, w) }"""
    proto = onnx.parser.parse_model(text)
    for name in ("v", "w"):
        data = np.arange(512, dtype=np.float32) + ord(name)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(data, name))
    onnx.save(proto, tmp_path / "m.onnx")
    ran = run("optimize", tmp_path / "m.onnx", "-o", out, "--external", where, "--json")
    assert ran.status == 0, ran.err
    written = list(out.parent.iterdir())
    assert len(written) == files
    assert ran.json["output"]["size_bytes"] == sum(path.stat().st_size for path in written)


def test_onnx_text_can_be_read(run: Run, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "model.onnxtxt"
    source.write_text("""<ir_version: 9, opset_import: ["" : 18]>
    g (float[4] x) => (float[4] y) { a = Identity(x) y = Relu(a) }""")
    assert run("optimize", source, "-o", out).status == 0
    assert operators(out) == ["Relu"]


def test_an_existing_output_is_replaced(run: Run, model: Path, out: Path) -> None:
    out.write_bytes(b"old")
    assert run("optimize", model, "-o", out).status == 0
    assert operators(out) == ["Add", "Relu"]


def test_a_model_can_be_optimised_in_place(run: Run, model: Path) -> None:
    assert run("optimize", model, "-o", model).status == 0
    assert operators(model) == ["Add", "Relu"]


def test_every_remark_is_listed_if_asked_for(run: Run, model: Path, out: Path) -> None:
    ran = run("optimize", model, "-o", out, "--remarks", "--json")
    assert all(
        set(each) == {"kind", "pass", "rule", "node", "reason", "culprit"}
        for each in ran.json["remarks"]
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("65536", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("16M", 16 << 20),
        ("1G", 1 << 30),
        ("0", 0),
    ],
)
def test_sizes_are_read(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5M", "M", "1 T"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="is not a size: give bytes, as in 65536, 64k or 16M"):
        parse_bytes(text)


def test_the_fold_limit_is_passed_on(run: Run, tmp_path: Path, out: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N, 4096] x) => (float[N, 4096] y) <int64[1] n = {4096}, float[1] one = {1.5}> {
      w = Expand(one, n)  y = Mul(x, w) }"""
    source = save(tmp_path / "m.onnx", text)
    folded = run("optimize", source, "-o", out, "--fold-limit", "1M", "--disable", "simplify-algebra",
                 "--disable", "simplify-shapes", "--json").json  # fmt: skip
    kept = run("optimize", source, "-o", out, "--fold-limit", "0", "--disable", "simplify-algebra",
               "--disable", "simplify-shapes", "--json").json  # fmt: skip
    assert folded["parameter_bytes"]["after"] > kept["parameter_bytes"]["after"]


def test_numbers_are_short() -> None:
    assert [scaled(n) for n in (0, 999, 1000, 1234567, 999_600)] == [
        "0",
        "999",
        "1 k",
        "1.23 M",
        "1 M",
    ]
    assert size(4_320_000) == "4.32 MB"
    assert size(None) == "\N{EN DASH}"
    assert count(1234567) == "1\N{THIN SPACE}234\N{THIN SPACE}567"
    assert [change(*pair) for pair in ((10, 10), (10, 5), (1000, 1001), (10000, 10002), (0, 3))] == [
        "=", "\N{MINUS SIGN}50 %", "+0.1 %", "+0.02 %", "new",
    ]  # fmt: skip


def test_the_same_reason_counts_once_whatever_its_nodes() -> None:
    assert without_names("value '/a/b' has other uses") == "value … has other uses"
    assert without_names("more than the limit (1 MiB)") == "more than the limit (1 MiB)"
