"""What the exporter writes today is what was reviewed, and optimising it gives what was reviewed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from export import export

RECIPE = (Path(__file__).parents[1] / "recipe.toml").read_text(encoding="utf-8")


def test_the_export(tmp_path: Path, graphopt_golden: Callable[..., Any]) -> None:
    path = tmp_path / "head.onnx"
    export(path)
    report = graphopt_golden(path, "export", RECIPE)
    assert report.passed
