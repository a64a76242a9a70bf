"""Rules: a pattern and a function that only builds; what a rule sees of a match, and how it declines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, Shapes, SymbolicData
from graphopt.numerics import Numerics
from graphopt.rewrite.pattern import Binding, Either, Lit, Op, Var

if TYPE_CHECKING:
    from graphopt.targets import Target

Replacement: TypeAlias = ir.Value | Sequence[ir.Value | None] | None
Action: TypeAlias = Callable[["Match", Builder], Replacement]


class Skip(Exception):
    """A rule declines a match that it recognised.  The reason becomes a remark, never a stack trace.

    An empty reason is for what nobody could ever change: it makes no remark.  A rule that finds the match not to be its
    pattern after all returns None instead, and nothing is said.
    """

    def __init__(self, reason: str, culprit: ir.Node | ir.Value | None = None) -> None:
        super().__init__(reason)
        self.culprit = culprit


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a rule may ask about beyond its match."""

    shapes: Shapes
    target: Target
    opsets: operators.Opsets


@dataclasses.dataclass(
    slots=True, eq=False
)  # not frozen, which takes longer to make: one for each attempt
class Match:
    """What a pattern bound: `m[var]` is a value, `m[op]` a node, `m.array(var)` a constant's data."""

    env: Binding
    facts: Facts

    @overload
    def __getitem__(self, pattern: Op) -> ir.Node: ...
    @overload
    def __getitem__(self, pattern: Var | Lit | Either) -> ir.Value: ...
    def __getitem__(self, pattern: Var | Lit | Op | Either) -> ir.Value | ir.Node:
        bound = self.env[pattern]
        assert bound is not None, "absent optional input; use get()"
        return bound

    def get(self, pattern: Var | Lit | Either) -> ir.Value | None:
        """The bound value; None for an absent optional input or an option not taken."""
        # A cast, not an assertion: asking whether a value is a node takes longer than the rest of many a rule.
        return cast("ir.Value | None", self.env.get(pattern))

    def has(self, pattern: Op) -> bool:
        """Whether `pattern`, an option of an `Either`, took part in the match."""
        return pattern in self.env

    def out(self, pattern: Op) -> ir.Value:
        """The value that `pattern` stands for: the matched output of its node."""
        return self[pattern].outputs[pattern.output]

    def array(self, pattern: Var | Lit | Either, default: float | None = None) -> npt.NDArray[Any]:
        """Data of a constant in its own dtype; `default` as a 0-d float64 array for an absent input."""
        value = self.get(pattern)
        if value is None and default is not None:
            return np.asarray(default, np.float64)
        data = None if value is None else values.array(value)
        if data is None:
            raise Skip("not a constant", value)
        return data

    def wide(
        self, pattern: Var | Lit | Either, default: float | None = None
    ) -> npt.NDArray[np.float64]:
        """As `array`, in float64: constants are folded in double precision."""
        return self.array(pattern, default).astype(np.float64)

    def scalar(self, pattern: Var | Lit | Either) -> float:
        """The number that every element of a constant has.

        Raises:
            Skip: not a constant, or its elements differ.
        """
        number = values.fill(self[pattern])
        if number is None:
            raise Skip("not a scalar constant", self[pattern])
        return number

    def ints(self, pattern: Var | Lit | Either) -> tuple[int, ...]:
        """The elements of an integer constant (axes, shapes, indices)."""
        return tuple(int(i) for i in self.array(pattern).reshape(-1))

    def attr(self, pattern: Op | ir.Node, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """The value of an attribute; the schema's default, else `default`, where it is absent.

        Raises:
            Skip: the attribute refers to an attribute of the enclosing function.
        """
        node = self[pattern] if isinstance(pattern, Op) else pattern
        attribute = node.attributes.data.get(name)
        if attribute is not None and attribute.is_ref():
            raise Skip(f"attribute {name} is a parameter of the enclosing function", node)
        return operators.attribute(node, name, default, self.facts.opsets)

    def opset(self, domain: str = "") -> int:
        """The version of `domain` that the model imports; 0 if it does not."""
        return self.facts.opsets.get(domain, 0)

    def dims(self, pattern: Var | Lit | Op | Either | ir.Value) -> tuple[Dim, ...] | None:
        """Dims of a value, or None where even the rank is unknown."""
        return self.facts.shapes.dims(self._value(pattern))

    def known_dims(self, pattern: Var | Lit | Op | Either | ir.Value) -> tuple[Dim, ...]:
        """As `dims`.

        Raises:
            Skip: the rank is unknown.
        """
        dims = self.dims(pattern)
        if dims is None:
            raise Skip("unknown rank", self._value(pattern))
        return dims

    def data(self, pattern: Var | Lit | Op | Either | ir.Value) -> SymbolicData | None:
        """Elements of a small integer tensor, symbolic where they depend on dims."""
        return self.facts.shapes.data(self._value(pattern))

    def dtype(self, pattern: Var | Lit | Op | Either | ir.Value) -> ir.DataType | None:
        """Element type of a value, or None where it is unknown."""
        return self._value(pattern).dtype

    def emits(
        self, op_type: str, domain: str = "", dtype: ir.DataType | None = None, form: str = ""
    ) -> bool:
        """Whether the target has a kernel for `op_type` that pays, at the model's opset, in that form of use."""
        return self.facts.target.emits(
            op_type, opset=self.opset(), domain=domain, dtype=dtype, form=form
        )

    def _value(self, pattern: Var | Lit | Op | Either | ir.Value) -> ir.Value:
        # Ours are asked for first: `isinstance` of an onnx_ir class is slow where the answer is no.
        if isinstance(pattern, Op):
            return self.out(pattern)
        return self[pattern] if isinstance(pattern, (Var, Lit, Either)) else pattern


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rewrite: where `pattern` matches, `build` makes what replaces the root's outputs.

    Attributes:
        name: kebab-case name, unique in its family.
        pattern: what to look for; its root is the node whose outputs are replaced.
        build: builds the replacement on a tape; returns a value, or one per output of the root.
        numerics: what the rewrite may do to the numbers.
        benefit: rules of higher benefit are tried first.
        opset: smallest and largest ai.onnx opset at which the rule holds.
        doc: first paragraph of the rule's documentation.
    """

    name: str
    pattern: Op
    build: Action
    numerics: Numerics = Numerics.REORDERED
    benefit: int = 1
    opset: tuple[int, int] = (1, 10_000)
    doc: str = ""


def rule(
    pattern: Op,
    *,
    numerics: Numerics = Numerics.REORDERED,
    benefit: int = 1,
    opset: tuple[int, int] = (1, 10_000),
) -> Callable[[Action], Rule]:
    """Makes a `Rule` of the function below it; its name becomes the rule's, with dashes."""

    def decorate(build: Action) -> Rule:
        name: str = getattr(build, "__name__", "rule")
        return Rule(
            name.strip("_").replace("_", "-"),
            pattern,
            build,
            numerics,
            benefit,
            opset,
            (build.__doc__ or "").strip(),
        )

    return decorate


def exact(
    pattern: Op, *, benefit: int = 1, opset: tuple[int, int] = (1, 10_000)
) -> Callable[[Action], Rule]:
    """As `rule`, for rewrites whose outputs are bit-equal."""
    return rule(pattern, numerics=Numerics.EXACT, benefit=benefit, opset=opset)
