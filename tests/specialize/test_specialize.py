"""Specialised models: what changes at the boundary, verified against the original by the corresponding transform."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import graphopt
from graphopt import Image, Specialization
from graphopt.driver.specialized import Special, compare_with_original
from graphopt.errors import OptionError, VerifyError
from graphopt.ir.model_file import load_model, save_model
from graphopt.report.facts import model_facts
from graphopt.runtime.session import Session
from graphopt.runtime.specs import input_specs, output_specs
from graphopt.specialize import specialize
from graphopt.specialize.wanted import from_texts, parse_dtype
from graphopt.verify.verifier import ReferenceRun

SCORES = """
<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 3, h, w] x, float[batch, 4] bias) => (float[batch, 4] scores, int64[batch] best) {
    filters = Constant<value = float[4, 3, 1, 1] {1, 2, 3, -1, 0.5, 1, 0, 1, 2, 3, -2, 1}>()
    y = Conv(x, filters)
    pooled = GlobalAveragePool(y)
    flat = Flatten(pooled)
    logits = Add(flat, bias)
    scores = Softmax(logits)
    best = ArgMax<axis = 1, keepdims = 0>(logits)
}
"""
HALVING = """
<ir_version: 8, opset_import: ["": 17]>
g (float[2, 2] x, bool flag) => (float[2, 2] y) {
    y = If (flag) <
        then_branch = yes () => (float[2, 2] a) { two = Constant<value = float {2.0}>()  a = Div(x, two) },
        else_branch = no () => (float[2, 2] b) { b = Neg(x) }
    >
}
"""


def made(text: str, wanted: Specialization, **options: Any) -> graphopt.Result:
    return graphopt.optimize(onnx.parser.parse_model(text), specialize=wanted, **options)


def run(result: graphopt.Result, folder: Path, feed: Mapping[str, Any]) -> dict[str, Any]:
    (path,) = result.save(folder / "made.onnx")
    return Session(path).run(feed)


def original(folder: Path, text: str, feed: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / "original.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return Session(path).run(feed)


def feed_of(batch: int = 2, size: int = 4) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        "x": draw.standard_normal((batch, 3, size, size)).astype(np.float32),
        "bias": draw.standard_normal((batch, 4)).astype(np.float32),
    }


def test_sizes_are_fixed_wherever_the_dimension_stands() -> None:
    result = made(SCORES, Specialization(dims={"batch": 2, "x:2": 8}))
    shapes = {spec.name: spec.shape for spec in input_specs(result.model)}
    assert shapes == {"x": (2, 3, 8, "w"), "bias": (2, 4)}
    assert [spec.shape for spec in output_specs(result.model)] == [(2, 4), (2,)]
    assert result.report.specialized[:2] == ("dimension batch = 2", "dimension x:2 = 8")
    assert "bit for bit" in result.report.specialized[-1]


def test_unnamed_dimensions_are_fixed_one_by_one() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[?, ?] x) => (float[?, ?] y) {y = Exp(x)}'
    )
    result = made(text, Specialization(dims={"x:1": 5}))
    assert [spec.shape for spec in input_specs(result.model)] == [(None, 5)]


def test_a_bound_input_is_gone_and_fixes_what_it_shares(tmp_path: Path) -> None:
    feed = feed_of()
    result = made(SCORES, Specialization(bind={"bias": feed["bias"]}))
    assert [(s.name, s.shape) for s in input_specs(result.model)] == [("x", (2, 3, "h", "w"))]
    seen = run(result, tmp_path, {"x": feed["x"]})
    np.testing.assert_allclose(seen["scores"], original(tmp_path, SCORES, feed)["scores"], 1e-6)


def test_one_number_fills_a_bound_input_of_known_size() -> None:
    result = made(SCORES, Specialization(dims={"batch": 2}, bind={"bias": 0}))
    assert [s.name for s in input_specs(result.model)] == ["x"]


def test_a_bound_condition_leaves_one_branch() -> None:
    result = made(HALVING, Specialization(bind={"flag": True}))
    assert "If" not in result.report.output.operators


def test_a_bound_input_that_is_an_output_stays_one(tmp_path: Path) -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[2] z) => (float[2] y, float[2] z) '
        "{y = Add(x, z)}"
    )
    result = made(text, Specialization(bind={"z": [1.0, 2.0]}))
    seen = run(result, tmp_path, {"x": np.zeros(2, np.float32)})
    assert seen["z"].tolist() == [1.0, 2.0]


def test_a_default_is_bound_too() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[2] z) => (float[2] y) '
        "<float[2] z = {1, 2}> {y = Add(x, z)}"
    )
    result = made(text, Specialization(bind={"z": [3.0, 4.0]}))
    assert [s.name for s in input_specs(result.model)] == ["x"]


def test_texts_are_bound() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, string[1] s) => (float[2] y, string[1] t) '
        "{y = Neg(x) t = Identity(s)}"
    )
    model = load_model(onnx.parser.parse_model(text))
    specialize(model, Specialization(bind={"s": ["a"]}))
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_outputs_are_dropped_and_cut_before_the_tail(tmp_path: Path) -> None:
    result = made(SCORES, Specialization(outputs=("logits",)))
    assert [spec.name for spec in output_specs(result.model)] == ["logits"]
    assert not {"Softmax", "ArgMax"} & set(result.report.output.operators)
    feed = feed_of()
    scores = original(tmp_path, SCORES, feed)["scores"]
    exp = np.exp(run(result, tmp_path, feed)["logits"])
    np.testing.assert_allclose(exp / exp.sum(1, keepdims=True), scores, 1e-5)


def test_outputs_come_in_the_order_asked_for() -> None:
    result = made(SCORES, Specialization(outputs=("best", "scores")))
    assert [spec.name for spec in output_specs(result.model)] == ["best", "scores"]


def test_names_are_changed_and_swapped() -> None:
    wanted = Specialization(rename={"x": "logits", "scores": "best", "best": "scores"})
    result = made(SCORES, wanted)
    assert [s.name for s in input_specs(result.model)] == ["logits", "bias"]
    assert [s.name for s in output_specs(result.model)] == ["best", "scores"]
    assert result.report.verification.passed


def test_types_are_changed_at_the_boundary_alone(tmp_path: Path) -> None:
    wanted = Specialization(dtypes={"x": "float16", "scores": "float16", "best": "int32"})
    result = made(SCORES, wanted)
    feed = feed_of()
    halves = {**feed, "x": feed["x"].astype(np.float16)}
    seen = run(result, tmp_path, halves)
    assert [seen[name].dtype.name for name in ("scores", "best")] == ["float16", "int32"]
    wide = original(tmp_path, SCORES, {**feed, "x": halves["x"].astype(np.float32)})
    np.testing.assert_allclose(seen["scores"], wide["scores"].astype(np.float16), 2e-3)


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_layouts_are_changed_at_the_boundary(tmp_path: Path, rank: int) -> None:
    dims = ", ".join(["2", "3", "4", "5", "6"][:rank])
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[{dims}] x) => (float[{dims}] y) {{ y = Softmax<axis = 1>(x) }}
    """
    result = made(text, Specialization(layouts={"x": "NHWC", "y": "NHWC"}))
    shape = (2, 3, 4, 5, 6)[:rank]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    axis = 0 if rank == 3 else 1
    seen = run(result, tmp_path, {"x": np.ascontiguousarray(np.moveaxis(x, axis, -1))})["y"]
    expected = original(tmp_path, text, {"x": x})["y"]
    np.testing.assert_allclose(np.moveaxis(seen, -1, axis), expected, 1e-6)
    back = graphopt.optimize(result.model, specialize=Specialization(layouts={"x": "NCHW"}))
    assert [s.shape for s in input_specs(back.model)] == [shape]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_images_are_scaled_in_the_model(tmp_path: Path, layout: str) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    image = Image(layout, 255, mean, std, "BGR")
    result = made(SCORES, Specialization(images={"x": image}))
    pixels = np.random.default_rng(2).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    ordered = pixels[..., ::-1].astype(np.float64)
    scaled = ((ordered / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    given = pixels if layout == "NHWC" else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    bias = feed_of()["bias"]
    seen = run(result, tmp_path, {"x": given, "bias": bias})["scores"]
    expected = original(tmp_path, SCORES, {"x": np.ascontiguousarray(scaled), "bias": bias})
    np.testing.assert_allclose(seen, expected["scores"], 1e-5)


def test_scaling_goes_into_the_first_convolution() -> None:
    """Nothing is padded, so that both the product and the sum do."""
    result = made(SCORES, Specialization(images={"x": Image("NCHW", 255, (0.5,), (0.25,))}))
    assert not {"Mul", "Sub"} & set(result.report.output.operators)


def test_images_for_a_half_are_scaled_in_float32(tmp_path: Path) -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        g (float16[1, 2, 2, 3] x) => (float16[1, 2, 2, 3] y) { y = Relu(x) }
    """
    result = made(text, Specialization(images={"x": Image(scale=255, mean=(0.5,))}))
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3) * 20
    expected = np.maximum(pixels / 255 - 0.5, 0).astype(np.float16)
    np.testing.assert_array_equal(run(result, tmp_path, {"x": pixels})["y"], expected)


def test_everything_at_once_from_texts() -> None:
    wanted = from_texts(
        dims=["batch=1", "h=8"],
        bind=["bias=[[0, 1, 2, 3]]"],
        outputs=["logits,best"],
        dtypes=["best=int32"],
        images=["x=nhwc,uint8,scale=255,mean=0.5:0.5:0.5,std=0.25"],
        rename=["x=image"],
    )
    result = made(SCORES, wanted)
    assert [(s.name, s.shape) for s in input_specs(result.model)] == [("image", (1, 8, "w", 3))]
    assert [s.name for s in output_specs(result.model)] == ["logits", "best"]
    assert len(result.report.specialized) == 8
    assert result.report.input.nodes == 7


@pytest.mark.parametrize("mean", ["[0.5]", "0.5"])
def test_a_preprocessing_file_says_how_images_are_scaled(tmp_path: Path, mean: str) -> None:
    path = tmp_path / "prep.toml"
    path.write_text(f'scale = 255\nmean = {mean}\nlayout = "NCHW"\nchannels = "BGR"\n')
    wanted = from_texts(images=[f"x={path},nchw"])
    assert wanted.images["x"] == Image("NCHW", 255, (0.5,), (1.0,), "BGR", "NCHW")


def test_arrays_are_read_from_files(tmp_path: Path) -> None:
    array = np.arange(4, dtype=np.float32)
    np.save(tmp_path / "a.npy", array)
    (tmp_path / "a.pb").write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
    wanted = from_texts(bind=[f"a={tmp_path / 'a.npy'}", f"b={tmp_path / 'a.pb'}"])
    assert all(np.array_equal(value, array) for value in wanted.bind.values())
    assert wanted.sentences()[0] == "input a = [0.0, 1.0, 2.0, 3.0]"


def test_nothing_is_compared_where_that_is_not_asked_for() -> None:
    result = made(SCORES, Specialization(dims={"batch": 1}), verify="off")
    assert result.report.specialized[-1] == "not compared with the original: not asked for"


def test_a_wrong_specialisation_is_found(tmp_path: Path) -> None:
    """The original is another model than the one that was specialised."""
    model = load_model(onnx.parser.parse_model(HALVING))
    plan = specialize(model, Specialization(bind={"flag": True}))
    (file,) = save_model(model, tmp_path / "special.onnx")
    other = onnx.parser.parse_model(HALVING.replace("{2.0}", "{2.5}"))
    special = Special(other, plan, model_facts(model))
    with pytest.raises(VerifyError, match="does not compute what the original does: output 'y'"):
        compare_with_original(special, ReferenceRun(file), tmp_path)


SPLIT = """
<ir_version: 8, opset_import: ["": 17]>
g (float[n, 6] x) => (float[2, 6] y) { s = Constant<value_ints = [2, 6]>()  y = Reshape(x, s) }
"""


def test_sizes_that_the_model_cannot_run_with_are_refused() -> None:
    with pytest.raises(VerifyError, match="does not run, though the original does"):
        made(SPLIT, Specialization(dims={"n": 3}))


def test_an_original_that_runs_nowhere_is_said_not_to_be_compared() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[n] x) => (float[n] y) { y = my.Op(x) }
    """
    result = made(text, Specialization(dims={"n": 3}))
    assert "not compared with the original" in result.report.specialized[-1]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Specialization(dims={"batc": 1}), "did you mean 'batch'"),
        (Specialization(dims={"batch": 0}), "at least 1"),
        (Specialization(dims={"x:1": 4}), "is 3 and shall be 4"),
        (Specialization(dims={"batch": 1, "bias:0": 2}), "is 1 and shall be 2"),
        (Specialization(bind={"y": 1}), "no such input"),
        (Specialization(bind={"bias": 1}), "cannot fill"),
        (Specialization(bind={"bias": [1, 2]}), "has shape \\[2\\], the input"),
        (Specialization(bind={"bias": "one"}), "is no array of FLOAT"),
        (Specialization(dims={"batch": 3}, bind={"bias": [[1, 2, 3, 4]]}), "has shape"),
        (Specialization(outputs=("logit",)), "did you mean 'logits'"),
        (Specialization(outputs=("best", "best")), "named twice"),
        (Specialization(rename={"z": "a"}), "no such input or output"),
        (Specialization(rename={"x": "bias"}), "would be called 'bias'"),
        (Specialization(dtypes={"scores": "int8"}), "lose its fractions"),
        (Specialization(dtypes={"x": "float15"}), "no such element type"),
        (Specialization(layouts={"bias": "NHWC"}), "layouts are of 3"),
        (Specialization(layouts={"x": "HWNC"}), "give NHWC or NCHW"),
        (Specialization(images={"bias": Image()}), "images have 4 dimensions"),
        (Specialization(images={"scores": Image()}), "no such input"),
        (Specialization(images={"x": Image(mean=(1.0, 2.0))}), "for 3 channels"),
        (Specialization(images={"x": Image()}, dtypes={"x": "int8"}), "leave out --io-dtype"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(wanted: Specialization, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        made(SCORES, wanted)


GREY = '<ir_version: 8, opset_import: ["": 17]> g ({0}) => (float[?] y) {{ y = {1} }}'


@pytest.mark.parametrize(
    ("text", "wanted", "words"),
    [
        (
            GREY.format("float[1, 1, 8, 1] x", "Flatten(x)"),
            Specialization(images={"x": Image()}),
            "may be NCHW or NHWC",
        ),
        (
            GREY.format("float[1, 1, 8, 8] x", "Flatten(x)"),
            Specialization(images={"x": Image(channels="BGR")}),
            "1 channels have no order",
        ),
        (
            GREY.format("int64[1, 1, 8, 8] x", "Cast<to = 1>(x)"),
            Specialization(images={"x": Image()}),
            "images scale to floats",
        ),
        (
            GREY.format("seq(float[1]) x", "ConcatFromSequence<axis = 0>(x)"),
            Specialization(bind={"x": 1}),
            "only tensors can be bound",
        ),
        (
            GREY.format("seq(float[1]) x", "ConcatFromSequence<axis = 0>(x)"),
            Specialization(dtypes={"x": "float16"}),
            "only tensors change type",
        ),
        (
            GREY.format("int64[2] x", "Cast<to = 1>(x)"),
            Specialization(bind={"x": [1.5, 2]}),
            "cannot be written in INT64",
        ),
    ],
)
def test_inputs_of_other_kinds_are_refused(text: str, wanted: Specialization, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        made(text, wanted, verify="off")


def test_a_default_keeps_its_type() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[2] z) => (float[2] y) '
        "<float[2] z = {1, 2}> {y = Add(x, z)}"
    )
    with pytest.raises(OptionError, match="has a default value"):
        made(text, Specialization(dtypes={"z": "float16"}))


def test_an_output_of_unknown_type_cannot_be_chosen() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[2] x) => (float[2] y) { inner = my.Op(x)  y = my.Op(inner) }
    """
    with pytest.raises(OptionError, match="its type is not known"):
        made(text, Specialization(outputs=("inner",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dims": ["batch"]}, "give NAME=VALUE"),
        ({"dims": ["batch=x"]}, "whole number"),
        ({"dims": ["batch=1", "batch=2"]}, "give it once"),
        ({"bind": ["a=nan,"]}, "give a number"),
        ({"bind": ["a=none.npy"]}, "cannot be read as an array"),
        ({"images": ["x=hwc"]}, "is none of nhwc"),
        ({"images": ["x=mean=a:b"]}, "numbers with colons"),
        ({"images": ["x=scale=0"]}, "none may be zero"),
    ],
)
def test_texts_of_another_form_are_refused(options: dict[str, list[str]], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        from_texts(**options)


def test_an_image_needs_known_words() -> None:
    with pytest.raises(OptionError, match="layouts are NCHW and NHWC"):
        Image("HWC")
    with pytest.raises(OptionError, match="give RGB or BGR"):
        Image(channels="GBR")


def test_grey_preprocessing_has_no_order(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('channels = "L"\n')
    with pytest.raises(OptionError, match="grey images"):
        from_texts(images=[f"x={tmp_path / 'p.toml'}"])


def test_element_types_go_by_their_usual_names() -> None:
    assert parse_dtype("x", "float32").name == "FLOAT"
    assert parse_dtype("x", "uint8").name == "UINT8"
