"""graphopt: an ONNX graph-rewriting compiler that proves its results.

    import graphopt
    result = graphopt.optimize("model.onnx", target="cpu")
    result.save("model.opt.onnx")

Names are imported on first use: `import graphopt` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphopt.deferred import SELDOM_USED, Deferring

if TYPE_CHECKING:
    from graphopt.driver import Result, optimize
    from graphopt.errors import (
        DataError,
        GraphoptError,
        ModelError,
        OptionError,
        PassError,
        TargetError,
        VerifyError,
    )
    from graphopt.ir.build import Builder
    from graphopt.ir.model_file import ExternalData, load_model, save_model
    from graphopt.numerics import Numerics
    from graphopt.pipeline import Pass, Repeat, RewritePass
    from graphopt.rewrite import Context, Lit, Match, Op, Rule, Skip, Var, exact, rule
    from graphopt.specialize import Image, Specialization
    from graphopt.targets import Precision, Target

__all__ = [  # noqa: RUF022  a table of contents
    # The main job
    "Result",
    "optimize",
    # Making it for one use
    "Image",
    "Specialization",
    # Models
    "ExternalData",
    "load_model",
    "save_model",
    # Writing passes and rules
    "Builder",
    "Context",
    "Lit",
    "Match",
    "Numerics",
    "Op",
    "Pass",
    "Repeat",
    "RewritePass",
    "Rule",
    "Skip",
    "Var",
    "exact",
    "rule",
    # Targets
    "Precision",
    "Target",
    # Errors
    "DataError",
    "GraphoptError",
    "ModelError",
    "OptionError",
    "PassError",
    "TargetError",
    "VerifyError",
]

_HOMES = {
    "graphopt.driver": ("Result", "optimize"),
    "graphopt.errors": (
        "DataError",
        "GraphoptError",
        "ModelError",
        "OptionError",
        "PassError",
        "TargetError",
        "VerifyError",
    ),
    "graphopt.ir.build": ("Builder",),
    "graphopt.ir.model_file": ("ExternalData", "load_model", "save_model"),
    "graphopt.numerics": ("Numerics",),
    "graphopt.pipeline": ("Pass", "Repeat", "RewritePass"),
    "graphopt.rewrite": ("Context", "Lit", "Match", "Op", "Rule", "Skip", "Var", "exact", "rule"),
    "graphopt.specialize": ("Image", "Specialization"),
    "graphopt.targets": ("Precision", "Target"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

Deferring(SELDOM_USED).install()  # here, because it must be there before anything imports onnx_ir


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
