"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from graphopt.cli import completion

Model: TypeAlias = Annotated[
    Path, typer.Argument(metavar="MODEL", help="ONNX file (.onnx), or ONNX text (.onnxtxt).")
]
Inputs: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="PATH",
        help="Inputs to run on: an .npz, a folder of them, ONNX test_data_set_* folders, or a .toml that bounds them. "
        "Default: generated.",
    ),
]
Seed: TypeAlias = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of everything random.")
]
Cache: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--cache",
        help="Keep what the original computes for the next run on it, in ~/.cache/graphopt/reference (at most 1 GiB).",
    ),
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Dims: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--dims",
        metavar="NAME=N,…",
        help="Sizes of symbolic dimensions: batch=1,seq=128; an unnamed one is INPUT:AXIS=N.",
    ),
]
Target: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME",
        help="What to emit for: cpu, cuda, tensorrt, portable … (graphopt targets). [default: cpu]",
        autocompletion=completion.target_names,
    ),
]
Gates: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="OUTPUT=LIMITS",
        help="Limits for one output instead of the run's: logits=sqnr>=40,cosine>=0.999, debug=ignore. Repeatable.",
    ),
]
Metric: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="MODULE:FUNCTION",
        help="Judge outputs by this function too: it takes the reference's and the result's by name and returns a "
        "number; limit it with >=X or <=X.",
    ),
]
