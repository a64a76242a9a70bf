"""The frame of the command line: help, versions, exit statuses, what happens when something breaks."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt.cli import entry, failure, main
from graphopt.errors import (
    DataError,
    GraphoptError,
    ModelError,
    OptionError,
    PassError,
    TargetError,
    VerifyError,
)
from tests.cli.conftest import Run

Fails = Callable[[BaseException], None]

COMMANDS = (
    "optimize",
    "inspect",
    "verify",
    "diff",
    "bisect",
    "bench",
    "golden",
    "passes",
    "targets",
)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fails:
    """Makes the command line raise."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def arrange(error: BaseException) -> None:
        def broken(**_: object) -> int:
            raise error

        monkeypatch.setattr(entry, "app", broken)

    return arrange


def test_help_lists_every_command(run: Run) -> None:
    ran = run("--help")
    assert ran.status == 0
    assert all(re.search(rf"^  {command}\b", ran.out, re.MULTILINE) for command in COMMANDS)
    assert "70 a bug" in ran.out


def test_no_arguments_show_the_help(run: Run) -> None:
    assert run() == run("--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: graphopt {command}")


def test_version(run: Run) -> None:
    ran = run("--version")
    assert re.fullmatch(r"graphopt \d+\.\d+\.\d+\n", ran.out)


def test_help_loads_neither_onnx_nor_numpy() -> None:
    code = (
        "import sys; from graphopt.cli import main; main(['--help']); "
        "sys.exit(' '.join({'onnx', 'onnx_ir', 'numpy', 'onnxruntime', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("graphopt ")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["optimise"],
            "No such command 'optimise'. Did you mean 'optimize'? Try 'graphopt --help'.",
        ),
        (["optimize", "--tarket", "cpu"], "No such option: --tarket. Did you mean --target?"),
        (["inspect"], "Missing argument 'MODEL'. Try 'graphopt inspect --help'."),
        (["optimize", "m.onnx"], "Missing option '--output'"),
        (["inspect", "a.onnx", "b.onnx"], "Got unexpected extra argument"),
        (
            ["optimize", "m.onnx", "-o", "x.onnx", "--seed", "one"],
            "Invalid value for '--seed': Input should be a valid integer",
        ),
        (["golden", "rekord"], "Did you mean 'record'?"),
        (["targets", "gpu"], "unknown target 'gpu'. Did you mean 'cpu'?"),
        (["targets", "--josn"], "Did you mean --json?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_paragraph(
    run: Run, args: list[str], expected: str
) -> None:
    ran = run(*args)
    assert (ran.status, ran.out) == (2, "")
    assert ran.message.startswith("graphopt: error: ")
    assert expected in ran.message
    assert ran.err.count("\n\n") == 0


def test_a_mistake_with_json_is_told_in_json_too(run: Run) -> None:
    ran = run("optimize", "--jsn", "--json")
    assert ran.status == 2
    assert ran.json["error"]["kind"] == "usage"
    assert ran.json["error"]["exit_status"] == 2


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (ModelError("m"), "model", 2),
        (DataError("m"), "data", 2),
        (OptionError("m"), "option", 2),
        (VerifyError("m"), "verify", 1),
        (TargetError("m"), "target", 3),
        (PassError("m", pass_name="p"), "pass", 70),
        (GraphoptError("m"), "graphopt", 70),
        (KeyboardInterrupt(), "interrupted", 130),
        (failure.Terminated(signal.SIGTERM), "interrupted", 143),
        (OSError(errno.ENOSPC, "No space left on device", "x.onnx"), "system", 2),
        (MemoryError(), "system", 70),
        (RuntimeError("m"), "bug", 70),
    ],
)
def test_every_error_has_its_exit_status(
    run: Run,
    fails: Fails,
    error: BaseException,
    kind: str,
    status: int,
) -> None:
    fails(error)
    ran = run("optimize", "--json")
    assert ran.status == status
    assert ran.json["error"] | {"message": ""} == {
        "kind": kind,
        "message": "",
        "exit_status": status,
    }
    assert "Traceback" not in ran.err


def test_ctrl_c_in_a_command_is_told(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_source: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.ir.model_file.load_model", interrupted)
    ran = run("inspect", model)
    assert (ran.status, ran.out, ran.err) == (130, "", "graphopt: error: interrupted\n")


def test_a_pipe_closed_in_a_command_is_quiet(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_parts: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("graphopt.cli.console.show", closed)
    ran = run("inspect", model)
    assert (ran.status, ran.err) == (failure.BROKEN_PIPE, "")


def test_a_bug_says_where_its_traceback_is(run: Run, fails: Fails) -> None:
    fails(ZeroDivisionError("by zero"))
    ran = run("inspect")
    assert "bug of graphopt, please report it: ZeroDivisionError: by zero." in ran.message
    path = Path(re.search(r"The traceback is in (\S+);", ran.message)[1])  # type: ignore[index]
    text = path.read_text()
    assert "ZeroDivisionError" in text
    assert text.startswith("graphopt ")


def test_debug_shows_the_traceback_wherever_it_stands(run: Run, fails: Fails) -> None:
    fails(ModelError("odd"))
    ran = run("inspect", "x.onnx", "--debug")
    assert ran.err.startswith("Traceback")
    assert ran.err.endswith("graphopt: error: odd\n")


def test_a_pass_error_says_where_the_model_was_dumped(run: Run, fails: Fails) -> None:
    fails(PassError("fold broke", pass_name="fold", dump="/somewhere/dump.onnx"))
    assert "without its large weights: /somewhere/dump.onnx" in run("inspect").message


def test_notes_follow_the_message(run: Run, fails: Fails) -> None:
    error = ModelError("odd node")
    error.add_note("  a = Add(b, c)\n      ^ here")
    fails(error)
    assert run("inspect").err == "graphopt: error: odd node\n  a = Add(b, c)\n      ^ here\n"


def test_control_characters_of_a_model_do_not_reach_the_terminal(run: Run, fails: Fails) -> None:
    fails(ModelError("node '\x1b[31mred\x07 \ud800'"))
    assert run("inspect").err == "graphopt: error: node '\\x1b[31mred\\x07 \\ud800'\n"


def test_long_messages_wrap_at_the_terminal(run: Run, fails: Fails) -> None:
    fails(ModelError("word " * 100))
    assert max(map(len, run("inspect").err.splitlines())) <= 100


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m graphopt --help"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, failure.BROKEN_PIPE), done.returncode
    assert done.stderr == ""


def test_a_terminal_without_utf8_gets_question_marks(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "diff", str(model), str(model)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b" ? " in done.stdout


def test_a_pipe_closed_while_writing_is_quiet(run: Run, fails: Fails) -> None:
    fails(BrokenPipeError())
    ran = run("inspect")
    assert (ran.status, ran.err) == (failure.BROKEN_PIPE, "")


def test_sigterm_unwinds_and_is_handed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[bool] = []

    def slow(**_: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)
        return 0

    monkeypatch.setattr(entry, "app", slow)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["inspect"]) == 143
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("graphopt opt", {"optimize"}),
        ("graphopt optimize --tar", {"--target"}),
        ("graphopt optimize m.onnx --target t", {"tensorrt", "tensorrt-10"}),
        ("graphopt golden ", {"record", "check", "update"}),
        ("graphopt passes tid", {"tidy"}),
    ],
)
def test_bash_completes(words: str, expected: set[str]) -> None:
    environment = {
        **os.environ,
        "_GRAPHOPT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "graphopt"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert set(done.stdout.split()) == expected
