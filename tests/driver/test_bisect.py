"""From a wrong result to the rewrite that made it so, and to a model that shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from graphopt import OptionError, optimize
from graphopt.cli import main
from tests.cli.conftest import save
from tests.driver.faulty import Rename

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,-11,12,-13,14,15,-16}> {
  a = MatMul(x, w)
  b = Relu(a)
  c0 = MatMul(b, w)
  c1 = Neg(c0)
  c = Relu(c1)
  d0 = Add(c, b)
  d = Relu(d0)
  y = Sin(d)
}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "m.onnx", MODEL)


@pytest.mark.parametrize("mode", ["final", "each"])
def test_only_the_guilty_site_is_left_out(model: Path, mode: str) -> None:
    report = optimize(model, passes=[Rename(only="c")], verify=mode).report
    (guilty,) = report.rolled_back
    assert (guilty.pass_name, guilty.rule, guilty.site) == ("faulty", "Relu-to-Abs", "c")
    assert "'c' (Abs) is the first value to differ" in guilty.reason
    assert report.verification.passed
    assert sum(each.pass_name == "faulty" for each in report.rewrites) == 2


@pytest.mark.parametrize("mode", ["final", "each"])
def test_several_guilty_sites_are_all_left_out(model: Path, mode: str) -> None:
    report = optimize(model, passes=[Rename()], verify=mode).report
    assert {each.site for each in report.rolled_back} == {"b", "c"}, "d is never negative"
    assert report.verification.passed


def test_the_reproduction_fails_on_its_own(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    optimize(model, passes=[Rename(only="c")], repro=folder)
    before, after = (onnx.load(folder / name) for name in ("before.onnx", "after.onnx"))
    onnx.checker.check_model(before, full_check=True)
    assert [node.op_type for node in after.graph.node] == ["Abs"]
    assert [value.name for value in before.graph.input] == [v.name for v in after.graph.input]
    assert "`faulty/Relu-to-Abs` at `c`" in (folder / "README.md").read_text()
    arguments = [str(folder / "before.onnx"), str(folder / "after.onnx"), "--inputs", str(folder)]
    assert main(["verify", *arguments, "--quiet"]) == 1
    # In a process that knows neither the whole model nor the pass, as README.md says.
    command = [sys.executable, "-m", "graphopt", "verify", *arguments, "--quiet"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 1
    assert main(["verify", arguments[0], *arguments[:1], *arguments[2:], "--quiet"]) == 0


def test_a_region_takes_what_either_side_needs(tmp_path: Path) -> None:
    """The original reads `a`, the result reads `b`: both get both."""
    text = MODEL.replace("d0 = Add(c, b)", "p = Add(c, b) q = Add(p, b) d0 = Add(q, c)")
    model = save(tmp_path / "m.onnx", text)
    folder = tmp_path / "repro"
    optimize(model, passes=[Rename("Sin", "Cos")], repro=folder)
    sides = [onnx.load(folder / name).graph for name in ("before.onnx", "after.onnx")]
    assert sides[0].input == sides[1].input
    assert main(["verify", *(str(folder / n) for n in ("before.onnx", "after.onnx")), "-q"]) == 1


def test_a_folder_of_something_else_is_not_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(OptionError, match="is not empty"):
        optimize(model, repro=tmp_path / "mine")
    with pytest.raises(OptionError, match="is not a folder"):
        optimize(model, repro=model)


def test_control_flow_that_differs_is_named(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N, 4] x, bool c) => (float[N, 4] y) {
      a = Relu(x)
      b = If (c) <then_branch = t () => (float[N, 4] p) { p = Neg(a) },
                  else_branch = e () => (float[N, 4] q) { q = Sin(a) }>
      y = Relu(b)
    }"""
    model = save(tmp_path / "m.onnx", text)
    folder = tmp_path / "repro"
    report = optimize(model, passes=[Rename(only="y")], repro=folder).report
    assert [each.site for each in report.rolled_back] == ["y"]
    assert main(["verify", *(str(folder / n) for n in ("before.onnx", "after.onnx")), "-q"]) == 1
