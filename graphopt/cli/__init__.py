"""The command line: one file a command, and the only place that prints."""

from graphopt.cli.entry import main

__all__ = ["main"]
