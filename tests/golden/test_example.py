"""The example project of the documentation, copied and run as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "example"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copy = tmp_path / "project"
    shutil.copytree(EXAMPLE, copy)
    return copy


def run(project: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "CI"} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=project, env=env, capture_output=True, text=True, check=False
    )


def test_the_example_holds_and_notices_a_changed_export(project: Path) -> None:
    held = run(project, CI="true")
    assert held.returncode == 0, held.stdout
    assert "2 passed" in held.stdout
    export = project / "export.py"
    export.write_text(export.read_text().replace('"Softmax"', '"LogSoftmax"'))
    changed = run(project)
    assert changed.returncode == 1
    assert "its structure changed" in changed.stdout
    refused = run(project, "--graphopt-update", "--graphopt-accept", CI="true")
    assert refused.returncode == 4
    assert "not updated in continuous integration" in refused.stdout + refused.stderr
    accepted = run(project, "--graphopt-update", "--graphopt-accept")
    assert accepted.returncode == 0, accepted.stdout
    assert "export: written" in accepted.stdout
    assert run(project).returncode == 0
