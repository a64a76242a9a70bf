"""[specialize] in a recipe: what it asks for, what goes before it, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt.errors import OptionError
from graphopt.specialize import Image, Specialization, from_table, over
from tests.rewriting import parse

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 3, 4, 4] x, float[3] mask) => (float[batch, 3, 4, 4] y, float[batch, 3, 4, 4] z)
<float[3,3,1,1] w> { y = Conv(x, w)  s = ReduceSum<keepdims = 0>(mask)  z = Mul(y, s) }"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(parse(MODEL), path)
    return path


def test_a_recipe_specialises(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.asarray([1, 0, 1], np.float32))
    recipe = tmp_path / "use.toml"
    recipe.write_text(
        """
        [specialize]
        dims = {batch = 2}
        bind = {mask = "mask.npy"}
        outputs = ["z"]
        dtypes = {z = "float16"}
        rename = {x = "image"}
        [specialize.images]
        x = {layout = "NHWC", model_layout = "NCHW", scale = 255, mean = [0.5], std = [0.25]}
        """
    )
    result = graphopt.optimize(model, recipe=recipe)
    graph = result.model.graph
    assert [(v.name, v.dtype.name, list(v.shape or ())) for v in graph.inputs if v.dtype] == [
        ("image", "UINT8", [2, 4, 4, 3])
    ]
    assert [v.name for v in graph.outputs] == ["z"]
    assert "computes what the original does" in result.report.specialized[-1]


def test_options_go_before_the_recipe(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "use.toml"
    recipe.write_text('[specialize]\ndims = {batch = 2}\nrename = {x = "image"}\n')
    given = Specialization(dims={"batch": 5})
    graph = graphopt.optimize(model, recipe=recipe, specialize=given).model.graph
    assert next((v.name, list(v.shape or ())) for v in graph.inputs) == ("image", [5, 3, 4, 4])


def test_profiles_and_extras_of_a_recipe(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "use.toml"
    recipe.write_text('target = "tensorrt"\nextras = ["triton"]\n[profiles]\nbatch = [1, 4, 8]\n')
    graphopt.optimize(model, recipe=recipe, output=tmp_path / "deploy")
    assert "--maxShapes=x:8x3x4x4" in (tmp_path / "deploy" / "build.sh").read_text()
    assert (tmp_path / "deploy" / "triton" / "model" / "config.pbtxt").is_file()


def test_images_in_words_and_as_tables() -> None:
    words = from_table({"images": {"x": "nhwc,scale=255,bgr"}}, "recipe")
    table = from_table({"images": {"x": {"scale": 255, "channels": "BGR"}}}, "recipe")
    assert words == table
    assert table.images["x"] == Image(scale=255, channels="BGR")


def test_what_is_said_second_goes_before() -> None:
    first = Specialization(dims={"a": 1, "b": 2}, outputs=("y",))
    assert over(first, Specialization(dims={"b": 3})).dims == {"a": 1, "b": 3}
    assert over(first, Specialization()).outputs == ("y",)
    assert over(first, Specialization(outputs=("z",))).outputs == ("z",)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"dim": {"batch": 1}}, "unknown field `dim`"),
        ({"dims": {"batch": "one"}}, "Expected `int`"),
        ({"outputs": "y"}, "Expected `array`"),
        ({"images": {"x": {"layout": "NHWC", "gain": 2}}}, "unknown field `gain`"),
        ({"images": {"x": {"layout": "HWC"}}}, "layouts are NCHW and NHWC"),
        ({"bind": {"mask": "nowhere.npy"}}, "nowhere.npy: cannot be read"),
    ],
)
def test_mistakes_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        from_table(table, "recipe use.toml")


def test_sizes_of_a_profile_must_rise(model: Path) -> None:
    with pytest.raises(OptionError, match="sizes must rise"):
        graphopt.optimize(model, profiles={"batch": (4, 2, 8)})
