"""Passes, pipelines, recipes, and where passes are found."""

from graphopt.pipeline.passes import Pass, PassRun, Repeat, RewritePass, drops_defaults
from graphopt.pipeline.runner import Step, flatten, run_pipeline

__all__ = [
    "Pass",
    "PassRun",
    "Repeat",
    "RewritePass",
    "Step",
    "drops_defaults",
    "flatten",
    "run_pipeline",
]
