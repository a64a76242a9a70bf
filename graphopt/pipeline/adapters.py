"""Passes of other kinds as ours: graphsurgeon functions, onnx_ir passes, plain functions over a model.

They change the model outside the engine, in one step that nobody can look into.  So each counts as one rewrite of the
whole model, which the gate may leave out, and the context takes stock of the model anew afterwards.

What such a pass may do to the numbers only its author knows.  It counts as REORDERED unless it is declared otherwise
(`module:function{numerics=exact}`): an approximation that nobody declared fails verification and is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir

from graphopt.errors import ModelError, PassError
from graphopt.ir.model_file import skeleton_bytes
from graphopt.ir.scopes import all_graphs, all_nodes
from graphopt.numerics import Numerics
from graphopt.pipeline.passes import RewritePass
from graphopt.rewrite import Context, Rule

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

SurgeonFunction: TypeAlias = "Callable[[gs.Graph], gs.Graph | None]"
ModelFunction: TypeAlias = Callable[[ir.Model], "ir.Model | bool | None"]

SITE = "model"


@dataclasses.dataclass(frozen=True)
class SurgeonPass:
    """Runs a function over the model as an onnx_graphsurgeon graph.

    The function changes the graph in place, or returns another one.

    Attributes:
        name: the pass's name.
        function: the function.
        origin: `gs:module:function`, by which a recipe finds it again.
        numerics: what the function may do to the numbers.
    """

    name: str
    function: SurgeonFunction
    origin: str
    numerics: Numerics = Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            PassError: graphsurgeon cannot hold the model, or the function left a graph that is no model.
        """
        if not ctx.permit(self.name, SITE, self.numerics):
            return False
        before = Snapshot.of(model)
        try:
            new = self._run(model)
        except ModelError as error:  # the model was sound: a run can go on without the pass
            raise PassError(f"pass {self.name}: {error}", pass_name=self.name) from error
        if Snapshot.of(new) == before:
            return False
        replace_contents(model, new)
        ctx.refresh()
        return True

    def _run(self, model: ir.Model) -> ir.Model:
        # graphsurgeon is imported by whoever uses it, not by every run.
        from graphopt.ir.surgeon import from_surgeon, to_surgeon  # noqa: PLC0415

        graph = to_surgeon(model)
        result = self.function(graph)
        if result is not None and not isinstance(result, type(graph)):
            raise _wrong_result(self.name, result, "an onnx_graphsurgeon.Graph or None")
        return from_surgeon(graph if result is None else result, like=model)


@dataclasses.dataclass(frozen=True)
class OnnxIrPass:
    """Runs a pass of onnx_ir, in place or functional.

    Attributes:
        name: the pass's name.
        wrapped: the pass.
        origin: `ir:module:object`, by which a recipe finds it again.
        numerics: what it may do to the numbers.
    """

    name: str
    wrapped: ir.passes.PassBase
    origin: str
    numerics: Numerics = Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        return _run(self.name, lambda m: self.wrapped(m).model, self.numerics, model, ctx)


@dataclasses.dataclass(frozen=True)
class FunctionPass:
    """Runs a function that changes an `onnx_ir.Model` in place, or returns another one.

    Attributes:
        name: the pass's name.
        function: the function; it may return None, a model, or whether it changed anything.
        origin: `ir:module:function`, by which a recipe finds it again.
        numerics: what the function may do to the numbers.
    """

    name: str
    function: ModelFunction
    origin: str
    numerics: Numerics = Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        return _run(self.name, self.function, self.numerics, model, ctx)


@dataclasses.dataclass(frozen=True)
class RulesPass:
    """Applies rules of a user's module until none fires.

    Attributes:
        name: the pass's name.
        rules: the rules; each declares its own numerics.
        origin: `module:object`, by which a recipe finds them again.
    """

    name: str
    rules: tuple[Rule, ...]
    origin: str

    @property
    def numerics(self) -> Numerics:
        """The loosest class among the rules."""
        return RewritePass(self.name, self.rules).numerics

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        return RewritePass(self.name, self.rules).run(model, ctx)


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """What a model says, to tell whether a foreign pass changed it: few of them say so, and not all of those truly.

    Attributes:
        skeleton: the model without the data of large tensors.
        tensors: the tensors themselves; held, so that no other can take the identity of one.
    """

    skeleton: bytes
    tensors: tuple[ir.TensorProtocol, ...]

    @classmethod
    def of(cls, model: ir.Model) -> Snapshot:
        """Takes stock of `model`; reads no weight."""
        return cls(skeleton_bytes(model), tuple(_tensors(model)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Snapshot)
            and self.skeleton == other.skeleton
            and [*map(id, self.tensors)] == [*map(id, other.tensors)]
        )

    __hash__ = None  # type: ignore[assignment]  # compared once, never looked up


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for scope in all_graphs(model):
        held = scope.graph.initializers
        yield from (t for name in sorted(held) if (t := held[name].const_value) is not None)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in all_nodes(graph):
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()


def _run(
    name: str, function: ModelFunction, numerics: Numerics, model: ir.Model, ctx: Context
) -> bool:
    if not ctx.permit(name, SITE, numerics):
        return False
    before = Snapshot.of(model)
    result = function(model)
    if isinstance(result, ir.Model):
        if result is not model:
            replace_contents(model, result)
    elif not (result is None or isinstance(result, bool)):
        raise _wrong_result(name, result, "an onnx_ir.Model, a bool or None")
    ctx.refresh()
    return Snapshot.of(model) != before


def _wrong_result(name: str, result: Any, expected: str) -> PassError:  # noqa: ANN401
    return PassError(
        f"pass {name} returned a {type(result).__name__}, expected {expected}: change the function, or "
        f"leave it out with --disable {name}",
        pass_name=name,
    )


def replace_contents(model: ir.Model, new: ir.Model) -> None:
    """Makes `model` hold what `new` holds: whoever keeps `model` sees the result.  `new` is of no use afterwards."""
    functions = dict(new.functions)
    metadata, notes = dict(new.metadata_props), dict(new.meta)
    model.graph = new.graph
    model.functions.clear()
    model.functions.update(functions)
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.meta.clear()
    model.meta.update(notes)
    model.ir_version = new.ir_version
    model.producer_name, model.producer_version = new.producer_name, new.producer_version
    model.domain, model.model_version = new.domain, new.model_version
    model.doc_string = new.doc_string
    model.device_configurations = new.device_configurations
