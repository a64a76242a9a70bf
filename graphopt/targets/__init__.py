"""The runtimes that graphopt emits for.  Third parties add theirs through the entry point group `graphopt.targets`."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from graphopt.errors import OptionError
from graphopt.targets.builtin import CUDA, PORTABLE, TENSORRT
from graphopt.targets.host import host_architecture
from graphopt.targets.target import (
    Artefact,
    Channels,
    FusedOp,
    Precision,
    PrecisionStyle,
    QdqStyle,
    SparseStyle,
    Target,
)
from graphopt.targets.variants import VARIANTS, cpu_for

__all__ = [
    "Artefact",
    "Channels",
    "FusedOp",
    "Precision",
    "PrecisionStyle",
    "QdqStyle",
    "SparseStyle",
    "Target",
    "all_targets",
    "get_target",
]


def all_targets() -> dict[str, Target]:
    """Every known target by name: the built-in ones, then those of installed packages.

    `cpu` is this machine's processor; the others of its kind are called `cpu-avx2`, `cpu-vnni`, `cpu-amx`, `cpu-arm64`.
    """
    found = _builtin()
    for entry in entry_points(group="graphopt.targets"):
        target = entry.load()
        if not isinstance(target, Target):
            raise OptionError(
                f"entry point {entry.name!r} of group graphopt.targets ({entry.value}) is a "
                f"{type(target).__name__}, not a graphopt.targets.Target; fix or uninstall that package"
            )
        found.setdefault(target.name, target)
    return found


def _builtin() -> dict[str, Target]:
    cpu = cpu_for(host_architecture())
    return {target.name: target for target in (cpu, CUDA, TENSORRT, PORTABLE, *VARIANTS)}


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        OptionError: no such target.
    """
    ours = _builtin()
    if name in ours:  # a package may ask for one of them while its own are being loaded
        return ours[name]
    known = all_targets()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise OptionError(
            f"unknown target {name!r}{hint}; known targets: {', '.join(sorted(known))}"
        )
    return known[name]
