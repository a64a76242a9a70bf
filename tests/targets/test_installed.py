"""A target of another distribution, installed as pip leaves it, from the command line in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.rewriting import parse

MODULE = '''
"""A board that takes the standard of opset 17, without control flow."""

import dataclasses

from graphopt.targets import FusedOp, get_target

BOARD = dataclasses.replace(
    get_target("portable"),
    name="acme-board",
    summary="the board of Acme",
    opset=(13, 17),
    ir_version=(7, 8),
    domains={"": 17},
    fused=(FusedOp("LayerNormalization", "Acme's manual", since=17),),
    like="portable",
)
'''
MODEL = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[2,3] x) => (float[2,3] y) { a = com.microsoft.QuickGelu(x)  y = Relu(a) }"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the distribution is installed."""
    site = tmp_path / "site"
    info = site / "acme_board-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_board.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-board\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphopt.targets]\nacme = acme_board:BOARD\n")
    return {**os.environ, "PYTHONPATH": str(site)}


def graphopt(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphopt", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installed_target_is_checked_and_emitted_for(
    installed: dict[str, str], tmp_path: Path
) -> None:
    path, folder = tmp_path / "m.onnx", tmp_path / "deploy"
    onnx.save(parse(MODEL), path)
    assert "the board of Acme" in graphopt(installed, "targets", "acme-board").stdout
    found = graphopt(installed, "check", path, "-t", "acme-board", "--json")
    assert found.returncode == 3
    assert "com.microsoft" in json.loads(found.stdout)["findings"][-1]["reason"]
    made = graphopt(installed, "optimize", path, "-o", folder, "-t", "acme-board", "-q")
    assert made.returncode == 0, made.stderr
    proto = onnx.load(folder / "model.onnx")
    assert (proto.opset_import[0].version, proto.ir_version) == (17, 8)
    assert not any(node.domain for node in proto.graph.node)
    assert graphopt(installed, "check", folder / "model.onnx", "-t", "acme-board").returncode == 0


def test_the_example_in_the_documentation_is_the_one_that_is_tested() -> None:
    documentation = Path(__file__).parents[2] / "docs" / "targets.md"
    text = documentation.read_text(encoding="utf-8")
    body = MODULE.split("import dataclasses", 1)[1].strip()
    assert body in text
