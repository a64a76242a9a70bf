"""The commands besides `optimize`: what they print and return."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.cli.inspect import parse_dims
from graphopt.cli.passes import reflow
from graphopt.errors import OptionError
from tests.cli.conftest import TIDY, Run, save

EQUAL = TIDY.replace("Identity(x)", "Add(x, z)").replace(
    "float[4] spare = {5, 6, 7, 8}", "float[1] z = {0}"
)
CLOSE = TIDY.replace("{1, 2, 3, 4}", "{1.001, 2, 3, 4}")
OTHER = TIDY.replace("y = Relu(c)", "y = Neg(c)")


@pytest.fixture
def equal(tmp_path: Path) -> Path:
    return save(tmp_path / "equal.onnx", EQUAL)


@pytest.fixture
def close(tmp_path: Path) -> Path:
    return save(tmp_path / "close.onnx", CLOSE)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return save(tmp_path / "other.onnx", OTHER)


class TestVerify:
    def test_equal_models(self, run: Run, model: Path, equal: Path) -> None:
        ran = run("verify", model, equal)
        assert (ran.status, ran.err) == (0, "")
        assert "verified  equal to the reference on" in ran.out
        assert "bit-equal" in ran.out

    def test_different_models(self, run: Run, model: Path, other: Path) -> None:
        ran = run("verify", model, other)
        assert (ran.status, ran.err) == (1, "")
        assert "differs  output 'y'" in ran.out

    def test_json(self, run: Run, model: Path, other: Path) -> None:
        ran = run("verify", model, other, "--json")
        body = ran.json
        assert (ran.status, body["passed"], body["status"]) == (1, False, "failed")
        assert body["reference"] == str(model)
        assert body["outputs"][0]["name"] == "y"

    def test_quiet(self, run: Run, model: Path, other: Path) -> None:
        ran = run("verify", model, other, "--quiet")
        assert (ran.status, ran.out, ran.err) == (1, "", "")

    @pytest.mark.parametrize(
        ("options", "status"),
        [
            ([], 1),
            (["--profile", "exact"], 1),
            (["--profile", "fp16"], 0),
            (["--tolerance", "1e-2"], 0),
            (["--tolerance", "1e-9"], 1),
            (["--sqnr", "40"], 0),
            (["--sqnr", "400"], 1),
            (["--cosine", "0.999"], 0),
            (["--tolerance", "1e-2", "--sqnr", "400"], 1),
        ],
    )
    def test_gates(
        self, run: Run, model: Path, close: Path, options: list[str], status: int
    ) -> None:
        assert run("verify", model, close, *options).status == status

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--profile", "fp61"], "unknown profile 'fp61'. Did you mean 'fp16'?"),
            (["--tolerance", "nan"], "--tolerance nan: give a finite number"),
            (["--dims", "M=3"], "M"),
            (["--dims", "N"], "give NAME=SIZE"),
            (["--inputs", "nowhere"], "nowhere"),
        ],
    )
    def test_bad_options(self, run: Run, model: Path, options: list[str], expected: str) -> None:
        ran = run("verify", model, model, *options)
        assert (ran.status, ran.out) == (2, "")
        assert expected in ran.message

    def test_sizes_of_dimensions_are_used(self, run: Run, model: Path, equal: Path) -> None:
        body = run("verify", model, equal, "--dims", "N=11", "--json").json
        assert all("N=11" in feed for feed in body["feeds"])

    def test_the_runtimes_own_optimisations_are_shown(
        self, run: Run, model: Path, equal: Path
    ) -> None:
        ran = run("verify", model, equal, "--deployed")
        assert "with the runtime's own optimisations" in ran.out

    def test_text_against_protobuf(self, run: Run, model: Path, tmp_path: Path) -> None:
        (tmp_path / "m.onnxtxt").write_text(TIDY)
        assert run("verify", tmp_path / "m.onnxtxt", model, "--profile", "exact").status == 0

    def test_another_contract_differs(self, run: Run, model: Path, tmp_path: Path) -> None:
        renamed = save(
            tmp_path / "r.onnx",
            TIDY.replace("float[N, 4] x", "float[N, 4] u").replace("(x)", "(u)"),
        )
        ran = run("verify", model, renamed)
        assert ran.status == 1
        assert "contract:" in ran.out

    def test_what_cannot_be_run_is_unverified(self, run: Run, tmp_path: Path) -> None:
        custom = save(
            tmp_path / "custom.onnx",
            """<ir_version: 9, opset_import: ["" : 18, "house" : 1]>
            g (float[4] x) => (float[4] y) { y = house.Special(x) }""",
        )
        ran = run("verify", custom, custom)
        assert ran.status == 1, "not proven equal is not equal"
        assert ran.out.startswith("unverified")


class TestDiff:
    def test_a_model_and_itself(self, run: Run, model: Path) -> None:
        ran = run("diff", model, model)
        assert ran.status == 0
        assert "no difference: 4 nodes match" in ran.out

    def test_two_models(self, run: Run, model: Path, other: Path) -> None:
        ran = run("diff", model, other)
        assert (ran.status, ran.err) == (1, "")
        assert "Relu → Neg" in ran.out

    def test_markdown(self, run: Run, model: Path, other: Path) -> None:
        ran = run("diff", model, other, "--markdown")
        assert ran.status == 1
        assert ran.out.startswith("- nodes: 3 match, 1 removed, 1 added\n  - Relu → Neg")

    def test_json(self, run: Run, model: Path, other: Path) -> None:
        body = run("diff", model, other, "--json").json
        assert body["equal"] is False
        assert body["replacements"][0]["added"] == ["Neg"]

    def test_quiet(self, run: Run, model: Path, other: Path) -> None:
        ran = run("diff", model, other, "--quiet")
        assert (ran.status, ran.out) == (1, "")


class TestInspect:
    def test_tables(self, run: Run, model: Path) -> None:
        ran = run("inspect", model)
        assert (ran.status, ran.err) == (0, "")
        assert "IR 9; ai.onnx 18" in ran.out
        assert "float[N, 4]" in ran.out
        assert "8 in 32 B float" in ran.out

    def test_json(self, run: Run, model: Path) -> None:
        body = run("inspect", model, "--json").json
        assert body["inputs"] == [
            {
                "name": "x",
                "dtype": "float",
                "shape": ["N", 4],
                "kind": "tensor",
                "overridable": False,
            }
        ]
        assert body["model"]["operators"] == {"Identity": 2, "Add": 1, "Relu": 1}
        assert (body["flops"], body["sparsity"]) == (0, 0.0)

    def test_costs(self, run: Run, tmp_path: Path) -> None:
        source = save(
            tmp_path / "mm.onnx",
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[batch, 3] a, float[3, 5] b) => (float[batch, 5] y) { y = MatMul(a, b) }""",
        )
        assert "15*batch MAC; give --dims batch=1" in run("inspect", source).out
        assert "30 MAC = 60 FLOP" in run("inspect", source, "--dims", "batch=2").out

    def test_unknown_dimension(self, run: Run, model: Path) -> None:
        ran = run("inspect", model, "--dims", "M=1")
        assert ran.status == 2
        assert "They have: N." in ran.message

    def test_rows_can_be_limited(self, run: Run, model: Path) -> None:
        assert "2 more operators" in run("inspect", model, "--top", "1").out
        assert "more operators" not in run("inspect", model, "--top", "0").out

    def test_names_cannot_drive_the_terminal(self, run: Run, tmp_path: Path) -> None:
        proto = onnx.parser.parse_model(TIDY)
        proto.graph.input[0].name = proto.graph.node[0].input[0] = "[red]\x1b[2J"
        onnx.save(proto, tmp_path / "m.onnx")
        out = run("inspect", tmp_path / "m.onnx").out
        assert "\x1b" not in out
        assert "[red]\\x1b[2J" in out

    @pytest.mark.parametrize("text", ["batch", "=1", "batch=", "batch=-1", "batch=x", "batch=1.5"])
    def test_bad_dims(self, text: str) -> None:
        with pytest.raises(OptionError, match="give NAME=SIZE"):
            parse_dims([text])

    def test_dims(self) -> None:
        assert parse_dims(["batch=1, seq=128", "x:0=2"]) == {"batch": 1, "seq": 128, "x:0": 2}


class TestPassesAndTargets:
    def test_passes(self, run: Run) -> None:
        ran = run("passes")
        assert ran.status == 0
        assert all(name in ran.out for name in ("tidy", "fold-constants", "fuse-conv"))

    def test_one_pass(self, run: Run) -> None:
        ran = run("passes", "tidy")
        assert "drop-identity" in ran.out
        assert "exact" in ran.out

    def test_a_pass_with_a_picture(self, run: Run) -> None:
        out = run("passes", "fold-constants").out
        assert "Before:" in out
        assert "After:" in out

    def test_passes_as_json(self, run: Run) -> None:
        passes = {each["name"]: each for each in run("passes", "--json").json["passes"]}
        assert passes["tidy"]["numerics"] == "reordered"
        assert passes["remove-dead-code"]["numerics"] == "exact"
        assert "drop-identity" in {rule["name"] for rule in passes["tidy"]["rules"]}

    def test_unknown_pass(self, run: Run) -> None:
        ran = run("passes", "tidi")
        assert ran.status == 2
        assert "Did you mean 'tidy'?" in ran.message

    def test_sentences_flow_and_pictures_stay(self) -> None:
        doc = "One\nsentence.\n\n    Before:  a\n    After:   b\n\nMore\nof it.\nBefore:  c\nAfter:  d\nand more"
        assert reflow(doc) == (
            "One sentence.\n\n    Before:  a\n    After:   b\n\nMore of it.\nBefore:  c\nAfter:  d\nand more"
        )

    def test_targets(self, run: Run) -> None:
        ran = run("targets")
        assert ran.status == 0
        assert all(name in ran.out for name in ("cpu", "cuda", "tensorrt", "portable"))

    def test_one_target(self, run: Run) -> None:
        ran = run("targets", "tensorrt")
        assert "LayerNormalization" in ran.out
        assert "9 to 24" in ran.out

    def test_targets_as_json(self, run: Run) -> None:
        (target,) = run("targets", "cpu", "--json").json["targets"]
        assert target["name"] == "cpu"
        assert target["domains"][""] == target["opset"][1]


class TestBench:
    def test_table(self, run: Run, model: Path, equal: Path) -> None:
        ran = run("bench", model, equal, "--seconds", "0", "--profile-ops")
        assert (ran.status, ran.err) == (0, "")
        assert all(word in ran.out for word in ("ratio", "95 %", "memory", "in kernels of one run"))
        assert "1.00\N{MULTIPLICATION SIGN}" in ran.out

    def test_json(self, run: Run, model: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "in.npz", x=np.ones((3, 4), np.float32))
        body = run(
            "bench",
            model,
            "--seconds",
            "0",
            "--inputs",
            tmp_path / "in.npz",
            "--level",
            "basic",
            "--no-memory",
            "--json",
        ).json
        (row,) = body["models"]
        assert (row["model"], row["ratio"]) == (str(model), 1.0)
        assert row["rounds"] >= 5
        assert (row["ratio_low"], row["ratio_high"]) == (1.0, 1.0)
        assert row["peak_bytes"] is None
        assert row["provider"] == "cpu"
        assert body["level"] == "basic"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("g (float[N, 4] z) => (float[N, 4] y) { y = Relu(z) }", "input names are z, not x"),
            ("g (float[N, 4] x) => (float[N, 4] w) { w = Relu(x) }", "output names are w, not y"),
            ("g (float[N, 5] x) => (float[N, 5] y) { y = Relu(x) }", "input 'x' is float[N,5]"),
            ("g (float[N] x) => (float[N] y) { y = Relu(x) }", "input 'x' is float[N]"),
            ("g (double[N, 4] x) => (double[N, 4] y) { y = Relu(x) }", "input 'x' is double"),
        ],
    )
    def test_other_inputs_and_outputs_are_refused(
        self, run: Run, model: Path, tmp_path: Path, text: str, words: str
    ) -> None:
        other = save(tmp_path / "other.onnx", '<ir_version: 9, opset_import: ["" : 18]> ' + text)
        ran = run("bench", model, other, "--seconds", "0", "--no-memory")
        assert ran.status == 2
        assert words in ran.message

    def test_providers_are_those_that_are_here(self, run: Run, model: Path) -> None:
        ran = run("bench", model, "--provider", "cpu", "--seconds", "0", "--no-memory", "--json")
        assert [row["provider"] for row in ran.json["models"]] == ["cpu"]
        ran = run("bench", model, "--provider", "abacus")
        assert ran.status == 2
        assert "not in this onnxruntime; it has" in ran.message

    def test_bad_level(self, run: Run, model: Path) -> None:
        ran = run("bench", model, "--level", "al")
        assert ran.status == 2
        assert "Did you mean 'all'?" in ran.message

    def test_nothing_to_measure(self, run: Run, tmp_path: Path) -> None:
        custom = save(
            tmp_path / "custom.onnx",
            """<ir_version: 9, opset_import: ["" : 18, "house" : 1]>
            g (float[4] x) => (float[4] y) { y = house.Special(x) }""",
        )
        ran = run("bench", custom)
        assert ran.status == 2
        assert "nothing to measure" in ran.message


class TestGolden:
    @pytest.fixture
    def case(self, run: Run, model: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "golden" / "tidy"
        assert run("golden", "record", model, folder).status == 0
        return folder

    def test_record_and_check(self, run: Run, case: Path) -> None:
        assert (case / "golden.json").is_file()
        assert (case / "test_data_set_0" / "input_0.pb").is_file()
        ran = run("golden", "check", case.parent)
        assert (ran.status, ran.err) == (0, "")
        assert "tidy" in ran.out
        assert "ok" in ran.out

    def test_a_change_of_structure_fails(self, run: Run, case: Path) -> None:
        structure = case / "structure.txt"
        structure.write_text(structure.read_text().replace("Relu", "Elu"))
        ran = run("golden", "check", case)
        assert ran.status == 1
        assert "the structure changed" in ran.out

    def test_update_writes_it_again(
        self, run: Run, case: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CI", raising=False)
        (case / "structure.txt").unlink()
        assert run("golden", "update", case).status == 0
        assert run("golden", "check", case).status == 0

    def test_continuous_integration_does_not_update(
        self, run: Run, case: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CI", "true")
        ran = run("golden", "update", case)
        assert (ran.status, ran.out) == (2, "")
        assert "not updated in continuous integration" in ran.message

    def test_json(self, run: Run, case: Path) -> None:
        body = run("golden", "check", case, "--json").json
        assert body["passed"] is True
        assert [(c["name"], c["passed"]) for c in body["cases"]] == [("tidy", True)]

    def test_the_target_is_kept(self, run: Run, model: Path, tmp_path: Path) -> None:
        folder = tmp_path / "case"
        assert run("golden", "record", model, folder, "--target", "portable").status == 0
        assert "portable" in (folder / "golden.json").read_text()
        assert run("golden", "check", folder, "--quiet").status == 0

    def test_the_recipe_and_the_inputs_are_kept(
        self, run: Run, model: Path, tmp_path: Path
    ) -> None:
        folder, recipe = tmp_path / "case", tmp_path / "recipe.toml"
        recipe.write_text('pipeline = ["remove-dead-code"]\n')
        np.savez(tmp_path / "in.npz", x=np.ones((3, 4), np.float32))
        ran = run(
            "golden", "record", model, folder, "--recipe", recipe, "--inputs", tmp_path / "in.npz"
        )
        assert ran.status == 0
        assert "Identity" in (folder / "structure.txt").read_text()
        assert run("golden", "check", folder).status == 0

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--target", "gpu"], "unknown target 'gpu'"),
            (["--target", "cpu", "--recipe", "r.toml"], "exclude one another"),
            (["--recipe", "nowhere.toml"], "nowhere.toml"),
        ],
    )
    def test_bad_options(
        self, run: Run, model: Path, tmp_path: Path, options: list[str], expected: str
    ) -> None:
        ran = run("golden", "record", model, tmp_path / "case", *options)
        assert ran.status == 2
        assert expected in ran.message
        assert not (tmp_path / "case").exists()

    @pytest.mark.parametrize("command", ["check", "update"])
    def test_no_case(
        self, run: Run, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(
            "CI", raising=False
        )  # there, an update is refused before anything is looked at
        assert "there is no folder" in run("golden", command, tmp_path / "none").message
        ran = run("golden", command, tmp_path)
        assert ran.status == 2
        assert "no golden case" in ran.message


def test_densify_says_what_it_did(run: Run, model: Path, out: Path) -> None:
    ran = run("densify", model, "-o", out)
    assert "0 sparse tensors made dense" in " ".join(ran.out.split())
    body = run("densify", model, "-o", out, "--json").json
    assert body == {
        "input": str(model), "output": str(out), "sparse_tensors": 0, "bytes": out.stat().st_size
    }  # fmt: skip


def test_inputs_that_the_reference_refuses_are_noted(run: Run, tmp_path: Path) -> None:
    """Of every size that is tried, a Reshape to [2, 2] takes one."""
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N] x) => (float[2, 2] y) <int64[2] s = {2, 2}> { y = Reshape(x, s) }"""
    path = save(tmp_path / "picky.onnx", text)
    ran = run("verify", path, path, "--dims", "N=4")
    assert ran.status == 0
    ran = run("verify", path, path)
    assert "refused by the reference" in ran.out + ran.err
