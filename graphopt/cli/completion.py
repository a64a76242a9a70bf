"""Names that a shell can complete; what knows them is imported when somebody asks."""

from __future__ import annotations


def target_names(incomplete: str) -> list[str]:
    """Names of targets that begin with what was typed."""
    from graphopt.targets import all_targets

    return [name for name in all_targets() if name.startswith(incomplete)]


def pass_names(incomplete: str) -> list[str]:
    """Names of passes that begin with what was typed."""
    from graphopt.pipeline.registry import all_passes

    return [name for name in all_passes() if name.startswith(incomplete)]
