"""`graphopt completion`: the script that teaches a shell to complete; and what there is to complete."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

SHELLS = ("bash", "zsh", "fish", "powershell")


def command(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help=f"One of {', '.join(SHELLS)}.")],
) -> None:
    """Print the completion script of a shell.

    bash: add `eval "$(graphopt completion bash)"` to ~/.bashrc.  zsh: the same in ~/.zshrc.
    fish: graphopt completion fish > ~/.config/fish/completions/graphopt.fish
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    from graphopt.cli.choice import one_of

    one_of("shell", shell, SHELLS)
    script = get_completion_script(
        prog_name="graphopt", complete_var="_GRAPHOPT_COMPLETE", shell=shell
    )
    sys.stdout.write(script + "\n")


def target_names(incomplete: str) -> list[str]:
    """Names of targets that begin with what was typed."""
    from graphopt.targets import all_targets

    return [name for name in all_targets() if name.startswith(incomplete)]


def pass_names(incomplete: str) -> list[str]:
    """Names of passes that begin with what was typed."""
    from graphopt.pipeline.registry import all_passes

    return [name for name in all_passes() if name.startswith(incomplete)]
