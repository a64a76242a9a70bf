"""`module:object` and `path/to/file.py:object`: what a user points at, turned into a pass.

What an object is follows from its type; what a function takes follows from the annotation of its first parameter, or
from `gs:` or `ir:` in front.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.pipeline.adapters import FunctionPass, OnnxIrPass, RulesPass, SurgeonPass
from graphopt.pipeline.options import did_you_mean
from graphopt.pipeline.passes import Pass
from graphopt.rewrite import Rule

_SURGEON, _IR = "gs", "ir"
_KINDS = (
    "a pass or pass class, a rule or a tuple of rules, an onnx_ir pass, or a function of an "
    "onnx_graphsurgeon.Graph or an onnx_ir.Model"
)


def load(text: str, where: str) -> Any:  # noqa: ANN401
    """The pass, pass class or factory behind `[gs:|ir:]module:object`.

    Raises:
        OptionError: it cannot be found, or is nothing that can run as a pass.
    """
    prefix, rest = _split_prefix(text)
    source, _, name = rest.rpartition(":")
    if not source or not name:
        raise OptionError(f"{where}: {text!r} is not module:object or path/to/file.py:object")
    module = _module(source, where)
    held = _attribute(module, name, f"{where}: {source}")
    origin = f"{source}:{name}"
    return _as_pass(held, prefix, origin, where)


def load_object(text: str, where: str) -> Any:  # noqa: ANN401
    """Whatever `module:object` or `path/to/file.py:object` names.

    Raises:
        OptionError: it cannot be found.
    """
    source, _, name = text.rpartition(":")
    if not source or not name:
        raise OptionError(f"{where}: {text!r} is not module:object or path/to/file.py:object")
    return _attribute(_module(source, where), name, f"{where}: {source}")


def _split_prefix(text: str) -> tuple[str, str]:
    prefix, _, rest = text.partition(":")
    return (prefix, rest) if prefix in (_SURGEON, _IR) and ":" in rest else ("", text)


def _module(source: str, where: str) -> ModuleType:
    is_file = source.endswith(".py") or os.sep in source
    try:
        return _from_file(Path(source), where) if is_file else importlib.import_module(source)
    except OptionError:
        raise
    except ModuleNotFoundError as error:
        raise OptionError(
            f"{where}: cannot import {source!r}: {error}; is it installed? For a file write path/to/file.py:object"
        ) from error
    except Exception as error:  # a user's module may do anything when it is imported
        raise OptionError(
            f"{where}: importing {source!r} raised {type(error).__name__}: {error}"
        ) from error


def _from_file(path: Path, where: str) -> ModuleType:
    """The module in a file, known to Python under a name of its own: classes look their module up there."""
    full = path.resolve()
    name = f"graphopt_user_{hashlib.sha256(os.fsencode(full)).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, full) if full.is_file() else None
    if spec is None or spec.loader is None:
        raise OptionError(
            f"{where}: {str(path)!r} is not a Python file; give the path of a .py file"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, where: str) -> Any:  # noqa: ANN401
    held: Any = module
    for part in name.split("."):
        if not hasattr(held, part):
            known = (
                [each for each in vars(held) if not each.startswith("_")]
                if hasattr(held, "__dict__")
                else []
            )
            raise OptionError(
                f"{where} has no {part!r}{did_you_mean(part, known)}; it has: {', '.join(known)}"
            )
        held = getattr(held, part)
    return held


def _as_pass(held: Any, prefix: str, origin: str, where: str) -> Any:  # noqa: ANN401
    name = _pass_name(origin)
    rules = (held,) if isinstance(held, Rule) else held
    if isinstance(held, Rule | tuple | list):
        if not rules or not all(isinstance(each, Rule) for each in rules):
            raise OptionError(
                f"{where}: {origin} holds something else than rules; expected {_KINDS}"
            )
        return RulesPass(name, tuple(rules), origin)
    if isinstance(held, ir.passes.PassBase):
        return OnnxIrPass(name, held, f"{_IR}:{origin}")
    if isinstance(held, type):
        return _from_class(held, name, origin, where)
    if isinstance(held, Pass):
        return held
    if callable(held):
        return _from_function(held, prefix, name, origin, where)
    raise OptionError(f"{where}: {origin} is a {type(held).__name__}; expected {_KINDS}")


def _from_class(held: type, name: str, origin: str, where: str) -> Any:  # noqa: ANN401
    if issubclass(held, ir.passes.PassBase):
        try:
            return OnnxIrPass(name, held(), f"{_IR}:{origin}")
        except TypeError as error:
            raise OptionError(
                f"{where}: the onnx_ir pass {origin} cannot be made without arguments ({error}); make one in a "
                "module and name that"
            ) from error
    if not hasattr(held, "run"):
        raise OptionError(f"{where}: class {origin} has no run(model, ctx); expected {_KINDS}")
    return held


def _from_function(held: Any, prefix: str, name: str, origin: str, where: str) -> Any:  # noqa: ANN401
    match prefix or _taken(held):
        case "gs":
            return SurgeonPass(name, held, f"{_SURGEON}:{origin}")
        case "ir":
            return FunctionPass(name, held, f"{_IR}:{origin}")
        case "factory":
            return held
    raise OptionError(
        f"{where}: {origin} does not say what it takes. Annotate its parameter as onnx_graphsurgeon.Graph or "
        f"onnx_ir.Model, or write {_SURGEON}:{origin} or {_IR}:{origin}"
    )


def _taken(function: Any) -> str:  # noqa: ANN401
    """What a function takes, by its annotations: "gs", "ir", "factory" for one that returns a pass, or ""."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # something built in
        return ""
    if _last(signature.return_annotation) in ("Pass", "RewritePass"):
        return "factory"
    first = next(iter(signature.parameters.values()), None)
    annotation = None if first is None else first.annotation
    module, last = _owner(annotation), _last(annotation)
    if last == "Graph" and module in ("gs", "onnx_graphsurgeon"):
        return _SURGEON
    return _IR if last == "Model" and module in ("ir", "onnx_ir", "Model") else ""


def _last(annotation: Any) -> str:  # noqa: ANN401
    return _dotted(annotation).rpartition(".")[2]


def _owner(annotation: Any) -> str:  # noqa: ANN401
    return _dotted(annotation).partition(".")[0]


def _dotted(annotation: Any) -> str:  # noqa: ANN401
    """The annotation as written, or where its class lives: annotations may be strings, never evaluated here."""
    if isinstance(annotation, type):
        return f"{annotation.__module__}.{annotation.__qualname__}"
    return str(annotation).strip("'\" ")


def _pass_name(origin: str) -> str:
    """`fuse-things` for `pkg.fuse_things:RULES` and for `pkg.x:fuse_things`."""
    source, _, name = origin.rpartition(":")
    word = name.rpartition(".")[2]
    if word in ("RULES", "PASS"):
        word = Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    spaced = "".join(
        f"-{c}" if c.isupper() and i and word[i - 1].islower() else c for i, c in enumerate(word)
    )
    return spaced.strip("_").replace("_", "-").lower()
