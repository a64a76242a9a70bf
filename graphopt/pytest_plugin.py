"""The pytest plugin: golden cases as tests, and a fixture for models that a test makes.

pytest imports this module in every project where graphopt is installed, so nothing of graphopt is imported before
a golden case is met.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from graphopt.verify.golden import CaseReport

MANIFEST = "golden.json"
FIXTURE_FOLDER = "__golden__"
_NOTES = "graphopt_notes"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--graphopt-update` and `--graphopt-accept`."""
    group = parser.getgroup("graphopt", "golden cases of ONNX models (graphopt)")
    group.addoption(
        "--graphopt-update",
        action="store_true",
        help="record golden cases again instead of checking them; refused in continuous integration",
    )
    group.addoption(
        "--graphopt-accept",
        action="store_true",
        help="with --graphopt-update: write although an error grew or the source model is another",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to update where nobody would review what is written.

    Raises:
        pytest.UsageError: `--graphopt-update` in continuous integration, or `--graphopt-accept` without it.
    """
    update, accept = config.getoption("graphopt_update"), config.getoption("graphopt_accept")
    if update and os.environ.get("CI", "").lower() not in {"", "0", "false"}:
        raise pytest.UsageError(
            "--graphopt-update: golden cases are not updated in continuous integration (CI is set); run it where the "
            "change can be reviewed, and commit it"
        )
    if accept and not update:
        raise pytest.UsageError("--graphopt-accept says nothing without --graphopt-update")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The case whose manifest `file_path` is; cases of the fixture are checked by their tests."""
    if file_path.name != MANIFEST or not (file_path.parent / "structure.txt").is_file():
        return None
    if file_path.parent.parent.name == FIXTURE_FOLDER:
        return None
    found: pytest.Collector = GoldenFile.from_parent(parent, path=file_path)
    return found


class GoldenFile(pytest.File):
    """The manifest of one case."""

    def collect(self) -> Iterator[pytest.Item]:
        """One test, named after the folder."""
        yield GoldenItem.from_parent(self, name=self.path.parent.name)


class GoldenItem(pytest.Item):
    """Checks one case, or records it again with `--graphopt-update`."""

    def runtest(self) -> None:
        """Fails where the case does not hold."""
        from graphopt.driver.golden import golden_optimizer  # noqa: PLC0415
        from graphopt.verify.golden import check_case, update_case  # noqa: PLC0415

        case = self.path.parent
        if self.config.getoption("graphopt_update"):
            accept = bool(self.config.getoption("graphopt_accept"))
            report = update_case(case, golden_optimizer(), accept=accept)
        else:
            report = check_case(case, golden_optimizer())
        _settle(report, self.user_properties)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the case lies."""
        return self.path, None, f"golden case {self.name}"


@pytest.fixture
def graphopt_golden(request: pytest.FixtureRequest) -> Callable[..., CaseReport]:
    """Checks a model that the test made against the golden case of a name: `graphopt_golden(model, "encoder")`.

    Cases lie in `__golden__/NAME` beside the test file. `--graphopt-update` records new ones and renews old ones.
    """
    folder = request.path.parent / FIXTURE_FOLDER
    config, properties = request.config, request.node.user_properties

    def check(model: str | os.PathLike[str], name: str, recipe: str = "") -> CaseReport:
        from graphopt.driver.golden import golden_optimizer  # noqa: PLC0415
        from graphopt.verify import golden  # noqa: PLC0415

        case, optimize, source = folder / name, golden_optimizer(), Path(model)
        if config.getoption("graphopt_update"):
            report = golden.renew(
                case,
                source,
                optimize,
                recipe=recipe,
                accept=bool(config.getoption("graphopt_accept")),
            )
        else:
            report = golden.check_made(case, source, optimize, recipe=recipe)
        _settle(report, properties)
        return report

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Notes of golden cases: what was written, and what the runtime rather than the model changed."""
    stats = terminalreporter.stats
    reports = [report for outcome in ("passed", "failed") for report in stats.get(outcome, ())]
    lines = [
        str(line)
        for report in reports
        for key, lines in getattr(report, "user_properties", ())
        if key == _NOTES and report.when == "call"
        for line in lines
    ]
    if lines:
        terminalreporter.section("golden cases")
        for line in lines:
            terminalreporter.write_line(line)


def _settle(report: CaseReport, properties: list[tuple[str, object]]) -> None:
    """Keeps what the summary shall say; fails the test, without a stack, where the case does not hold."""
    notes = [f"{report.name}: {note}" for note in report.notes]
    if report.written:
        told = ", ".join(
            f"{e.output} {_number(e.recorded)} → {_number(e.now)}" for e in report.errors
        )
        notes.append(f"{report.name}: written; errors: {told or 'none'}")
    if notes:
        properties.append((_NOTES, notes))
    if not report.passed:
        pytest.fail("\n".join(f"{report.name}: {line}" for line in report.failures), pytrace=False)


def _number(number: float | None) -> str:
    return "none" if number is None else f"{number:.1e}"
