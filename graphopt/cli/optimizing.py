"""The options of `graphopt optimize`; other commands take some of them too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from graphopt.cli import completion

EXTERNAL = ("auto", "never", "single", "per-tensor")

Output: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", help="File to write, x.onnx, or a folder for a bundle."
    ),
]
Precision: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="fp32: every dtype as it is; fp16, bf16: half where it pays; "
        "fp16-weights: half in the file only; fp8: TensorRT; int8: needs --calibration. [default: fp32]",
    ),
]
Calibration: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="PATH",
        help="Samples to decide on: npz, a folder of npz, ONNX test_data_set_*. Without, inputs are generated.",
    ),
]
Preprocess: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--preprocess",
        metavar="FILE",
        help="How images among the samples become inputs (TOML): resize, crop, scale, mean, std, layout.",
    ),
]
SampleCount: TypeAlias = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", help="How many samples to use at most. [default: all]"),
]
BudgetText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="EXPR",
        help="Error that a lossy run may make: sqnr>=40, max<=0.01,cosine>=0.999. [default: the precision's]",
    ),
]
Sparsity: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        metavar="AMOUNT",
        help="Prune: 0.8 (share of zeros), 2:4 (two zeros in four), channels:0.5 (share of the arithmetic), max or "
        "channels:max (the most within --budget). Give --calibration, else accuracy suffers.",
    ),
]
Distill: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--distill",
        metavar="SETTINGS",
        help="Train what is left towards the original, without labels: yes, or steps=300,lr=0.004,... Needs PyTorch "
        "and --calibration.",
    ),
]
Sparse: TypeAlias = Annotated[
    str,
    typer.Option(
        "--sparse",
        metavar="auto|dense|sparse_initializer|constant|kept",
        help="Form of weights that are mostly zero; auto: with --sparsity what the target reads, where the file "
        "shrinks; else as they came.",
    ),
]
Plan: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Follow this precision plan, as --save-plan wrote it and you edited it; nodes are found by structure, "
        "whatever their names. For fp16, bf16, fp8.",
    ),
]
SavePlan: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--save-plan",
        metavar="FILE",
        help="Write dtype and reason of every node there (JSON; fp8: of every product). For fp16, bf16, fp8.",
    ),
]
Force: TypeAlias = Annotated[
    bool, typer.Option("--force", help="Emit what the target is known to run slower.")
]
Autotune: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--autotune",
        help="Time what fusions gain on this machine, instead of going by the target's tables; kept in "
        "~/.cache/graphopt for the next run.",
    ),
]
Recipe: TypeAlias = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Recipe in TOML; options given here win."),
]
Passes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="SPEC",
        help="Run this pass too, after the others: name, name{option=value} or module:object. Repeatable.",
        autocompletion=completion.pass_names,
    ),
]
Disable: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--disable",
        metavar="NAME",
        help="Leave out a pass (pass) or one rule of it (pass/rule). Repeatable.",
        autocompletion=completion.pass_names,
    ),
]
FreezeDefaults: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--freeze-defaults",
        help="Make constants of the inputs that have a default, as old exporters write every weight: what nobody "
        "feeds can be folded and fused.",
    ),
]
Verify: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--verify",
        metavar="final|each|off",
        help="Compare with the original at the end, after each pass, or not at all. [default: final]",
    ),
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Seed of everything random. [default: 0]"),
]
FoldLimit: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--fold-limit",
        metavar="BYTES",
        help="How much larger than what it replaces a folded constant may be: 65536, 64k, 16M. [default: 1 MiB]",
    ),
]
External: TypeAlias = Annotated[
    str,
    typer.Option(
        "--external",
        metavar="|".join(EXTERNAL),
        help="Where weights go: beside the model from 2 GiB on, never, in one file, in one file a tensor.",
    ),
]
Remarks: TypeAlias = Annotated[
    bool, typer.Option("--remarks", help="Look for near misses too, and list every remark.")
]
Strict: TypeAlias = Annotated[
    bool,
    typer.Option("--strict", help="Fail where a pass fails, instead of leaving it out."),
]
Profiles: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="NAME=MIN,OPT,MAX",
        help="Range of a dynamic dimension, for the engines of a bundle: batch=1,8,32. Repeatable.",
    ),
]
Extras: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="triton|ort",
        help="Put this into the bundle too: a Triton model repository, the .ort format. Repeatable.",
    ),
]
Explain: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--explain",
        metavar="NODE",
        help="Say why a node (its name or an output's, * and ? allowed) is as it is: dtype, reason, rewrites. "
        "Repeatable.",
    ),
]
Report: TypeAlias = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write the report: .html, .md or .json."),
]
