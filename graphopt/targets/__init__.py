"""The runtimes that graphopt emits for.  Third parties add theirs through the entry point group `graphopt.targets`."""

from __future__ import annotations

from importlib.metadata import entry_points

from graphopt.errors import OptionError
from graphopt.targets.builtin import CPU, CUDA, PORTABLE, TENSORRT
from graphopt.targets.target import FusedOp, Precision, Target

__all__ = ["FusedOp", "Precision", "Target", "all_targets", "get_target"]


def all_targets() -> dict[str, Target]:
    """Every known target by name: the built-in ones, then those of installed packages."""
    found = {target.name: target for target in (CPU, CUDA, TENSORRT, PORTABLE)}
    for entry in entry_points(group="graphopt.targets"):
        target = entry.load()
        if not isinstance(target, Target):
            raise OptionError(
                f"entry point {entry.name!r} of group graphopt.targets ({entry.value}) is a "
                f"{type(target).__name__}, not a graphopt.targets.Target; fix or uninstall that package"
            )
        found.setdefault(target.name, target)
    return found


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        OptionError: no such target.
    """
    known = all_targets()
    if name not in known:
        raise OptionError(f"unknown target {name!r}; known targets: {', '.join(sorted(known))}")
    return known[name]
