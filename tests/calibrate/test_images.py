"""Folders of images: what is found in them, how they are grouped, and what a preprocessing file may say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.calibrate.samples import read_samples
from graphopt.calibrate.screening import Screening
from graphopt.errors import DataError, OptionError
from graphopt.rewrite import Calibration
from graphopt.runtime.specs import TensorSpec
from graphopt.verify.feed_files import Feed

F32 = ir.DataType.FLOAT
SQUARE = TensorSpec("x", F32, (1, 3, 4, 4))


def folder(tmp_path: Path, *names: str, recipe: str = "resize = [4, 4]") -> Calibration:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    for level, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((4, 4, 3), 10 * level, np.uint8)).save(path)
    (tmp_path / "pre.toml").write_text(recipe)
    return Calibration(tmp_path / "images", tmp_path / "pre.toml")


def feeds(given: Calibration, *specs: TensorSpec) -> list[Feed]:
    return list(read_samples(given, specs or (SQUARE,)))


def test_folders_within_are_read_in_natural_order(tmp_path: Path) -> None:
    given = folder(tmp_path, "b/2.png", "b/10.png", "a/3.png")
    found = [str(Path(feed.name).relative_to(tmp_path / "images")) for feed in feeds(given)]
    assert found == [str(Path(name)) for name in ("a/3.png", "b/2.png", "b/10.png")]


def test_hidden_files_and_others_are_none(tmp_path: Path) -> None:
    given = folder(tmp_path, "a.png", ".trash/b.png")
    (tmp_path / "images" / "._a.png").write_bytes(b"\0\5")
    (tmp_path / "images" / "labels.csv").write_text("a,1")
    (tmp_path / "images" / "c.png").mkdir()
    assert len(feeds(given)) == 1


def test_arrays_beside_a_picture_are_the_samples(tmp_path: Path) -> None:
    given = folder(tmp_path, "preview.png", recipe="")
    np.savez(tmp_path / "images" / "a.npz", x=np.ones((2, 3, 4, 4), np.float32))
    assert len(feeds(Calibration(given.source))) == 2
    with pytest.raises(DataError, match=r"preview\.png.* must be float\[1,3,8,8\]"):
        feeds(given, TensorSpec("x", F32, (1, 3, 8, 8)))


def test_a_recipe_for_images_without_any_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((1, 3, 4, 4), np.float32))
    (tmp_path / "pre.toml").write_text("resize = 4")
    with pytest.raises(OptionError, match=r"--preprocess '.*pre.toml' says .* holds none"):
        feeds(Calibration(tmp_path / "a.npz", tmp_path / "pre.toml"))


def test_as_many_as_the_model_takes(tmp_path: Path) -> None:
    given = folder(tmp_path, "1.png", "2.png", "3.png")
    pair = TensorSpec("x", F32, (2, 3, 4, 4))
    screening = Screening()
    (found,) = screening.of(read_samples(given, (pair,)))
    assert found.values["x"][:, 0, 0, 0].tolist() == [0, 10]
    assert screening.told() == ("the last 1 of 3 images are left out: the model takes 2 at a time",)
    with pytest.raises(DataError, match=r"takes 4 images at a time .* there are 3"):
        feeds(given, TensorSpec("x", F32, (4, 3, 4, 4)))


def test_an_input_without_a_batch(tmp_path: Path) -> None:
    (found,) = feeds(folder(tmp_path, "1.png"), TensorSpec("x", F32, (3, 4, "w")))
    assert found.values["x"].shape == (3, 4, 4)


def test_bytes_as_they_are(tmp_path: Path) -> None:
    given = folder(tmp_path, "1.png", "2.png")
    byte = TensorSpec("x", ir.DataType.UINT8, (1, 3, 4, 4))
    assert [int(feed.values["x"].max()) for feed in feeds(given, byte)] == [0, 10]


@pytest.mark.parametrize("text", ["scale = 255", "mean = 127", "std = [3, 4, 5]"])
def test_what_is_no_byte_is_refused(tmp_path: Path, text: str) -> None:
    given = folder(tmp_path, "1.png", "2.png", recipe=text)
    with pytest.raises(DataError, match=r"png' becomes numbers from .* whole ones from 0 to 255"):
        feeds(given, TensorSpec("x", ir.DataType.UINT8, (1, 3, 4, 4)))


def test_no_input_of_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images are numbers"):
        feeds(folder(tmp_path, "1.png"), TensorSpec("x", ir.DataType.STRING, (1, 3, 4, 4)))


def test_one_number_for_all_channels(tmp_path: Path) -> None:
    plain = folder(tmp_path, "0.png", "1.png", recipe="mean = 5\nstd = 2")
    assert feeds(plain)[1].values["x"].max() == 2.5


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mean = [1, 2]", "mean of 2 numbers for 3 channels"),
        ("std = [1, 2, 3]\nchannels = 'L'", "std of 3 numbers for 1 channels"),
        ("resize = 0", "resize = 0: sizes are 1 or more"),
        ("resize = [4, -1]", "sizes are 1 or more"),
        ("crop = -3", "crop = -3: sizes"),
        ("scale = nan", "scale = nan: give finite numbers"),
        ("mean = [inf]", "give finite numbers"),
        ("scale = 0", "divides by zero"),
    ],
)
def test_what_no_recipe_may_say(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(OptionError, match=error):
        feeds(folder(tmp_path, "1.png", recipe=text))
