"""The options that specialise a model, and what they ask for."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

_PANEL = "Specialisation (verified against the original)"

SetDim: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set-dim",
        metavar="NAME=SIZE",
        help="Fix a dynamic dimension, by its name or as INPUT:AXIS: batch=1. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
Bind: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--bind",
        metavar="INPUT=VALUE",
        help="Make an input a constant: a number, a list in JSON, or a file .npy or .pb. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
Outputs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs",
        metavar="NAME,…",
        help="Give these only: outputs, or values inside (what enters the last Softmax, say).",
        rich_help_panel=_PANEL,
    ),
]
IoDtype: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--io-dtype",
        metavar="NAME=DTYPE",
        help="Change the element type of an input or output: x=float16. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
IoLayout: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--io-layout",
        metavar="NAME=NHWC|NCHW",
        help="Change the layout of an input or output. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
ImageInput: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="INPUT=HOW",
        help="Take decoded images (uint8) and scale them in the model: x=nhwc,scale=255,mean=0.5:0.5:0.5,"
        "std=0.2:0.2:0.2,bgr, or x=FILE.toml as for --preprocess. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
Rename: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--rename",
        metavar="OLD=NEW",
        help="Give an input or output another name. Repeatable.",
        rich_help_panel=_PANEL,
    ),
]
