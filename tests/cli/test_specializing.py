"""`graphopt optimize` with the options that specialise a model."""

from __future__ import annotations

from pathlib import Path

import onnx

from tests.cli.conftest import Run


def test_options_specialise_the_model(run: Run, model: Path, out: Path) -> None:
    ran = run(
        "optimize",
        model,
        "-o",
        out,
        "--set-dim",
        "N=2",
        "--rename",
        "x=rows",
        "--outputs",
        "c",
        "--json",
    )
    assert ran.status == 0
    made = onnx.load(out).graph
    assert [value.name for value in made.input] == ["rows"]
    assert made.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert ran.json["specialized"][:3] == ["dimension N = 2", "outputs c", "x is called rows"]
    assert "computes what the original does" in ran.json["specialized"][3]


def test_a_bundle_says_what_was_specialised(run: Run, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    ran = run("optimize", model, "-o", folder, "--io-dtype", "x=float16", "--io-layout", "y=NHWC")
    assert ran.status == 2
    assert "layouts are of 3" in ran.message
    ran = run(
        "optimize", model, "-o", folder, "--io-dtype", "x=float16", "--report", tmp_path / "r.md"
    )
    assert ran.status == 0
    assert "specialised: x in float16" in ran.out
    assert "x in float16" in (folder / "manifest.json").read_text()
    assert "## Specialised" in (tmp_path / "r.md").read_text()
    assert (
        run(
            "optimize", model, "-o", folder, "--bind", "x=1", "--report", tmp_path / "r.html"
        ).status
        == 2
    )
    done = run("optimize", model, "-o", folder, "--set-dim", "N=1", "--report", tmp_path / "r.html")
    assert done.status == 0
