"""What is left unimported until it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.deferred import Deferring, Late


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that fails when it is executed with `deferred_switch` absent from the loaded modules."""
    name = "module_to_defer"
    (tmp_path / f"{name}.py").write_text("import deferred_switch\nanswer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return name


def test_a_module_is_executed_at_its_first_use(module: str) -> None:
    Deferring([module]).install()
    held = importlib.import_module(module)  # would fail here, were it executed
    sys.modules["deferred_switch"] = sys
    assert held.answer == 42


def test_it_leaves_when_all_were_asked_for(module: str) -> None:
    finder = Deferring([module])
    finder.install()
    assert finder in sys.meta_path
    importlib.import_module(module)
    assert finder not in sys.meta_path


def test_it_is_not_installed_for_what_is_loaded_already() -> None:
    before = list(sys.meta_path)
    Deferring(["sys"]).install()
    assert sys.meta_path == before


def test_other_modules_and_missing_ones_go_the_usual_way(module: str) -> None:
    Deferring([module, "no_such_module"]).install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")


def test_no_run_needs_sympy() -> None:
    code = "import sys, graphopt.driver; print('sympy.core' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_symbolic_arithmetic_of_onnx_ir_still_works() -> None:
    code = "import graphopt.driver, onnx_ir; print(onnx_ir.SymbolicDim('n') + 1)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "n + 1"


def test_late_values_are_made_when_asked_for() -> None:
    made: list[str] = []

    def make() -> int:
        made.append("one")
        return 1

    late = Late({"one": make})
    assert list(late) == ["one"]
    assert len(late) == 1
    assert not made
    assert late["one"] == late.get("one") == 1
    assert len(made) == 2
    assert late.get("two") is None


def test_a_run_in_float32_imports_neither_casts_nor_quantisation() -> None:
    code = (
        "import sys, graphopt; from graphopt.pipeline.registry import pipeline_for\n"
        "from graphopt.targets import get_target\n"
        "pipeline_for(get_target('cpu'), graphopt.Precision.FP32)\n"
        "names = ('precision.cast', 'quantize.trials', 'quantize.blocks')\n"
        "print([n for n in names if 'graphopt_passes.' + n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
