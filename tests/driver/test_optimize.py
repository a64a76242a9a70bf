"""From every kind of source to a verified file, and nothing but that file."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper as helper
import onnx_ir as ir
import pytest

import graphopt
from graphopt import optimize
from graphopt.errors import DataError, ModelError, OptionError, TargetError
from graphopt.ir.model_file import load_model
from graphopt.pipeline.recipe import Recipe
from graphopt.rewrite import Calibration, Context
from graphopt.targets import get_target
from tests.driver.conftest import HEAD, PLAIN, Loose, only, operators, put, same
from tests.rewriting import parse

KEYS = {
    "graphopt", "input", "output", "target", "precision", "nodes", "parameter_bytes", "passes", "verification",
    "remarks",
}  # fmt: skip
WEIGHTS = """g (float[N,512] x) => (float[N,512] y) <float[512] v, float[512] w> {
    a = Identity(x)  b = Add(a, v)  c = Relu(b)  y = Mul(c, w) }"""
ONE = {"x": np.ones((3, 4), np.float32)}


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A path that is neither str nor Path."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)


def sources(path: Path) -> dict[str, Any]:
    text = path.with_name("source.onnxtxt")
    text.write_text(HEAD + PLAIN)
    return {
        "path": path,
        "str": str(path),
        "PathLike": Elsewhere(path),
        "text file": text,
        "text": HEAD + PLAIN,
        "bytes": path.read_bytes(),
        "ModelProto": onnx.load(path),
        "ir.Model": ir.load(path),
        "our ir.Model": load_model(path),
    }


@pytest.mark.parametrize("kind", [
    "path", "str", "PathLike", "text file", "text", "bytes", "ModelProto", "ir.Model", "our ir.Model",
])  # fmt: skip
def test_every_kind_of_source(kind: str, source: Path, out: Path) -> None:
    result = optimize(sources(source)[kind], output=out)
    assert result.path == out
    assert result.report.verification.passed is True
    assert operators(out) == operators(result.model) == ["Abs", "Exp", "Neg"]
    same(source, out, ONE)


def test_a_model_in_memory_is_left_as_it_was(source: Path) -> None:
    model = ir.load(source)
    proto = onnx.load(source)
    before = proto.SerializeToString()
    optimize(model)
    optimize(proto)
    assert operators(model) == ["Abs", "Identity", "Exp", "Neg"]
    assert proto.SerializeToString() == before


def test_without_output_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = optimize(source)
    assert sorted(tmp_path.rglob("*")) == before
    assert result.path is None
    (saved,) = result.save(tmp_path / "saved.onnx")
    same(source, saved, ONE)


@pytest.mark.parametrize(("external", "names"), [
    ("auto", ["out.onnx"]),
    ("never", ["out.onnx"]),
    ("single", ["out.onnx", "out.onnx.data"]),
    ("per-tensor", ["out.onnx", "out.onnx.data.00000", "out.onnx.data.00001"]),
])  # fmt: skip
def test_weights_lie_where_they_were_asked_for(
    external: str, names: list[str], tmp_path: Path, out: Path
) -> None:
    source = put(tmp_path / "m.onnx", WEIGHTS)
    result = optimize(source, output=out, external=external)
    assert sorted(path.name for path in out.parent.iterdir()) == names
    assert result.report.output.size_bytes == sum(p.stat().st_size for p in out.parent.iterdir())
    again = tmp_path / "again"
    again.mkdir()
    saved = result.save(again / "out.onnx", external=external)
    assert sorted(path.name for path in saved) == names
    for name in names:
        assert (again / name).read_bytes() == (out.parent / name).read_bytes()


@pytest.mark.parametrize("external", ["auto", "single", "per-tensor"])
def test_the_output_may_be_the_source(external: str, tmp_path: Path) -> None:
    source = put(tmp_path / "m.onnx", WEIGHTS)
    before = source.with_name("before.onnx")
    before.write_bytes(source.read_bytes())
    for _ in range(3):  # the second time, the weights come from the files that are replaced
        assert optimize(source, output=source, external=external).report.verification.passed
    assert operators(source) == ["Add", "Relu", "Mul"]
    np.testing.assert_array_equal(
        helper.to_array(onnx.load(source).graph.initializer[0]),
        helper.to_array(onnx.load(before).graph.initializer[0]),
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_an_interruption_between_two_renames_brings_back_what_was_there(
    stop: BaseException, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = put(tmp_path / "m.onnx", WEIGHTS)
    held = {"out.onnx": b"the old model", "out.onnx.data": b"the old weights"}
    for name, content in held.items():
        (out.parent / name).write_bytes(content)
    rename = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if Path(target) == out:
            raise stop
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises((KeyboardInterrupt, OptionError)):
        optimize(source, output=out, external="single")
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == held


def test_two_runs_give_the_same_bytes(tmp_path: Path, out: Path) -> None:
    source = put(tmp_path / "m.onnx", WEIGHTS)
    first = optimize(source, output=out, external="single")
    held = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    second = optimize(source, output=out, external="single")
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == held

    def lasting(report: graphopt.RunReport) -> dict[str, Any]:
        body: dict[str, Any] = report.to_json()
        body["seconds"] = None
        body["passes"] = [{**run, "seconds": None} for run in body["passes"]]
        return body

    assert lasting(first.report) == lasting(second.report)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, DataError])
def test_an_interrupted_run_leaves_nothing_behind(
    stop: type[BaseException], source: Path, out: Path
) -> None:
    def interrupt(_model: ir.Model, _ctx: Context) -> None:
        raise stop

    out.write_bytes(b"what was there")
    with pytest.raises(stop):
        optimize(source, output=out, passes=[Loose("loose", interrupt)])
    assert list(out.parent.iterdir()) == [out]
    assert out.read_bytes() == b"what was there"


def test_an_interrupted_verification_leaves_nothing_behind(source: Path, out: Path) -> None:
    stages: list[str] = []

    def progress(stage: str, _part: float | None) -> None:
        stages.append(stage)
        if stage == "reference":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(source, output=out, progress=progress)
    assert stages[0] == "load"
    assert not list(out.parent.iterdir())


def test_the_report_has_the_documented_keys(source: Path, out: Path) -> None:
    body = optimize(source, output=out).report.to_json()
    assert set(body) >= KEYS
    assert body["nodes"] == {"before": 4, "after": 3}
    assert all(
        set(run) == {"name", "changed", "rewrites", "seconds", "nodes_after"}
        for run in body["passes"]
    )
    (output,) = body["verification"]["outputs"]
    assert set(output) >= {
        "name", "max_abs", "max_over_rms", "sqnr_db", "cosine", "nonfinite_equal", "passed",
    }  # fmt: skip


def test_without_verification_nothing_is_compared(source: Path, out: Path) -> None:
    result = optimize(source, output=out, verify="off")
    verification = result.report.verification
    assert (verification.mode, verification.passed) == ("off", None)
    assert verification.reason == "not asked for"
    assert operators(optimize(source, verify="off").model) == ["Abs", "Exp", "Neg"]


def test_what_no_runtime_here_knows_is_unverified(tmp_path: Path, out: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "house" : 1]>
    g (float[4] x) => (float[4] y) { a = Identity(x)  y = house.Special(a) }"""
    verification = optimize(put(tmp_path / "m.onnx", text), output=out).report.verification
    assert verification.passed is None
    assert "Special" in verification.reason
    assert operators(out) == ["Special"]


@pytest.mark.parametrize(("opset", "version"), [(99, 10), (18, 99)], ids=["opset", "IR"])
def test_an_original_too_new_for_the_reference_runs_under_what_it_takes(
    opset: int, version: int, out: Path, tmp_path: Path
) -> None:
    proto = parse(PLAIN)
    newest = onnx.defs.onnx_opset_version()
    proto.opset_import[0].version = min(opset, newest)
    proto.ir_version = min(version, onnx.IR_VERSION)
    onnx.save(proto, tmp_path / "m.onnx")
    result = optimize(tmp_path / "m.onnx", output=out)
    target = get_target("cpu")
    beyond = (
        proto.opset_import[0].version > target.opset[1] or proto.ir_version > target.ir_version[1]
    )
    assert result.report.verification.passed is True
    assert ("does not take the original's opset" in result.report.verification.reason) == beyond
    assert onnx.load(out).opset_import[0].version <= target.opset[1]


def test_inputs_of_the_user_by_path_and_as_feeds(source: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **ONE)  # type: ignore[arg-type]
    for given in (tmp_path / "in.npz", str(tmp_path / "in.npz"), [ONE]):
        verification = optimize(source, inputs=given).report.verification
        assert (verification.passed, verification.feeds) == (True, 1)


@pytest.mark.parametrize(
    "feed",
    [
        {"x": np.ones((3, 4), np.float64)},
        {"x": np.ones((3, 5), np.float32)},
        {"z": np.ones((3, 4), np.float32)},
        {},
    ],
    ids=["dtype", "shape", "name", "missing"],
)
def test_inputs_that_do_not_fit_are_refused(feed: dict[str, Any], source: Path, out: Path) -> None:
    with pytest.raises(DataError):
        optimize(source, output=out, inputs=[feed])
    assert not list(out.parent.iterdir())


def test_a_recipe_by_path_or_as_such(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'pipeline = ["remove-dead-code"]\nverify = "off"\nseed = 7\ntarget = "portable"'
    )
    for recipe in (path, str(path), Recipe.load(path)):
        report = optimize(source, recipe=recipe).report
        assert (report.target, report.seed, report.verification.mode) == ("portable", 7, "off")
        assert {run.name for run in report.passes} == {"remove-dead-code"}
    said = optimize(source, recipe=path, seed=8, verify="final", target="cpu").report
    assert (said.target, said.seed, said.verification.mode) == ("cpu", 8, "final")
    assert said.recipe == str(path)


def test_passes_and_rules_can_be_left_out(source: Path) -> None:
    without_rule = optimize(source, disable=["tidy/drop-identity"])
    assert "Identity" in operators(without_rule.model)
    without_pass = optimize(source, disable=["tidy"])
    assert "Identity" in operators(without_pass.model)
    assert not any(run.rewrites for run in without_pass.report.passes if run.name == "tidy")


def test_frozen_defaults_are_agreed_to_and_reported(tmp_path: Path, out: Path) -> None:
    text = (
        "g (float[4] x, float[4] w) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) }"
    )
    source = put(tmp_path / "m.onnx", text)
    kept = optimize(source, output=out)
    assert [value.name for value in kept.model.graph.inputs] == ["x", "w"]
    assert "--freeze-defaults" in kept.report.remarks[0].reason
    frozen = optimize(source, output=out, freeze_defaults=True)
    assert [info.name for info in onnx.load(out).graph.input] == ["x"]
    assert frozen.report.verification.passed is True
    assert "1 overridable defaults became constants: w" in frozen.report.verification.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "fnal"}, r"unknown verify mode 'fnal' \(did you mean 'final'\?\); choose one of final, each, off"),
        ({"precision": "fp33"}, "unknown precision 'fp33'"),
        ({"external": "besides"}, "unknown place for weights 'besides'; choose one of auto, never, single, per-tensor"),
        ({"target": "cpus"}, "cpus"),
        ({"disable": ["tidi"]}, r"no pass 'tidi' in the pipeline \(did you mean 'tidy'\?\); there are: "),
        ({"disable": ["tidy/drop-idendity"]}, r"no rule 'drop-idendity' in pass tidy \(did you mean 'drop-identity'"),
        ({"passes": ["nothing-like-it"]}, "nothing-like-it"),
        ({"recipe": "nowhere.toml"}, "recipe nowhere.toml cannot be read"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used(
    options: dict[str, Any], message: str, source: Path, out: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        optimize(source, output=out, **options)
    assert not list(out.parent.iterdir())


def test_a_model_that_cannot_be_read_is_refused_before_anything_is_written(out: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        optimize("nowhere.onnx", output=out)
    assert not list(out.parent.iterdir())


def test_what_the_target_cannot_take_is_refused(tmp_path: Path, out: Path) -> None:
    text = "g (float[2,4] x, float[4] s) => (float[2,4] y) { y = LayerNormalization(x, s) }"
    tight = dataclasses.replace(get_target("cpu"), opset=(6, 16), name="tight")
    with pytest.raises(
        TargetError, match=r"opset 18, target tight takes 6 to 16.*LayerNormalization"
    ):
        optimize(put(tmp_path / "m.onnx", text), output=out, target=tight)
    assert not list(out.parent.iterdir())


def test_outputs_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="mkdir -p"):
        optimize(source, output=tmp_path / "no" / "out.onnx")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OptionError, match="no permission to write"):
        optimize(source, output=locked / "out.onnx")


def test_results_refuse_unknown_places_for_weights(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown place for weights 'sideways'"):
        optimize(source).save(tmp_path / "m.onnx", external="sideways")
    with pytest.raises(OptionError):
        optimize(source).save(tmp_path / "no" / "m.onnx")


def test_calibration_reaches_the_passes(source: Path, tmp_path: Path) -> None:
    seen: list[Calibration | None] = []
    loose = Loose("loose", lambda _model, ctx: seen.append(ctx.options.calibration))
    given = Calibration([ONE])
    for calibration in (None, given, [ONE], tmp_path, str(tmp_path)):
        optimize(source, recipe=only(loose), calibration=calibration, verify="off")
    assert seen == [None, given, Calibration([ONE]), Calibration(tmp_path), Calibration(tmp_path)]


def test_the_pipeline_sees_the_options(source: Path) -> None:
    seen: list[Any] = []
    loose = Loose("loose", lambda _model, ctx: seen.append(ctx.options))
    optimize(
        source, recipe=only(loose), verify="off", seed=3, fold_limit_bytes=5, budget="sqnr>=30", sparsity="0.5",
        force=True, remarks=True,
    )  # fmt: skip
    (options,) = seen
    assert (options.seed, options.fold_limit_bytes, options.trace_misses) == (3, 5, True)
    assert (options.budget, options.sparsity, options.force) == ("sqnr>=30", "0.5", True)


@pytest.mark.slow
def test_more_than_protobuf_holds(tmp_path: Path, out: Path) -> None:
    """Over 2 GiB in and out; the weights are zeros in a sparse file, so that the disk holds them."""
    source = tmp_path / "big.onnx"
    rows, columns = 1 << 15, (1 << 14) + 1
    proto = parse("g (int64[N] x) => (float[N,16385] y) { i = Identity(x)  y = Gather(w, i) }")
    weight = proto.graph.initializer.add(
        name="w", data_type=onnx.TensorProto.FLOAT, dims=[rows, columns]
    )
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="big.data")
    source.write_bytes(proto.SerializeToString())
    with (tmp_path / "big.data").open("wb") as data:
        data.truncate(rows * columns * 4)
    feeds = [{"x": np.array([0, 5], np.int64)}]
    result = optimize(source, output=out, inputs=feeds, disable=["merge-duplicate-constants"])
    assert result.report.verification.passed is True
    assert out.stat().st_size < 1 << 20
    assert out.with_name("out.onnx.data").stat().st_size >= 1 << 31
    assert operators_only(out) == ["Gather"]
    with pytest.raises(OptionError, match="more than protobuf's 2 GiB"):
        optimize(source, output=out, inputs=feeds, external="never", verify="off")


def operators_only(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def test_a_result_saved_into_a_folder_is_called_model(source: Path, tmp_path: Path) -> None:
    written = optimize(source).save(tmp_path)
    assert written == (tmp_path / "model.onnx",)
    assert operators(written[0])


def test_a_folder_named_like_a_file_is_no_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(OptionError, match=r"folder whose name ends in \.onnx; name a file in it"):
        graphopt.optimize(source, output=tmp_path / "folder.onnx")
    assert list((tmp_path / "folder.onnx").iterdir()) == []


def test_a_folder_in_which_nothing_may_be_written_is_no_place(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OptionError, match=r"cannot write .*no permission to write in"):
        graphopt.optimize(source, output=out)


def test_a_bundle_that_cannot_take_its_place_leaves_the_old_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, original = tmp_path / "bundle", Path.rename
    graphopt.optimize(source, output=bundle)
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    def rename(self: Path, target: Path) -> Path:
        if self.name == "bundle" and target == bundle:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((OSError, OptionError), match="Input/output error"):
        graphopt.optimize(source, output=bundle, target="portable")
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_sparse_weights_in_a_form_that_there_is_not(source: Path, out: Path) -> None:
    with pytest.raises(OptionError, match="unknown form of sparse weights 'csr'"):
        graphopt.optimize(source, output=out, sparse="csr")
    assert graphopt.optimize(source, output=out, sparse="dense").path == out
