"""The repository's own golden cases: real models, optimised as users would, compared in numbers and structure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from graphopt.driver.golden import golden_optimizer
from graphopt.verify.golden import check_case
from graphopt.verify.golden_folder import find_cases, find_orphans, read_manifest

ROOT = Path(__file__).resolve().parents[2] / "golden"
CASES = find_cases(ROOT)

MAX_BYTES = 1 << 20


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case_holds(case: Path) -> None:
    report = check_case(case, golden_optimizer())
    assert report.passed, "\n".join(report.failures)


def test_every_file_belongs_to_a_case() -> None:
    assert find_orphans(ROOT, CASES) == ()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_cases_stay_small(case: Path) -> None:
    files = [path for path in case.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_the_matrix_is_whole() -> None:
    recipes = {case.name: tomllib.loads(read_manifest(case)["recipe"]) for case in CASES}
    targets = {recipe.get("target", "cpu") for recipe in recipes.values()}
    precisions = {recipe.get("precision", "fp32") for recipe in recipes.values()}
    assert targets >= {"cpu", "cuda", "tensorrt", "portable"}
    assert precisions >= {"fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4-weights"}
    kinds = {
        "mnist_cntk",
        "encoder",
        "detector",
        "gtcrn",
        "if_capture",
        "loop",
        "qdq",
        "half",
        "sparse",
        "functions",
    }
    assert set(recipes) >= kinds


IN_BITS = {
    "int8": "QuantizeLinear",
    "int8-dynamic": "DynamicQuantizeLinear",
    "int4-weights": "com.microsoft::MatMulNBits",
}


def test_cases_in_few_bits_hold_what_they_are_called_after() -> None:
    for case in CASES:
        manifest = read_manifest(case)
        wanted = IN_BITS.get(tomllib.loads(manifest["recipe"]).get("precision", ""))
        assert wanted is None or wanted in manifest["ops"], case.name


def test_a_check_does_not_depend_on_the_number_of_threads() -> None:
    """The reference runs on one thread wherever it runs: what the environment offers changes nothing."""
    case = ROOT / "encoder"
    found = []
    for threads in ("1", "4"):
        ran = subprocess.run(
            [sys.executable, "-m", "graphopt", "golden", "check", str(case), "--json"],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "ORT_NUM_THREADS": threads},
            check=True,
        )
        found.append(json.loads(ran.stdout))
    assert found[0] == found[1]
