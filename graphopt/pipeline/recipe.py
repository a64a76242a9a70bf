"""Recipes: what a run shall do, as TOML or as spec strings.

target = "cpu"                     # and precision, verify, seed, fold_limit_bytes, disable = ["pass/rule"]
sparsity = "0.8,layer=^fc1:0.5"    # and budget = "top1-agreement>=0.98": as the options of these names
pipeline = "default"               # or a list of specs, or [[pass]] tables
prepend = ["my_module:my_pass"]
append = ["drop-dead-code", "gs:scripts/strip.py:strip{numerics=exact}"]

[specialize]                       # one use of the model: graphopt.specialize says what it may hold
dims = {batch = 1}

[profiles]                         # of a bundle: least, usual and largest size
seq = [1, 128, 512]

[options.fold-constants]           # for passes of the pipeline, wherever they are in it
limit_bytes = 1_000_000

[[pass]]                           # instead of `pipeline`: passes with their options, in order
name = "fold-constants"
limit_bytes = 1_000_000
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from graphopt.errors import OptionError
from graphopt.pipeline.options import OptionInfo, convert, did_you_mean, options_of, plain
from graphopt.pipeline.passes import Pass, Repeat
from graphopt.pipeline.registry import all_passes, configure, make_step
from graphopt.pipeline.runner import Step, flatten
from graphopt.pipeline.spec import PassSpec, format_spec, parse_specs
from graphopt.targets import Precision, all_targets

Verify: TypeAlias = Literal["final", "each", "off"]
Table: TypeAlias = dict[str, Any]

_DEFAULT = "default"
_KEYS = (
    OptionInfo("target", str, "cpu"),
    OptionInfo("precision", Precision, Precision.FP32),
    OptionInfo("verify", Verify, "final"),
    OptionInfo("seed", int, 0),
    OptionInfo("fold_limit_bytes", int, 1 << 20),
    OptionInfo("sparsity", str, ""),
    OptionInfo("budget", str, ""),
    OptionInfo("disable", tuple[str, ...], ()),
    OptionInfo("pipeline", Literal["default"] | list[str], _DEFAULT),
    OptionInfo("prepend", tuple[str, ...], ()),
    OptionInfo("append", tuple[str, ...], ()),
    OptionInfo("pass", list[Table], ()),
    OptionInfo("options", dict[str, Table], {}),
    OptionInfo("specialize", Table, {}),
    OptionInfo("profiles", dict[str, tuple[int, int, int]], {}),
    OptionInfo("extras", tuple[str, ...], ()),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run shall do; None where the recipe leaves it to the caller.

    Attributes:
        target: what to emit for.
        precision: what the arithmetic shall be.
        verify: when to verify.
        seed: for whatever draws random numbers.
        fold_limit_bytes: how much larger than what it makes dead a folded constant may be.
        sparsity: what to prune, in the words of the option.
        budget: what error a lossy run may make, in the words of the option.
        disable: passes, or `pass/rule`, that may not run.
        pipeline: the passes instead of the target's own.
        prepend: passes before the pipeline.
        append: passes after it.
        options: pass -> option -> value, for passes of the pipeline.
        specialize: what to make of the model first, as the table says it.
        profiles: of a bundle: least, usual and largest size of dynamic dimensions.
        extras: of a bundle: triton, ort.
        folder: where the recipe lies, for files that it names; None where it is no file.
        source: where the recipe comes from, for messages.
    """

    target: str | None = None
    precision: Precision | None = None
    verify: Verify | None = None
    seed: int | None = None
    fold_limit_bytes: int | None = None
    sparsity: str | None = None
    budget: str | None = None
    disable: tuple[str, ...] = ()
    pipeline: tuple[Step, ...] | None = None
    prepend: tuple[Step, ...] = ()
    append: tuple[Step, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    specialize: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    profiles: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    extras: tuple[str, ...] = ()
    folder: Path | None = None
    source: str = "recipe"

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in a TOML file.

        Raises:
            OptionError: the file cannot be read, or says what no recipe can say.
        """
        try:
            with Path(path).open("rb") as file:
                held = cls.from_table(tomllib.load(file), f"recipe {path}")
                return dataclasses.replace(held, folder=Path(path).parent)
        except OSError as error:
            raise OptionError(f"recipe {path} cannot be read: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise OptionError(f"recipe {path} is not TOML: {error}") from error

    @classmethod
    def from_table(cls, table: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """The recipe that a TOML table describes.

        Raises:
            OptionError: an unknown key, pass or option, or a value of the wrong type.
        """
        said = _checked(table, source)
        target = said.get("target")
        if target is not None and target not in all_targets():
            known = all_targets()
            raise OptionError(
                f"{source}: unknown target {target!r}{did_you_mean(target, known)}; known targets: {', '.join(known)}"
            )
        return cls(
            target=target,
            precision=said.get("precision"),
            verify=said.get("verify"),
            seed=said.get("seed"),
            fold_limit_bytes=said.get("fold_limit_bytes"),
            sparsity=said.get("sparsity"),
            budget=said.get("budget"),
            disable=said.get("disable", ()),
            pipeline=_pipeline(said, source),
            prepend=_steps(said.get("prepend", ()), f"{source}, prepend"),
            append=_steps(said.get("append", ()), f"{source}, append"),
            options=said.get("options", {}),
            specialize=said.get("specialize", {}),
            profiles=said.get("profiles", {}),
            extras=said.get("extras", ()),
            source=source,
        )

    def apply(self, pipeline: Sequence[Step]) -> tuple[Step, ...]:
        """The steps to run: `pipeline`, or the recipe's own, with what it puts before, after and into it.

        Raises:
            OptionError: options for a pass that is not there, or that do not fit it.
        """
        chosen = pipeline if self.pipeline is None else self.pipeline
        steps = (*self.prepend, *chosen, *self.append)
        names = {each.name for each in flatten(steps)}
        for name in self.options:
            if name not in names:
                raise OptionError(
                    f"{self.source}, [options.{name}]: no pass {name!r} in the pipeline{did_you_mean(name, names)}; "
                    f"it has: {', '.join(sorted(names))}"
                )
        return tuple(_patch(step, self._patched) for step in steps)

    def _patched(self, each: Pass) -> Pass:
        given = self.options.get(each.name)
        if given is None:
            return each
        where = f"{self.source}, [options.{each.name}]"
        return configure(each, PassSpec(each.name, given, where, text=False))


def _patch(step: Step, patch: Callable[[Pass], Pass]) -> Step:
    if isinstance(step, Repeat):
        return dataclasses.replace(step, passes=tuple(patch(each) for each in step.passes))
    return patch(step)


def _checked(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The table with its values in their types."""
    known = {option.name: option for option in _KEYS}
    for key in table:
        if key not in known:
            raise OptionError(
                f"{source}: unknown key {key!r}{did_you_mean(key, known)}; known keys: {', '.join(known)}"
            )
    return {key: convert(known[key], value, source, text=False) for key, value in table.items()}


def _pipeline(said: Mapping[str, Any], source: str) -> tuple[Step, ...] | None:
    named, tables = said.get("pipeline", _DEFAULT), said.get("pass")
    if tables is not None:
        if named != _DEFAULT:
            raise OptionError(
                f"{source}: both `pipeline` and [[pass]] say what to run; leave one out"
            )
        return tuple(make_step(_spec(table, source)) for table in tables)
    return None if named == _DEFAULT else _steps(named, f"{source}, pipeline")


def _spec(table: Table, source: str) -> PassSpec:
    where = f"{source}, [[pass]]"
    options = dict(table)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise OptionError(
            f"{where}: every [[pass]] needs a name, a text; this one has {sorted(table)}"
        )
    return PassSpec(name, options, where, text=False)


def _steps(texts: Sequence[str], where: str) -> tuple[Step, ...]:
    return tuple(step for text in texts for step in parse_pipeline(text, where))


def parse_pipeline(text: str, where: str = "pipeline") -> tuple[Step, ...]:
    """The steps that a spec string names: `fold-constants{limit=3}, repeat{passes=[a, b]}`.

    Raises:
        OptionError: it cannot be read, or names unknown passes or options.
    """
    return tuple(make_step(spec) for spec in parse_specs(text, where))


def to_spec(step: Step) -> str:
    """The spec string that makes `step` again; options at their defaults are left out.

    Raises:
        OptionError: the pass was made in Python and no recipe can name it.
    """
    if isinstance(step, Repeat):
        group = Repeat(())
        said = {"name": step.name, "limit": step.limit}
        changed = {key: value for key, value in said.items() if value != getattr(group, key)}
        return format_spec(group.name, {"passes": [*map(to_spec, step.passes)], **changed})
    name, maker = _named(step)
    defaults = {option.name: option.default for option in options_of(maker)}
    values = {option.name: option.default for option in options_of(step)}
    changed = {key: plain(value) for key, value in values.items() if value != defaults.get(key)}
    return format_spec(name, changed)


def _named(step: Pass) -> tuple[str, Any]:
    """What a recipe calls a pass, and what makes it with default options."""
    origin = getattr(step, "origin", None)
    if isinstance(origin, str):
        return origin, type(step)
    info = all_passes().get(step.name)
    if info is not None and (info.maker == step or info.maker is type(step)):
        return info.name, info.maker
    if info is not None and type(configure(info.maker, PassSpec(info.name))) is type(step):
        return info.name, configure(info.maker, PassSpec(info.name))
    if all(map(_has_default, _fields(step))):
        return f"{type(step).__module__}:{type(step).__qualname__}", type(step)
    raise OptionError(
        f"pass {step.name!r} was made in Python, of parts that a recipe cannot name; list it in an entry point of "
        "group graphopt.passes, or load it as module:object"
    )


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _fields(step: Any) -> tuple[dataclasses.Field[Any], ...]:  # noqa: ANN401
    return dataclasses.fields(step) if dataclasses.is_dataclass(step) else ()
