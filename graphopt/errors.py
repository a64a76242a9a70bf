"""The exception tree and the exit status of each branch.

A message says what failed, where (node, operator, graph or path), the values seen, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class GraphoptError(Exception):
    """Anything graphopt reports on purpose; `exit_status` is what the command line returns for it."""

    exit_status: ClassVar[int] = 70


class ModelError(GraphoptError):
    """The user's model is at fault: unreadable, invalid, or unsafe to follow."""

    exit_status = 2


class DataError(GraphoptError):
    """The user's inputs or calibration data do not fit the model."""

    exit_status = 2


class OptionError(GraphoptError):
    """An option, recipe or path given by the user cannot be used."""

    exit_status = 2


class TargetError(GraphoptError):
    """The target runtime cannot express what the model needs."""

    exit_status = 3


class VerifyError(GraphoptError):
    """The result does not compute what the original did."""

    exit_status = 1


class PassError(GraphoptError):
    """A pass broke its contract: a bug of ours, or of the package that the pass comes from.

    Attributes:
        pass_name: the pass that failed.
        runs_before: how many executions of passes the run had behind it by then.
        dump: path of the model as it was before the pass, or None where none was written; part of the message.
    """

    def __init__(self, message: str, *, pass_name: str, dump: str | None = None) -> None:
        super().__init__(message)
        self.pass_name = pass_name
        self.runs_before = 0
        self.dump = dump

    def __str__(self) -> str:
        message = super().__str__()
        if self.dump is None:
            return message
        return f"{message}. The model as it was before the pass, without its large weights: {self.dump}"
