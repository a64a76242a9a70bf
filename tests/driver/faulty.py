"""Passes that are wrong on purpose."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.numerics import Numerics
from graphopt.rewrite import Context


@dataclasses.dataclass(frozen=True)
class Rename:
    """Makes operators of one type those of another, wherever it may."""

    before: str = "Relu"
    after: str = "Abs"
    only: str = ""

    @property
    def name(self) -> str:
        return "faulty"

    @property
    def numerics(self) -> Numerics:
        return Numerics.EXACT

    def run(self, model: ir.Model, ctx: Context) -> bool:
        changed = False
        for node in list(model.graph):
            at = node.outputs[0].name or ""
            if node.op_type == self.before and ctx.permit(f"{self.before}-to-{self.after}", node):
                # A rewrite elsewhere is a rewrite too, but a harmless one.
                if not self.only or at == self.only:
                    node.op_type = self.after
                changed = True
        return changed


relu_to_abs = Rename()
one_relu_to_abs = Rename(only="c")
