"""Leaves modules that a dependency imports, but that most runs never use, until somebody uses them.

`onnx_ir` imports sympy for the arithmetic of symbolic dims (ours is in `graphopt.ir.shapes`), `onnx` imports protobuf's
JSON and text formats.  Together they are more than half of what importing both costs: 0.4 of 0.75 CPU seconds, which
is what a small model's whole run takes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

SELDOM_USED = (
    "sympy",
    "onnx_ir._symbolic_shapes",  # reads sympy's functions where it is imported
    "google.protobuf.json_format",
    "google.protobuf.text_format",
)


class Deferring:
    """A finder of modules that are executed at the first use of one of their names, not at their import.

    It leaves `sys.meta_path` once each of its modules was asked for.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name for name in names if name not in sys.modules}

    def install(self) -> None:
        """Goes before the other finders, if there is anything left to defer."""
        if self._names:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module to defer, or None, which leaves the module to the next finder."""
        if name not in self._names:
            return None
        self._names.discard(name)
        if not self._names:
            sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


class Late(Mapping[K, V]):
    """A mapping whose values are made when somebody asks for them, anew each time."""

    def __init__(self, makers: Mapping[K, Callable[[], V]]) -> None:
        self._makers = makers

    def __getitem__(self, key: K) -> V:
        return self._makers[key]()

    def __iter__(self) -> Iterator[K]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
