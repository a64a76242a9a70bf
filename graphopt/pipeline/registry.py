"""Where passes come from: entry points of installed packages, a user's modules and files.

An entry point of group `graphopt.passes` names a module with `PASSES`, name -> pass class, pass or factory of passes,
and perhaps `PIPELINES`, (target, precision) -> steps.  graphopt's own passes come the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graphopt.deferred import Late
from graphopt.errors import GraphoptError, OptionError
from graphopt.numerics import Numerics
from graphopt.pipeline.loading import load
from graphopt.pipeline.options import OptionInfo, did_you_mean, options_of, select
from graphopt.pipeline.passes import Pass, Repeat
from graphopt.pipeline.runner import Step
from graphopt.pipeline.spec import PassSpec, parse_specs
from graphopt.targets import Precision, Target

GROUP = "graphopt.passes"
_OURS = "graphopt"
_FALLBACK = "portable"
_GROUP = Repeat(())
_REPEAT = (
    OptionInfo("passes", tuple[str, ...], ()),
    OptionInfo("limit", int, _GROUP.limit),
    OptionInfo("name", str, _GROUP.name),
)


@dataclasses.dataclass(frozen=True)
class PassInfo:
    """A pass that recipes can name.

    Attributes:
        name: its name.
        maker: what makes it: a class, a pass, or a factory.
        numerics: what it may do to the numbers, with default options.
        doc: its documentation.
        options: what can be set.
        source: the package that it comes from.
    """

    name: str
    maker: Any
    numerics: Numerics
    doc: str
    options: tuple[OptionInfo, ...]
    source: str


@dataclasses.dataclass(frozen=True)
class _Package:
    """A package of passes: its module, and the distribution to name when it is at fault."""

    module: Any
    source: str


def all_passes() -> dict[str, PassInfo]:
    """Every pass of every installed package, by name; graphopt's own first.

    Raises:
        OptionError: a package is broken; the message names its distribution.
    """
    found: dict[str, PassInfo] = {}
    for package in _packages():
        for info in _infos(package):
            if info.name in found:
                raise OptionError(
                    f"pass {info.name!r} is in {found[info.name].source} and in {info.source}; rename one, or "
                    "uninstall one of the packages"
                )
            found[info.name] = info
    return found


def find_pass(name: str, where: str = "") -> PassInfo:
    """The pass called `name`.

    Raises:
        OptionError: no such pass.
    """
    known = all_passes()
    if name not in known:
        prefix = f"{where}: " if where else ""
        raise OptionError(
            f"{prefix}unknown pass {name!r}{did_you_mean(name, known)}; known passes: {', '.join(sorted(known))}; "
            "for one of your own write module:object or path/to/file.py:object"
        )
    return known[name]


def pipeline_for(target: Target, precision: Precision) -> tuple[Step, ...]:
    """The pipeline for a target and precision; of a target that no package has one for, the portable one.

    Raises:
        OptionError: there is none; the message lists those of the target.
    """
    tables = [(_pipelines(package), package.source) for package in _packages()]
    for name in (target.name, target.like, _FALLBACK):
        for table, source in tables:
            steps = table.get((name, precision.value))
            if steps is not None:
                return _checked_steps(steps, f"{source}, pipeline ({name}, {precision})")
    known = sorted(
        {
            str(p)
            for table, _ in tables
            for t, p in table
            if t in (target.name, target.like, _FALLBACK)
        }
    )
    raise OptionError(
        f"no pipeline for target {target.name!r} at precision {precision}; there is one for: "
        f"{', '.join(known) or 'none'}"
    )


def load_pass(text: str) -> Step:
    """The pass that `text` names: `name`, `module:object` or `path/to/file.py:object`, perhaps with `{option=value}`.

    An object may be a pass or pass class, a rule or a tuple of rules, an onnx_ir pass, or a function that takes an
    onnx_graphsurgeon graph or an onnx_ir model; `gs:` and `ir:` in front say which, where annotations do not.

    Raises:
        OptionError: it cannot be found, or is none of these.
    """
    specs = parse_specs(text, "--pass")
    if len(specs) != 1:
        raise OptionError(f"--pass: {text!r} names {len(specs)} passes; give one at a time")
    return make_step(specs[0])


def make_step(spec: PassSpec) -> Step:
    """The pass, or group of passes, that a spec names, with its options.

    Raises:
        OptionError: unknown pass, unknown option, or a value that does not fit.
    """
    if spec.name == _GROUP.name:
        return _repeat(spec)
    if ":" in spec.name:
        return configure(load(spec.name, spec.where), spec)
    return configure(find_pass(spec.name, spec.where).maker, spec)


def configure(maker: Any, spec: PassSpec) -> Pass:  # noqa: ANN401
    """The pass that `maker` (class, pass or factory) makes with the options of `spec`.

    Raises:
        OptionError: unknown option, or a value that does not fit.
    """
    where = f"{spec.where}, pass {spec.name}"
    options = select(options_of(maker), spec.options, where, text=spec.text)
    try:
        return _make(maker, options)
    except GraphoptError as error:
        raise OptionError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"{where}: its options do not fit together or are out of range: {error}"
        ) from error


def _make(maker: Any, options: Mapping[str, Any]) -> Pass:  # noqa: ANN401
    if isinstance(maker, type) or inspect.isroutine(maker):
        made = maker(**options)
    else:
        made = dataclasses.replace(maker, **options) if options else maker
    if not isinstance(made, Pass):
        raise TypeError(
            f"a {type(made).__name__} is no pass: it lacks name, numerics or run(model, ctx)"
        )
    return made


def _repeat(spec: PassSpec) -> Repeat:
    where = f"{spec.where}, {spec.name}"
    options = select(_REPEAT, spec.options, where, text=spec.text)
    inner = [
        make_step(each) for text in options.get("passes", ()) for each in parse_specs(text, where)
    ]
    passes = tuple(step for step in inner if not isinstance(step, Repeat))
    if not passes or len(passes) < len(inner):
        raise OptionError(f"{where}: give it passes=[name, …]; a group cannot hold another group")
    return dataclasses.replace(_GROUP, **{**options, "passes": passes})


def _packages() -> Iterator[_Package]:
    """The packages of passes: graphopt's own, then others by name, so that a run does not depend on the search path."""
    entries = sorted(
        entry_points(group=GROUP),
        key=lambda e: (_source(e).split()[0] != _OURS, _source(e), e.name),
    )
    for entry in entries:
        try:
            yield _Package(entry.load(), _source(entry))
        except Exception as error:  # anything may be wrong with somebody's package
            raise OptionError(
                f"entry point {entry.name!r} ({entry.value}) of {_source(entry)} cannot be loaded: "
                f"{type(error).__name__}: {error}; update or uninstall that package"
            ) from error


def _source(entry: EntryPoint) -> str:
    return (
        "an unknown distribution"
        if entry.dist is None
        else f"{entry.dist.name} {entry.dist.version}"
    )


def _infos(package: _Package) -> Iterator[PassInfo]:
    held = getattr(package.module, "PASSES", None)
    if not isinstance(held, Mapping):
        raise OptionError(
            f"{package.source}: {_module_name(package)} has no mapping PASSES (name -> pass class); update or "
            "uninstall that package"
        )
    for name, maker in held.items():
        where = PassSpec(str(name), where=package.source)
        made = configure(maker, where)
        if made.name != name:
            raise OptionError(
                f"{package.source}: pass {made.name!r} is listed in PASSES as {name!r}; use one name"
            )
        doc = inspect.getdoc(maker) or ""
        yield PassInfo(made.name, maker, made.numerics, doc, options_of(maker), package.source)


def _pipelines(package: _Package) -> Mapping[tuple[str, str], Any]:
    held = getattr(package.module, "PIPELINES", {})
    if not isinstance(held, Mapping) or not all(isinstance(k, tuple) and len(k) == 2 for k in held):
        raise OptionError(
            f"{package.source}: PIPELINES of {_module_name(package)} must map (target, precision) to a tuple of "
            "passes; update or uninstall that package"
        )
    makers = {(str(k[0]), str(k[1])): functools.partial(held.__getitem__, k) for k in held}
    return Late(makers)  # of which a run asks for one


def _checked_steps(steps: Any, where: str) -> tuple[Step, ...]:  # noqa: ANN401
    if not isinstance(steps, tuple | list) or not all(isinstance(s, Pass | Repeat) for s in steps):
        raise OptionError(f"{where}: expected a tuple of passes; update or uninstall that package")
    return tuple(steps)


def _module_name(package: _Package) -> str:
    return getattr(package.module, "__name__", repr(package.module))
