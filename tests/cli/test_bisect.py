"""`graphopt bisect`: what it prints, writes and returns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, save
from tests.driver.test_bisect import MODEL

FAULTY = "tests.driver.faulty:one_relu_to_abs"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "m.onnx", MODEL)


def test_a_faulty_pass_is_named_and_reproduced(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    ran = run("bisect", model, "--pass", FAULTY, "-o", folder)
    assert ran.status == 1
    assert "Relu-to-Abs" in ran.out
    assert "without them the result is verified" in ran.out
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "after.onnx", "before.onnx", "test_data_set_0",
    ]  # fmt: skip


def test_a_sound_pipeline_gives_nothing_to_find(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    ran = run("bisect", model, "-o", folder)
    assert (ran.status, ran.err) == (0, "")
    assert "nothing to find" in ran.out
    assert not folder.exists()


def test_json_lists_the_guilty(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    body = run("bisect", model, "--pass", FAULTY, "-o", folder, "--json").json
    assert [(each["pass"], each["site"]) for each in body["guilty"]] == [("faulty", "c")]
    assert (body["repro"], body["verified"]) == (str(folder), True)


def test_without_the_pass_there_is_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    ran = run(
        "bisect", model, "--pass", FAULTY, "--disable", "faulty", "-o", tmp_path / "r", "--quiet"
    )
    assert (ran.status, ran.out) == (0, "")
