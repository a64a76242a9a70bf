"""What the installed ONNX Runtime says of itself: kernels and operator schemas."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt.runtime import onnxruntime_api
from graphopt.targets.kernels import Kernel, KernelTable, Key, merged

_OPEN = (1 << 31) - 1
CPU = "CPUExecutionProvider"


@functools.cache
def installed_kernels(provider: str = CPU) -> KernelTable | None:
    """The kernels that the installed wheel registers for `provider`; None where it has none or does not tell."""
    state = _state()
    listing = getattr(state, "get_all_opkernel_def", None)
    if listing is None:
        return None
    found: dict[Key, list[Any]] = defaultdict(list)
    for each in listing():
        if each.provider == provider:
            found[each.domain, each.op_name].append(each)
    if not found:
        return None
    version = onnxruntime_api.version()
    source = f"get_all_opkernel_def() of the installed ONNX Runtime {version}"
    return KernelTable(provider, version, source, _Merged(found))


class _Merged(Mapping[Key, tuple[Kernel, ...]]):
    """Registrations by operator, read and joined when somebody asks for them: a run asks for a few of a thousand."""

    def __init__(self, listed: Mapping[Key, Sequence[Any]]) -> None:
        self._listed = listed
        self._known: dict[Key, tuple[Kernel, ...]] = {}

    def __getitem__(self, key: Key) -> tuple[Kernel, ...]:
        if key not in self._known:
            self._known[key] = merged(map(_kernel, self._listed[key]))
        return self._known[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)


def _kernel(listed: Any) -> Kernel:  # noqa: ANN401  an object of the extension
    since, until = listed.version_range
    types = {
        name: frozenset(element_type(text) for text in allowed)
        for name, allowed in listed.type_constraints.items()
    }
    return Kernel(since, None if until >= _OPEN else until, types)


@functools.cache
def operator_schemas() -> dict[tuple[str, str], tuple[Any, ...]]:
    """The operator schemas that ONNX Runtime knows beside those of onnx, by (domain, operator), oldest first."""
    listing = getattr(_state(), "get_all_operator_schema", None)
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for each in listing() if listing is not None else ():
        found[each.domain, each.name].append(each)
    return {key: tuple(sorted(v, key=lambda s: s.since_version)) for key, v in found.items()}


@functools.cache
def has_locale(name: str) -> bool:
    """Whether this machine has a locale; asked in another process, because setting one is for a whole process."""
    program = "import locale, sys; locale.setlocale(locale.LC_ALL, sys.argv[1])"
    line = [sys.executable, "-I", "-c", program, name]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0  # noqa: S603  our own words


def element_type(text: str) -> str:
    """`tensor(float)` as the tables write it: `float`; other kinds stay as they are."""
    match = re.fullmatch(r"tensor\((\w+)\)", text)
    return match[1] if match else text


def _state() -> Any:  # noqa: ANN401  a module of the extension
    from onnxruntime.capi import onnxruntime_pybind11_state  # noqa: PLC0415

    return onnxruntime_pybind11_state
