"""Shared fixtures: the model zoo, wherever this checkout finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def find_zoo() -> Path | None:
    """The folder `shared/zoo` beside (or inside) the checkout, or None."""
    candidates = (ROOT.parent / "shared" / "zoo", ROOT / "shared" / "zoo")
    return next((path for path in candidates if (path / "README.md").is_file()), None)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The model zoo; skips where it is absent, and says what to do."""
    path = find_zoo()
    if path is None:
        pytest.skip(
            "no model zoo: put the folder shared/zoo beside the checkout to run these tests"
        )
    return path
