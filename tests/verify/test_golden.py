"""Golden cases: recorded once, checked against another optimiser, updated only when that is meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper as helper
import onnx.parser
import pytest

from graphopt.errors import DataError, ModelError, OptionError, VerifyError
from graphopt.numerics import Numerics
from graphopt.verify import golden_files
from graphopt.verify.compare import profile_for
from graphopt.verify.feeds import Feed
from graphopt.verify.golden import ErrorChange, check, record, update

HEAD = '<ir_version: 10, opset_import: ["" : 17]>'
TEXT = """g (float[n,4] x) => (float[n,4] y) <float[4] k = {1, 2, 3, 4}>
          { a = Identity(x) b = Add(a, k) c = Exp(b) y = Mul(c, k) }"""

Change = Callable[[onnx.ModelProto], None]


def keep(_: onnx.ModelProto) -> None:
    """Optimises nothing."""


def drop_identity(proto: onnx.ModelProto) -> None:
    proto.graph.node.pop(0)
    proto.graph.node[0].input[0] = "x"


def scale_output(factor: float) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        drop_identity(proto)
        scaled = helper.from_array(np.array([1, 2, 3, 4], np.float32) * np.float32(factor), "k2")
        proto.graph.initializer.append(scaled)
        proto.graph.node[-1].input[1] = "k2"

    return change


def optimiser(change: Change, numerics: Numerics = Numerics.REORDERED) -> Any:
    def optimize(source: Path, result: Path, recipe: str) -> Numerics:
        assert recipe == "tidy"
        proto = onnx.load(source)
        change(proto)
        result.write_bytes(proto.SerializeToString())
        return numerics

    return optimize


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.onnx"
    path.write_bytes(onnx.parser.parse_model(HEAD + TEXT).SerializeToString())
    return path


@pytest.fixture
def case(tmp_path: Path, source: Path) -> Path:
    folder = tmp_path / "golden" / "mlp"
    record(folder, source, optimiser(drop_identity), recipe="tidy")
    return folder


def manifest_of(case: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((case / "golden.json").read_text())
    return content


def test_a_case_lies_in_the_layout_of_onnx(case: Path) -> None:
    manifest = manifest_of(case)
    assert manifest["ops"] == {"Add": 1, "Exp": 1, "Mul": 1}
    assert manifest["generator"]["seed"] == 0
    assert manifest["runtime"]["level"] == "disabled"
    proto = onnx.TensorProto.FromString((case / "test_data_set_0" / "input_0.pb").read_bytes())
    assert (proto.name, list(proto.dims)) == ("x", [2, 4])
    assert "Exp" in (case / "structure.txt").read_text()
    assert (case / "model.onnx").is_file()


def test_a_recorded_case_holds(case: Path) -> None:
    report = check(case.parent, optimiser(drop_identity))
    assert report.passed, report.cases
    assert [found.name for found in report.cases] == ["mlp"]
    assert report.cases[0].outputs[0].equal
    assert report.orphans == ()
    assert check(case, optimiser(drop_identity)).passed


def test_recording_twice_gives_the_same_bytes(case: Path, tmp_path: Path, source: Path) -> None:
    again = tmp_path / "again"
    record(again, source, optimiser(drop_identity), recipe="tidy")
    for path in case.rglob("*"):
        if path.is_file():
            assert (again / path.relative_to(case)).read_bytes() == path.read_bytes()


def test_another_structure_fails_and_shows_the_difference(case: Path) -> None:
    (found,) = check(case, optimiser(keep)).cases
    assert not found.passed
    assert "operators changed: Identity 0 → 1" in found.failures[0]
    assert "+  %2 = Identity('x')" in found.failures[1]


def test_wrong_numbers_fail(case: Path) -> None:
    (found,) = check(case, optimiser(scale_output(1.01))).cases
    assert any("output 'y' on 'normal, typical (n=2)': " in failure for failure in found.failures)


def test_an_error_that_grows_fails_within_the_tolerance(case: Path) -> None:
    (found,) = check(case, optimiser(scale_output(1 + 5e-6))).cases
    assert [
        failure for failure in found.failures if "differ" in failure or "outside" in failure
    ] == []
    assert any("the error of output 'y' grew from 0 to" in failure for failure in found.failures)
    assert found.errors[0].grew


@pytest.mark.parametrize(
    ("recorded", "now", "grew"),
    [
        (1e-5, 3.9e-5, False),
        (1e-5, 4.1e-5, True),
        (0.0, 9e-7, False),
        (None, 1.0, False),
        (1e-5, None, False),
    ],
)
def test_growth_has_a_factor_and_a_floor(
    recorded: float | None, now: float | None, grew: bool
) -> None:
    assert ErrorChange("y", recorded, now).grew is grew


def test_an_optimiser_that_fails_fails_the_case(case: Path) -> None:
    def broken(*_: object) -> Numerics:
        raise ModelError("no such thing")

    assert check(case, broken).cases[0].failures == ("ModelError: no such thing",)
    assert update(case, broken, ci=False).cases[0].failures == ("ModelError: no such thing",)


def rewrite_source(case: Path, change: Change) -> None:
    proto = onnx.load(case / "model.onnx")
    change(proto)
    (case / "model.onnx").write_bytes(proto.SerializeToString())


def other_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].op_type = "Neg"


def other_weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].CopyFrom(helper.from_array(np.ones(4, np.float32), "k"))


@pytest.mark.parametrize(
    ("change", "what"), [(other_operator, "structure"), (other_weight, "weights")]
)
def test_a_changed_source_is_noticed(case: Path, change: Change, what: str) -> None:
    rewrite_source(case, change)
    told = f"is not the one that was recorded: its {what} changed"
    assert told in check(case, optimiser(drop_identity)).cases[0].failures[0]
    (refused,) = update(case, optimiser(keep), ci=False).cases
    assert told in refused.failures[0]
    assert not refused.written
    assert update(case, optimiser(keep), accept=True, ci=False).cases[0].written
    assert check(case, optimiser(keep)).passed


def test_names_and_documentation_of_the_source_do_not_count(case: Path) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        proto.doc_string = "another"
        proto.producer_version = "2"
        proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "renamed"

    rewrite_source(case, rename)
    assert check(case, optimiser(drop_identity)).passed


def test_a_missing_or_broken_source_fails(case: Path) -> None:
    (case / "model.onnx").write_bytes(b"other")
    assert "ModelError" in check(case, optimiser(drop_identity)).cases[0].failures[0]
    (case / "model.onnx").unlink()
    assert "is missing" in check(case, optimiser(drop_identity)).cases[0].failures[0]


def test_another_runtime_is_told_and_is_no_failure(tmp_path: Path, source: Path) -> None:
    """Another version that computes otherwise: outputs and errors of then say nothing about the model."""
    case = tmp_path / "case"
    rounding = optimiser(scale_output(1 + 5e-6))
    record(case, source, rounding, recipe="tidy")
    manifest = manifest_of(case)
    manifest["runtime"]["version"] = "0.1"
    manifest["errors"]["y"] = 1e-12
    (case / "golden.json").write_text(json.dumps(manifest))
    stored = case / "test_data_set_0" / "output_0.pb"
    stored.write_bytes(helper.from_array(np.zeros((2, 4), np.float32), "y").SerializeToString())
    (found,) = check(case, rounding).cases
    assert found.passed, found.failures
    assert found.notes[0].startswith("recorded with onnxruntime 0.1, checked with ")
    assert "the source itself computes otherwise under this runtime: output 'y'" in found.notes[1]
    assert "grew from 1e-12" in found.notes[2]
    (wrong,) = check(case, optimiser(scale_output(1.01))).cases
    assert not wrong.passed, "the model's own faults are told all the same"


def test_stored_outputs_that_the_source_does_not_give_fail(case: Path) -> None:
    stored = case / "test_data_set_0" / "output_0.pb"
    stored.write_bytes(helper.from_array(np.zeros((2, 4), np.float32), "y").SerializeToString())
    (found,) = check(case, optimiser(drop_identity)).cases
    assert "the source itself does not compute what was recorded" in found.failures[0]


def test_external_weights_come_along(tmp_path: Path, source: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    proto = onnx.load(source)
    k = helper.to_array(proto.graph.initializer[0])
    proto.graph.initializer[0].CopyFrom(helper.from_array(k, "k"))  # as bytes, which may lie apart
    onnx.save(proto, away / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert len(list(away.iterdir())) == 2
    folder = tmp_path / "case"
    record(folder, away / "m.onnx", optimiser(drop_identity), recipe="tidy")
    shutil.rmtree(away)
    assert check(folder, optimiser(drop_identity)).passed


def test_ci_replaces_no_case(case: Path, tmp_path: Path, source: Path) -> None:
    with pytest.raises(OptionError, match="not updated in continuous integration"):
        record(case, source, optimiser(keep), recipe="tidy", ci=True)
    assert record(tmp_path / "new", source, optimiser(keep), recipe="tidy", ci=True).written


def test_a_case_has_a_cap(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.verify.golden_case.MAX_CASE_BYTES", 100)
    folder = tmp_path / "case"
    record(folder, source, optimiser(drop_identity), recipe="tidy")
    stored = [path.stat().st_size for path in folder.glob("test_data_set_*/*.pb")]
    assert len(stored) == 3, "32 bytes each, without their envelopes"
    assert check(folder, optimiser(drop_identity)).passed


def test_a_changed_input_is_noticed(case: Path) -> None:
    path = case / "test_data_set_0" / "input_0.pb"
    path.write_bytes(helper.from_array(np.zeros((2, 4), np.float32), "x").SerializeToString())
    assert "is not what was recorded" in check(case, optimiser(drop_identity)).cases[0].failures[0]


def test_a_wrong_optimiser_cannot_be_recorded(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "case"
    with pytest.raises(VerifyError, match="cannot be recorded, it is failed"):
        record(folder, source, optimiser(scale_output(2)), recipe="tidy")
    assert not folder.exists()


def test_a_foreign_folder_is_not_touched(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"")
    with pytest.raises(OptionError, match=r"not a golden case \(it holds 'cat.jpg'\)"):
        record(folder, source, optimiser(keep), recipe="tidy")
    with pytest.raises(OptionError, match="is not a folder"):
        record(source, source, optimiser(keep), recipe="tidy")


def test_a_model_may_be_recorded_where_it_lies(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    shutil.copy(source, folder / "model.onnx")
    record(folder, folder / "model.onnx", optimiser(drop_identity), recipe="tidy")
    record(folder, folder / "model.onnx", optimiser(drop_identity), recipe="tidy")
    assert check(folder, optimiser(drop_identity)).passed


def test_own_inputs_are_stored_and_used_again(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "case"
    feed = Feed("mine", {"x": np.full((1, 4), 0.5, np.float32)})
    record(folder, source, optimiser(drop_identity), feeds=[feed], recipe="tidy")
    assert manifest_of(folder)["generator"] is None
    assert [entry["feed"] for entry in manifest_of(folder)["data_sets"]] == ["mine"]
    assert check(folder, optimiser(drop_identity)).passed
    assert update(folder, optimiser(keep), ci=False).passed
    assert [entry["feed"] for entry in manifest_of(folder)["data_sets"]] == ["mine"]


def test_an_update_writes_what_changed(case: Path) -> None:
    before = (case / "test_data_set_0" / "output_0.pb").read_bytes()
    report = update(case.parent, optimiser(keep), ci=False)
    assert report.cases[0].written
    assert manifest_of(case)["ops"]["Identity"] == 1
    assert (case / "test_data_set_0" / "output_0.pb").read_bytes() == before
    assert check(case, optimiser(keep)).passed


def test_an_update_refuses_a_grown_error_unless_accepted(case: Path) -> None:
    worse = optimiser(scale_output(1 + 5e-6))
    (refused,) = update(case, worse, ci=False).cases
    assert not refused.written
    assert "errors grew: 'y' 0 → " in refused.failures[0]
    assert manifest_of(case)["errors"]["y"] == 0
    stray = case / "test_data_set_0" / "input_7.pb"
    stray.write_bytes(b"")
    (accepted,) = update(case, worse, accept=True, ci=False).cases
    assert accepted.written
    assert manifest_of(case)["errors"]["y"] > 0
    assert not stray.exists()
    assert check(case, worse).passed


def test_nothing_is_written_in_continuous_integration(case: Path) -> None:
    with pytest.raises(OptionError, match="not updated in continuous integration"):
        update(case, optimiser(keep), ci=True)


def test_no_case_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no golden case"):
        check(tmp_path, optimiser(keep))
    with pytest.raises(DataError, match="There is no golden case"):
        update(tmp_path, optimiser(keep), ci=False)


def test_orphans_are_listed(case: Path) -> None:
    (case / "test_data_set_0" / "input_5.pb").write_bytes(b"")
    (case.parent / "forgotten").mkdir()
    (case / "LICENSE").write_text("MIT")
    assert check(case.parent, optimiser(drop_identity)).orphans == (
        "forgotten",
        "mlp/test_data_set_0/input_5.pb",
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 99}'])
def test_an_unreadable_manifest_is_named(case: Path, content: str) -> None:
    (case / "golden.json").write_text(content)
    with pytest.raises(DataError, match=r"golden\.json' (cannot be read|has schema)"):
        check(case, optimiser(keep))


def test_large_values_are_summarised_and_generated_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.verify.golden_case.MAX_STORED_BYTES", 40)
    folder = tmp_path / "case"
    record(folder, source, optimiser(drop_identity), recipe="tidy")
    first, *_ = manifest_of(folder)["data_sets"]
    assert first["inputs"][0]["stored"] is True
    assert not list((folder / "test_data_set_5").glob("input_*")), "three rows are above the cap"
    assert "summary" in manifest_of(folder)["data_sets"][5]["outputs"][0]
    assert check(folder, optimiser(drop_identity)).passed
    assert not check(folder, optimiser(scale_output(1.01))).passed


def test_a_summary_tells_other_numbers_apart() -> None:
    array = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    array[0, 0] = np.inf
    summary = golden_files.summarise("y", array)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    gate = profile_for(Numerics.REORDERED)

    def passes(candidate: object) -> bool:
        return golden_files.compare_summary("y", summary, candidate, gate).passed

    assert passes(array)
    assert passes(array * np.float32(1 + 1e-6))
    assert not passes(array * np.float32(1.001))
    assert not passes(array.astype(np.float64))
    assert not passes(array[:100])
    assert not passes([array])
    outlier = array.copy()
    outlier[7, 9] = 100
    assert not passes(outlier)
    empty = golden_files.summarise("e", array[:0])
    assert golden_files.compare_summary("e", empty, array[:0], gate).passed


def test_values_of_every_kind_have_a_hash() -> None:
    array = np.ones(2, np.float32)
    values: list[Any] = [
        array,
        array.astype(np.float64),
        array.reshape(2, 1),
        [array],
        [array, array],
        None,
        {1: 2.0},
        np.array(["a"], object),
    ]
    assert len({golden_files.value_hash(value) for value in values}) == len(values)
    assert golden_files.value_hash(array.astype(">f4")) == golden_files.value_hash(array)
    assert golden_files.size_bytes([array, array]) == 16
    assert golden_files.size_bytes(None) == 0


def test_sequences_and_optionals_are_stored_and_sequences_of_maps_are_not(tmp_path: Path) -> None:
    path = tmp_path / "source.onnx"
    text = """g (seq(float[n]) s, optional(float[n]) o) => (seq(float[n]) r, bool h)
              { r = Identity(s) h = OptionalHasElement(o) }"""
    path.write_bytes(onnx.parser.parse_model(HEAD.replace("17", "18") + text).SerializeToString())
    folder = tmp_path / "case"
    record(folder, path, optimiser(keep, Numerics.EXACT), recipe="tidy")
    assert check(folder, optimiser(keep, Numerics.EXACT)).passed
    head = '<ir_version: 10, opset_import: ["" : 17, "ai.onnx.ml" : 2]>'
    text = "g (float[2,2] x) => (seq(map(int64,float)) y) { y = ai.onnx.ml.ZipMap<classlabels_int64s = [4, 5]>(x) }"
    path.write_bytes(onnx.parser.parse_model(head + text).SerializeToString())
    with pytest.raises(DataError, match="is a sequence of dict"):
        record(tmp_path / "maps", path, optimiser(keep, Numerics.EXACT), recipe="tidy")


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["mnist_cntk", "lm_stories260k_kv", "imagenet_mobilenetv1_05_160_qdq"]
)
def test_real_models_make_cases(zoo: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    record(folder, zoo / "models" / f"{name}.onnx", optimiser(keep, Numerics.EXACT), recipe="tidy")
    assert check(folder, optimiser(keep, Numerics.EXACT)).passed
