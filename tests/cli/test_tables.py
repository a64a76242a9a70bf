"""What a run looks like when something went wrong, and the progress line."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import pytest

from graphopt.cli import progress as progress_module
from graphopt.cli.console import show, text
from graphopt.cli.progress import progress
from graphopt.cli.run_tables import run_tables
from graphopt.report.facts import ModelFacts
from graphopt.report.patterns import PatternLayer
from graphopt.report.run import RolledBack, RunReport, VerificationFacts
from graphopt.rewrite.context import Remark, RemarkKind
from graphopt.verify.compare import OutputReport

FACTS = ModelFacts("a.onnx", 100, None, 9, {"": 18}, 4, {"Add": 4}, 8, 32)


def report(verification: VerificationFacts, **more: object) -> RunReport:
    return RunReport(FACTS, FACTS, "cpu", "fp32", (), verification, **more)  # type: ignore[arg-type]


def shown(facts: RunReport, capsys: pytest.CaptureFixture[str], *, every: bool = False) -> str:
    show(*run_tables(facts, every_remark=every))
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_a_failed_verification_shows_every_wrong_output(capsys: pytest.CaptureFixture[str]) -> None:
    right = [OutputReport(f"right{i}", passed=True, equal=True) for i in range(9)]
    wrong = [OutputReport(f"wrong{i}", passed=False, equal=False, why="too far") for i in range(9)]
    facts = VerificationFacts(
        "final", False, "reordered", (*right, *wrong), 3, "output 'wrong0': too far"
    )
    out = shown(report(facts), capsys)
    assert "differs  output 'wrong0': too far (gate: reordered)" in out
    assert all(f"wrong{i}" in out for i in range(9))
    assert "right0" not in out
    assert "… and 9 more outputs, all equal" in out


def test_what_was_rolled_back_is_named_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(
        VerificationFacts("final", True, "exact", (), 1),
        rolled_back=(
            RolledBack("tidy", "drop", "v7", "NaN"),
            RolledBack("fold", "", "", "it raised"),
        ),
        warnings=("mind the step",),
    )
    out = shown(facts, capsys)
    assert "left out  tidy/drop at 'v7': NaN" in out
    assert "left out  fold: it raised" in out
    assert "warning: mind the step" in out


REMARKS = tuple(
    Remark(RemarkKind.MISSED, "conv", "fold", f"n{i}", f"'n{i}' has other uses") for i in range(5)
)


def test_remarks_are_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(report(VerificationFacts("off"), remarks=REMARKS), capsys)
    assert [line.split() for line in out.splitlines() if "conv/fold" in line] == [
        ["conv/fold", "5", "…", "has", "other", "uses"]
    ]


def test_notes_are_told_apart_from_what_was_left_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    note = Remark(RemarkKind.NOTE, "cast", "plan", "", "ranges come from samples")
    out = shown(report(VerificationFacts("off"), remarks=(*REMARKS, note)), capsys)
    assert out.index("ranges come from samples") < out.index("left as it is")
    alone = shown(report(VerificationFacts("off"), remarks=(note,)), capsys)
    assert "left as it is" not in alone


def test_every_remark_is_listed_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(report(VerificationFacts("off"), remarks=REMARKS), capsys, every=True)
    assert out.count("conv/fold") == 5
    assert "because of" in out


def on_integers(index: int, **more: Any) -> Remark:
    facts = {
        "operator": "Conv", "kernel": "QLinearConv", "method": "mse", "clipped": 0.01, "sqnr_db": 38.51,
        "input_sqnr_db": 41.2, "weight_sqnr_db": 42.3, "refined": False, "raised_channels": 0, **more,
    }  # fmt: skip
    told = (RemarkKind.NOTE, "quantize-static", "quantize", f"layer{index}", "in words")
    return Remark(*told, facts=tuple(facts.items()))


def test_element_types_are_shown_where_they_differ(capsys: pytest.CaptureFixture[str]) -> None:
    bytes_only = on_integers(0, activations="uint8", weights="int8")
    pool = on_integers(1, activations="uint8", weights="", weight_sqnr_db=None)
    wide = on_integers(2, activations="uint16", weights="float8e4m3fn")
    alike = shown(report(VerificationFacts("off"), remarks=(bytes_only, pool)), capsys)
    assert "weights in" not in alike
    mixed = shown(report(VerificationFacts("off"), remarks=(bytes_only, pool, wide)), capsys)
    found = {line.split()[0]: line.split() for line in mixed.splitlines() if "layer" in line}
    assert found["layer"][-4:] == ["values", "in", "weights", "in"]
    assert found["layer0"][-2:] == ["uint8", "int8"]
    assert found["layer1"][-1] == "uint8"
    assert found["layer2"][-2:] == ["uint16", "float8e4m3fn"]
    assert max(map(len, mixed.splitlines())) <= 120
    unsigned = on_integers(3, activations="uint8", weights="uint8")
    both = shown(report(VerificationFacts("off"), remarks=(bytes_only, unsigned)), capsys)
    assert "weights in" in both


def test_layers_in_8_bits_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    many = (
        on_integers(0, refined=True, raised_channels=3),
        *(on_integers(i) for i in range(1, 18)),
    )
    out = shown(report(VerificationFacts("off"), remarks=many), capsys)
    (row,) = (line.split() for line in out.splitlines() if line.startswith("layer0 "))
    assert row == ["layer0", "QLinearConv", "mse", "1.00%", "38.5", "41.2", "42.3*", "3"]
    assert "* weight rounded by second moments" in out
    assert "layer16" not in out
    assert "… and 2 other layers; --remarks lists all" in out
    assert "in words" not in out
    every = shown(report(VerificationFacts("off"), remarks=many), capsys, every=True)
    assert "layer17" in every
    assert "other layers" not in every


def test_without_layers_in_8_bits_there_is_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert "clipped" not in shown(report(VerificationFacts("off"), remarks=REMARKS), capsys)


def test_many_reasons_are_cut_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    many = tuple(Remark(RemarkKind.NOTE, "p", f"r{i}", "", f"reason {i}") for i in range(11))
    assert "… and 3 other reasons" in shown(report(VerificationFacts("off"), remarks=many), capsys)


def test_colours_are_off_when_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in shown(report(VerificationFacts("off")), capsys)


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("wish", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_off_where_they_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch, wish: dict[str, str], coloured: bool
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **wish}.items():
        monkeypatch.setenv(name, value)
    show(text("differs", "red"))
    assert ("\x1b[31m" in screen.getvalue()) is coloured


def look_at(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Puts a terminal in the place of stderr; not as a fixture, since pytest sets stderr anew after those."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_progress_shows_what_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = look_at(monkeypatch)
    monkeypatch.setattr(progress_module, "DELAY_SECONDS", 0.0)
    with progress(quiet=False) as say:
        say("running the [reference]", 0.5)
        time.sleep(0.2)
    assert "running the [reference]" in terminal.getvalue()


def test_progress_is_silent_for_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = look_at(monkeypatch)
    with progress(quiet=False) as say:
        say("reading", None)
    assert terminal.getvalue() == ""


def test_progress_is_silent_when_asked_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = look_at(monkeypatch)
    monkeypatch.setattr(progress_module, "DELAY_SECONDS", 0.0)
    with progress(quiet=True) as say:
        say("reading", None)
        time.sleep(0.05)
    assert terminal.getvalue() == ""


def test_weights_that_sparse_kernels_cannot_take_come_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken = [
        PatternLayer(f"y{i}", "Gemm", f"w{i}", "K", 64, 8, 1, 64, 1.0, True, "", "MatMul")
        for i in range(20)
    ]
    refused = PatternLayer("g", "GRU", "r", "", 0, 0, 1, 0, 0.0, False, "not for GRU")
    facts = report(VerificationFacts("off"), pattern_layers=(*taken, refused))
    out = shown(facts, capsys)
    assert "not for GRU" in out
    assert "can read 20 of 21 weights" in out
    assert "… and 5 other weights" in out
    assert "w19" not in out
    assert "w19" in shown(facts, capsys, every=True)
    assert "sparse tensor cores" not in shown(report(VerificationFacts("off")), capsys)


def test_what_is_lossy_on_purpose_is_not_called_equal(capsys: pytest.CaptureFixture[str]) -> None:
    near = OutputReport("y", passed=True, equal=False, sqnr_db=9.6)
    facts = VerificationFacts("final", True, "lossy", (near,), 8, "no budget", judged=False)
    out = shown(report(facts), capsys)
    assert (
        "not judged  differs from the original on 8 inputs (SQNR of the worst output 9.6 dB)" in out
    )
    assert "no budget" in out
    assert "verified" not in out
    assert "equal" not in out


def test_what_has_a_budget_is_within_it(capsys: pytest.CaptureFixture[str]) -> None:
    near = OutputReport("y", passed=True, equal=False, sqnr_db=9.6)
    out = shown(report(VerificationFacts("final", True, "lossy", (near,), 1)), capsys)
    assert "verified  within the budget of the reference on 1 input (gate: lossy)" in out


def test_without_a_budget_the_same_bits_are_verified(capsys: pytest.CaptureFixture[str]) -> None:
    same = OutputReport("y", passed=True, equal=True)
    facts = VerificationFacts("final", True, "lossy", (same,), 8, judged=False)
    assert facts.verdict == "verified"
    assert "verified  within the budget" in shown(report(facts), capsys)
    assert VerificationFacts("final", None, judged=False).verdict == "unverified"
    assert VerificationFacts("final", False, "lossy", (same,), judged=False).verdict == "differs"
