"""The pytest plugin, in projects of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.driver.golden import golden_optimizer
from graphopt.verify.golden import record
from tests.cli.conftest import TIDY, save

pytest_plugins = ["pytester"]

MAKES = """
from pathlib import Path
import onnx, onnx.parser

TEXT = '''{text}'''

def test_export(tmp_path, graphopt_golden):
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    graphopt_golden(path, "tidy"{more})
"""


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture
def case(pytester: pytest.Pytester) -> Path:
    model = save(pytester.path / "source.onnx", TIDY)
    folder = pytester.path / "golden" / "tidy"
    record(folder, model, golden_optimizer())
    return folder


@pytest.mark.usefixtures("case")
def test_a_case_is_a_test(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["golden/tidy/golden.json::tidy PASSED*"])


def test_a_case_that_does_not_hold_says_why_without_a_stack(
    pytester: pytest.Pytester, case: Path
) -> None:
    text = (case / "structure.txt").read_text()
    (case / "structure.txt").write_text(text.replace("Relu", "Gelu"))
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["tidy: the structure changed:", "-*Gelu*", "+*Relu*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*GoldenError*raise*")


def test_an_update_writes_and_tells_old_and_new_errors(
    pytester: pytest.Pytester, case: Path
) -> None:
    (case / "structure.txt").write_text("nothing")
    result = pytester.runpytest_inprocess("--graphopt-update")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["tidy: written; errors: y 0.0e+00 * 0.0e+00"])
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_another_source_is_written_only_when_accepted(
    pytester: pytest.Pytester, case: Path
) -> None:
    save(case / "model.onnx", TIDY.replace("{1, 2, 3, 4}", "{1, 2, 3, 5}"))
    pytester.runpytest_inprocess().assert_outcomes(failed=1)
    pytester.runpytest_inprocess("--graphopt-update").assert_outcomes(failed=1)
    pytester.runpytest_inprocess("--graphopt-update", "--graphopt-accept").assert_outcomes(passed=1)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


@pytest.mark.usefixtures("case")
@pytest.mark.parametrize(("ci", "refused"), [("true", True), ("1", True), ("false", False)])
def test_nothing_is_updated_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, refused: bool
) -> None:
    monkeypatch.setenv("CI", ci)
    result = pytester.runpytest_inprocess("--graphopt-update")
    assert (result.ret == pytest.ExitCode.USAGE_ERROR) is refused


@pytest.mark.usefixtures("case")
def test_accepting_without_updating_is_a_mistake(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("--graphopt-accept")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_files_of_that_name_that_are_no_case_are_left_alone(pytester: pytest.Pytester) -> None:
    (pytester.path / "golden.json").write_text("[]")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def makes(pytester: pytest.Pytester, text: str = TIDY, more: str = "") -> None:
    pytester.makepyfile(test_export=MAKES.format(text=text, more=more))


def test_a_model_that_a_test_makes_has_a_case(pytester: pytest.Pytester) -> None:
    makes(pytester)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*there is no golden case*--graphopt-update*"])
    pytester.runpytest_inprocess("--graphopt-update").assert_outcomes(passed=1)
    assert (pytester.path / "__golden__" / "tidy" / "golden.json").is_file()
    pytester.runpytest_inprocess().assert_outcomes(passed=1)  # and is not collected besides


def test_an_export_that_changed_fails_until_it_is_accepted(pytester: pytest.Pytester) -> None:
    makes(pytester)
    pytester.runpytest_inprocess("--graphopt-update").assert_outcomes(passed=1)
    makes(pytester, TIDY.replace("Relu", "Abs"))
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*is not the one that was recorded: its structure changed*"])
    pytester.runpytest_inprocess("--graphopt-update").assert_outcomes(failed=1)
    pytester.runpytest_inprocess("--graphopt-update", "--graphopt-accept").assert_outcomes(passed=1)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_another_recipe_is_another_case(pytester: pytest.Pytester) -> None:
    makes(pytester)
    pytester.runpytest_inprocess("--graphopt-update").assert_outcomes(passed=1)
    makes(pytester, more=", recipe='target = \"portable\"'")
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(["*recorded with the recipe '', not 'target*"])
    pytester.runpytest_inprocess("--graphopt-update").assert_outcomes(passed=1)


def test_starting_pytest_imports_nothing_dear() -> None:
    code = "import sys, graphopt.pytest_plugin; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "graphopt.pytest_plugin" in loaded
    assert not loaded & {"numpy", "onnx", "onnx_ir", "onnxruntime", "graphopt.driver", "typer"}
