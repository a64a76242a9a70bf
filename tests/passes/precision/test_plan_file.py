"""Precision plans: written, edited, read again on a model with other names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.precision import CastToHalf

from graphopt.cli.entry import main
from graphopt.driver import optimize
from graphopt.driver.result import Result
from graphopt.errors import OptionError
from graphopt.ir.scopes import all_graphs
from graphopt.pipeline import run_pipeline
from graphopt.report.explain import explain
from graphopt.rewrite import Context
from graphopt.targets import get_target
from tests.rewriting import parse

TEXT = (
    "g (float[N,16] x) => (float[N,16] y) <float[16,16] w, float[16,16] v>"
    "{ a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
)


def run(text: str, step: CastToHalf) -> dict[str, str]:
    """The dtype of each operator's output after the cast."""
    model = ir.from_proto(parse(text))
    run_pipeline(model, (step,), Context(model, get_target("cuda")))
    return {
        f"{node.op_type} {index}": node.outputs[0].dtype.name
        for index, node in enumerate(n for n in model.graph if n.op_type != "Cast")
        if node.outputs[0].dtype
    }


def test_an_edited_plan_is_followed_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert set(run(TEXT, CastToHalf(write_plan=str(path))).values()) == {"FLOAT16"}
    body = json.loads(path.read_text())
    assert [entry["operator"] for entry in body["nodes"]] == ["MatMul", "Relu", "MatMul"]
    body["nodes"][0]["dtype"] = "float32"
    path.write_text(json.dumps(body))
    renamed = TEXT.replace(" a ", " first ").replace("(a)", "(first)")
    made = run(renamed, CastToHalf(plan=str(path)))
    assert made == {"MatMul 0": "FLOAT", "Relu 1": "FLOAT", "MatMul 2": "FLOAT16"}


def test_a_plan_follows_the_model_into_a_new_export_on_the_command_line(tmp_path: Path) -> None:
    """Other names for every node and value, other weights, another order of the initializers: the same structure."""
    plan, first, second = tmp_path / "plan.json", tmp_path / "first.onnx", tmp_path / "second.onnx"
    text = (
        "g (float[N,16] x, bool c) => (float[N,16] y) <float[16,16] w, float[16,16] v>"
        "{ a = MatMul(x, w) o = If(c) <then_branch = t () => (float[N,16] p) { p = MatMul(a, v) },"
        "  else_branch = e () => (float[N,16] q) { q = Tanh(a) }> y = MatMul(o, w) }"
    )
    onnx.save(parse(text), first)

    def run_again(source: Path) -> Result:
        return optimize(source, recipe=recipe, target="cuda", precision="fp16", verify="off")

    recipe = tmp_path / "write.toml"
    recipe.write_text(f'[options.cast-to-half]\nwrite_plan = "{plan}"\n')
    run_again(first)
    body = json.loads(plan.read_text())
    assert all(entry["reason"] or entry["dtype"] != "float32" for entry in body["nodes"])
    inner = next(entry for entry in body["nodes"] if entry["node"] == "p")
    inner["dtype"] = "float32"
    plan.write_text(json.dumps(body))
    names = {"a": "hidden", "o": "chosen", "p": "left", "q": "right", "w": "weight", "v": "other"}
    onnx.save(parse(re.sub(r"\b[aopqwv]\b", lambda m: names[m[0]], text), seed=7), second)
    recipe.write_text(f'[options.cast-to-half]\nplan = "{plan}"\n')
    made = run_again(second)
    dtypes = {
        node.outputs[0].name: node.outputs[0].dtype
        for scope in all_graphs(made.model)
        for node in scope.graph
        if node.op_type == "MatMul"
    }
    assert [dtype for name, dtype in dtypes.items() if name == "left"] == [ir.DataType.FLOAT]
    assert list(dtypes.values()).count(ir.DataType.FLOAT16) == 2
    (sentence, *_) = explain(made.report, made.model, "left")[0].sentences
    assert sentence == "float32: MatMul: user"


def test_a_plan_is_saved_edited_and_followed_with_options_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan, out = tmp_path / "m.onnx", tmp_path / "plan.json", tmp_path / "out.onnx"
    onnx.save(parse(TEXT), model)
    half = ["optimize", str(model), "-o", str(out), "--target", "cuda", "--precision", "fp16"]
    assert main([*half, "--save-plan", str(plan), "--quiet"]) == 0
    body = json.loads(plan.read_text())
    body["nodes"][0]["dtype"] = "float32"
    body["nodes"].append({"key": "0-1", "node": "elsewhere", "dtype": "half"})
    plan.write_text(json.dumps(body))
    assert main([*half, "--plan", str(plan), "--explain", "a"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 nodes of" in told
    assert "are not in the model (elsewhere)" in told
    assert "float32: MatMul: user" in told


def test_a_plan_needs_a_precision_that_has_one(tmp_path: Path) -> None:
    model = parse(TEXT)
    with pytest.raises(OptionError, match=r"plan p.json: .*and fp32 has none; ask for"):
        optimize(model, plan="p.json")
    with pytest.raises(OptionError, match=r"save_plan .*fp32 has none.*fp16, bf16, fp8"):
        optimize(model, save_plan=tmp_path / "p.json")


def test_products_in_8_bits_are_saved_edited_and_followed(tmp_path: Path) -> None:
    plan, model = tmp_path / "plan.json", parse(TEXT)
    whole = optimize(model, target="tensorrt", precision="fp8", save_plan=plan)
    body = json.loads(plan.read_text())
    made = [each["dtype"] for each in body["nodes"]].count("float8")
    assert made == _scaled(whole.model) > 1
    body["nodes"][0]["dtype"] = "float32"
    plan.write_text(json.dumps(body))
    part = optimize(model, target="tensorrt", precision="fp8", plan=plan)
    assert _scaled(part.model) == made - 1
    assert not part.report.warnings


def _scaled(model: ir.Model) -> int:
    """Products that read an 8-bit weight."""
    return sum(
        node.inputs[0] is not None
        and (tensor := node.inputs[0].const_value) is not None
        and tensor.dtype is ir.DataType.FLOAT8E4M3FN
        for node in model.graph
        if node.op_type == "DequantizeLinear"
    )


def test_nodes_can_be_kept_by_name() -> None:
    assert run(TEXT, CastToHalf(float32=("y",)))["MatMul 2"] == "FLOAT"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the precision plan"),
        ("{", "is no precision plan"),
        ('{"nodes": [{"key": "k", "dtype": "half"}]}', "written for another one"),
        ('{"nodes": [{"key": "k", "dtype": "fp16"}]}', "unknown dtype fp16; write one of"),
    ],
)
def test_what_is_no_plan_for_the_model_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=message):
        run(TEXT, CastToHalf(plan=str(path)))


def test_a_plan_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot write the precision plan"):
        run(TEXT, CastToHalf(write_plan=str(tmp_path / "none" / "plan.json")))
