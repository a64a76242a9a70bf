"""What `import graphopt` offers, and `python -m graphopt`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import graphopt


def test_every_public_name_is_there() -> None:
    assert sorted(graphopt.__all__) == dir(graphopt)
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'graphopt' has no attribute 'optimise'"):
        graphopt.optimise  # noqa: B018


def test_the_package_runs_as_a_module() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "graphopt", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("graphopt ")
