"""`graphopt distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from graphopt.cli import options
from graphopt.cli.optimizing import External, Output, Preprocess, SampleCount, Seed
from graphopt.cli.progress import progress

Teacher: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--teacher",
        metavar="ORIGINAL",
        help="The model to learn from: the same inputs and outputs.",
    ),
]
Samples: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--calibration",
        metavar="PATH",
        help="Samples to learn on, without labels: npz, a folder of npz, ONNX test_data_set_*, images.",
    ),
]
Training: TypeAlias = Annotated[
    str,
    typer.Option(
        "--settings",
        metavar="TEXT",
        help="steps=300,lr=0.004,schedule=cosine|linear|step|constant,temperature=1,mode=whole|blocks,transfer=yes,...",
    ),
]


def command(
    model: options.Model,
    teacher: Teacher,
    calibration: Samples,
    output: Output,
    settings: Training = "yes",
    preprocess: Preprocess = None,
    samples: SampleCount = None,
    seed: Seed = None,
    external: External = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Train MODEL, the student, to compute what the teacher computes, and write it as OUT.

    No labels are needed, zeros stay zero, and integer weights stay on their grid. The student may be the teacher
    pruned, slimmed or quantised, or another model with the same inputs and outputs. Where training makes nothing
    better, OUT is the student as it was. Needs PyTorch: pip install 'graphopt[distill]'.
    """
    from graphopt.cli.choice import one_of
    from graphopt.cli.optimizing import EXTERNAL
    from graphopt.driver.distill import distil_file
    from graphopt.driver.result import check_output
    from graphopt.ir.model_file import ExternalData
    from graphopt.rewrite import Calibration

    one_of("place for weights", external, EXTERNAL)
    check_output(output)
    given = Calibration(calibration, preprocess, samples)
    with progress(quiet=quiet or as_json) as say:
        history = distil_file(
            teacher,
            model,
            output,
            given,
            settings,
            seed=seed or 0,
            external=ExternalData(external),
            progress=say,
        )
    if as_json:
        from graphopt.cli.console import show_json
        from graphopt.report.plain import plain

        show_json({"input": str(model), "output": str(output), **plain(history)})
    elif not quiet:
        from graphopt.cli.console import show, text

        show(text(f"{model} → {output}"), *(text(each) for each in history.sentences()))
    return 0
