"""Samples from every source, and what is said about those that do not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.calibrate.images import Preprocess, read_image
from graphopt.calibrate.samples import Samples, read_samples
from graphopt.calibrate.screening import Screening
from graphopt.errors import DataError, OptionError
from graphopt.rewrite import Calibration
from graphopt.runtime.specs import TensorSpec
from graphopt.verify.feed_files import Feed

F32 = ir.DataType.FLOAT
IMAGE = (TensorSpec("x", F32, (1, 2)),)
FREE = (TensorSpec("x", ir.DataType.FLOAT, ("n", 2)), TensorSpec("k", ir.DataType.INT64, ()))


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def shapes(
    source: Path | list[dict[str, object]], specs: tuple[TensorSpec, ...]
) -> list[tuple[int, ...]]:
    return [feed.values["x"].shape for feed in read_samples(Calibration(source), specs)]


def test_rows_of_equal_rank_are_fed_one_at_a_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2), np.float32))
    assert shapes(tmp_path / "a.npz", IMAGE) == [(1, 2)] * 3


def test_a_leading_axis_more_is_the_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 5, 2), np.float32), k=np.arange(3))
    assert shapes(tmp_path / "a.npz", FREE) == [(5, 2)] * 3


def test_what_has_no_rows_goes_with_each(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2), np.float32), k=np.int64(1))
    assert shapes(tmp_path / "a.npz", FREE) == [(1, 2)] * 3
    fixed = (*IMAGE, TensorSpec("s", ir.DataType.FLOAT, (2,)), TensorSpec("m", F32, (1, 3)))
    np.savez(tmp_path / "b.npz", x=ones(3, 2), s=ones(2), m=ones(1, 3))
    assert shapes(tmp_path / "b.npz", fixed) == [(1, 2)] * 3


def test_one_feed_as_it_is(tmp_path: Path) -> None:
    """Rows differ, and all fits as it is."""
    points = (TensorSpec("x", F32, ("n", 2)), TensorSpec("q", F32, ("m", 2)))
    np.savez(tmp_path / "a.npz", x=ones(3, 2), q=ones(5, 2))
    assert shapes(tmp_path / "a.npz", points) == [(3, 2)]


def test_rows_that_fill_no_batch_are_noted(tmp_path: Path) -> None:
    pairs = (TensorSpec("x", F32, (2, 2)),)
    np.savez(tmp_path / "a.npz", x=ones(5, 2))
    screening = Screening()
    assert len(list(screening.of(read_samples(Calibration(tmp_path / "a.npz"), pairs)))) == 2
    (told,) = screening.told()
    assert told.startswith("the last 1 of 5 rows of 'x' in")
    np.savez(tmp_path / "a.npz", x=ones(4, 2))
    screening = Screening()
    assert len(list(screening.of(read_samples(Calibration(tmp_path / "a.npz"), pairs)))) == 2
    assert screening.told() == ()


def test_fewer_rows_than_a_batch_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=ones(3, 2))
    with pytest.raises(DataError, match="has 3 rows of the input 'x', and the model takes 4"):
        shapes(tmp_path / "a.npz", (TensorSpec("x", F32, (4, 2)),))


def test_suffixes_in_capitals_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=ones(3, 2))
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    assert len(shapes(tmp_path, IMAGE)) == len(shapes(tmp_path / "A.NPZ", IMAGE)) == 3


def test_a_folder_of_something_else_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.csv").write_text("1")
    with pytest.raises(DataError, match=r"holds no calibration samples \(there is inner.a\.csv\)"):
        shapes(tmp_path, IMAGE)


class Tensor:
    """A tensor of another library."""

    def __init__(self, array: np.ndarray | None) -> None:
        self.array = array

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        if self.array is None:
            raise RuntimeError("it lies on a GPU")
        return self.array


@pytest.mark.parametrize(
    "given",
    [
        {"x": Tensor(ones(1, 2))},
        {"x": [[1.0, 2]]},
        [Tensor(ones(1, 2))],
        (ones(1, 2),),
        ones(1, 2),
    ],
)
def test_what_can_be_read_as_arrays(given: dict[str, object]) -> None:
    (feed,) = read_samples(Calibration([given]), IMAGE)
    assert feed.values["x"].dtype == np.float32
    assert feed.values["x"].shape == (1, 2)


def test_numbers_are_arrays() -> None:
    specs = (TensorSpec("x", F32, ()), TensorSpec("k", ir.DataType.INT64, ()))
    for given in ({"x": 1, "k": 2}, {"x": 0.5, "k": np.int64(2)}, (np.float32(1), 2)):
        (feed,) = read_samples(Calibration([given]), specs)  # type: ignore[list-item]
        assert feed.values["x"].dtype == np.float32
        assert feed.values["k"].dtype == np.int64


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (None, "'sample 0' is NoneType, and the model takes 'x'; give a mapping"),
        ((ones(1, 2), 3), "'sample 0' is tuple of 2 values, and the model takes 'x'"),
        ("a", "'sample 0' is str, and"),
        ({"x": [[1.0], [2.0, 3.0]]}, "the input 'x' is list, which gives no array"),
        ({"x": Tensor(None)}, "the input 'x' is Tensor, which gives no array: it lies on a GPU"),
        ({"x": object()}, "must be an array"),
        ({"x": np.ones((1, 2))}, "its dtype is float64"),
    ],
)
def test_what_cannot_be_read_as_arrays(given: dict[str, object], error: str) -> None:
    with pytest.raises(DataError, match=error):
        list(read_samples(Calibration([given]), IMAGE))


def test_fractions_are_no_integers() -> None:
    with pytest.raises(DataError, match="the input 'k' must be int64"):
        list(read_samples(Calibration([{"k": 2.5}]), (TensorSpec("k", ir.DataType.INT64, ()),)))


def test_arrays_of_many_samples() -> None:
    both = (*IMAGE, TensorSpec("k", ir.DataType.INT64, (1,)))
    given: Any = {"x": ones(3, 2), "k": np.arange(3)}
    assert [int(f.values["k"][0]) for f in read_samples(Calibration(given), both)] == [0, 1, 2]
    rows: Any = ones(3, 2)
    assert len(list(read_samples(Calibration(rows), IMAGE))) == 3


def test_a_folder_of_npz_in_natural_order_and_its_limit(tmp_path: Path) -> None:
    for index in (10, 2):
        np.savez(tmp_path / f"s{index}.npz", x=np.full((1, 2), index, np.float32))
    feeds = list(read_samples(Calibration(tmp_path), IMAGE))
    assert [feed.values["x"][0, 0] for feed in feeds] == [2, 10]
    assert len(list(read_samples(Calibration(tmp_path, limit=1), IMAGE))) == 1


def test_an_onnx_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    tensor = onnx.numpy_helper.from_array(np.ones((1, 2), np.float32), "x")
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    assert shapes(tmp_path, IMAGE) == shapes(folder, IMAGE) == [(1, 2)]


def test_feeds_from_python_can_be_read_again() -> None:
    samples = read_samples(Calibration([{"x": np.ones((1, 2), np.float32)}]), IMAGE)
    assert len(list(samples)) == len(list(samples)) == 1


def test_different_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((3, 5, 2), np.float32), k=np.arange(4))
    with pytest.raises(DataError, match=r"different numbers of samples \('x': 3, 'k': 4\)"):
        shapes(tmp_path / "a.npz", FREE)


def test_a_sample_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match=r"'sample 0': the input 'x' must be float\[1,2\]"):
        shapes([{"x": np.ones((1, 3), np.float32)}], IMAGE)
    with pytest.raises(DataError, match=r"'sample 0' lacks the input 'k'"):
        shapes([{"x": np.ones((1, 2), np.float32)}], FREE)


@pytest.mark.parametrize(
    ("count", "found"),
    [(0, []), (4, [0, 1, 2, 3]), (5, [0, 2, 4]), (9, [0, 4, 8]), (100, [0, 32, 64, 96])],
)
def test_samples_spread_over_all(count: int, found: list[int]) -> None:
    feeds = [Feed(str(index), {}) for index in range(count)]
    assert [int(feed.name) for feed in Samples(lambda: iter(feeds)).spread(4)] == found


@pytest.mark.parametrize(
    ("limit", "error"), [(0, "--samples must be 1 or more"), (-1, "-1 calibration samples")]
)
def test_a_limit_below_one_is_refused(limit: int, error: str) -> None:
    with pytest.raises(OptionError, match=error):
        read_samples(Calibration([], limit=limit), IMAGE)


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_samples(Calibration([]), IMAGE)
    with pytest.raises(DataError, match="holds no"):
        read_samples(Calibration(tmp_path), IMAGE)
    with pytest.raises(DataError, match="there is no file or folder"):
        read_samples(Calibration(tmp_path / "absent"), IMAGE)


@pytest.mark.parametrize(("limit", "found"), [(None, 3), (2, 2), (5, 3)])
def test_an_iterator_is_read_once_and_may_be_asked_again(limit: int | None, found: int) -> None:
    feeds = ({"x": np.full((1, 2), i, np.float32)} for i in range(3))
    samples = read_samples(Calibration(feeds, limit=limit), IMAGE)
    for _ in range(2):
        assert [feed.values["x"][0, 0] for feed in samples] == list(range(found))


def test_images_become_inputs(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[..., 0] = 255
    image.fromarray(pixels).save(tmp_path / "a.png")
    recipe = tmp_path / "pre.toml"
    recipe.write_text(
        "resize = 4\ncrop = 4\nscale = 255\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n"
    )
    specs = (TensorSpec("image", ir.DataType.FLOAT, (1, 3, 4, 4)),)
    feed = next(iter(read_samples(Calibration(tmp_path, recipe), specs)))
    assert feed.values["image"][0, :, 0, 0].tolist() == [1, -1, -1]
    with pytest.raises(OptionError, match="--preprocess FILE"):
        read_samples(Calibration(tmp_path), specs)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("crops = 3", "crops.*it may say resize, crop, scale"),
        (
            "resize = 4",
            r"becomes \[1, 3, 4, 4\] by the preprocessing file.*'image' must be float\[1,3,8,8\]",
        ),
        ("layout = 'CHW'", "layout is NCHW or NHWC"),
        ("std = [0.0]", "divides by zero"),
        ("crop = 64", "smaller than the crop of 64 x 64"),
    ],
)
def test_a_faulty_preprocessing_file(tmp_path: Path, text: str, error: str) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    recipe = tmp_path / "pre.toml"
    recipe.write_text(text)
    specs = (TensorSpec("image", ir.DataType.FLOAT, (1, 3, 8, 8)),)
    with pytest.raises((OptionError, DataError), match=error):
        list(read_samples(Calibration(tmp_path, recipe), specs))


def test_images_of_two_inputs_need_a_name_for_theirs(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    image.fromarray(np.full((4, 8, 3), [255, 0, 0], np.uint8)).save(tmp_path / "a.png")
    recipe = tmp_path / "pre.toml"
    recipe.write_text("resize = [2, 4]\nchannels = 'BGR'\nlayout = 'NHWC'")
    first = TensorSpec("image", ir.DataType.FLOAT, (1, 2, 4, 3))
    second = TensorSpec("mask", ir.DataType.FLOAT, (1,))
    feed = next(iter(read_samples(Calibration(tmp_path, recipe), (first,))))
    assert feed.values["image"][0, 0, 0].tolist() == [0, 0, 255]
    with pytest.raises(
        OptionError, match=r"must name the input that images feed .*'image', 'mask'"
    ):
        read_samples(Calibration(tmp_path, recipe), (first, second))


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="needs pillow")
    (tmp_path / "a.png").write_bytes(b"not an image")
    recipe = tmp_path / "pre.toml"
    recipe.write_text("resize = 4")
    specs = (TensorSpec("image", ir.DataType.FLOAT, (1, 3, 4, 4)),)
    with pytest.raises(DataError, match=r"a\.png' cannot be read as an image"):
        read_samples(Calibration(tmp_path, recipe), specs)


def test_images_of_16_bits_are_not_white(tmp_path: Path) -> None:
    """Converted as they are, all beyond 255 of 65535 would be."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    path = tmp_path / "a.png"
    image.fromarray(np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16)).save(path)
    found = read_image(path, Preprocess(channels="L"))
    assert found.reshape(-1).tolist() == [0, 1, 128, 255]


def test_a_turned_image_is_turned_back(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    wide = image.fromarray(np.zeros((8, 32), np.uint8))
    orientation = wide.getexif()
    orientation[0x112] = 6  # to be turned by a quarter
    wide.save(tmp_path / "a.jpg", exif=orientation)
    assert read_image(tmp_path / "a.jpg", Preprocess(channels="L")).shape == (1, 1, 32, 8)


def test_pixels_without_a_white_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff' has pixels of mode 'F'.*\.npz"):
        read_image(tmp_path / "a.tiff", Preprocess())


def test_images_without_pillow_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"any")
    recipe = tmp_path / "pre.toml"
    recipe.write_text("resize = 4")
    monkeypatch.setitem(sys.modules, "PIL", None)
    specs = (TensorSpec("image", ir.DataType.FLOAT, (1, 3, 4, 4)),)
    with pytest.raises(OptionError, match=r"pip install 'graphopt\[images\]'"):
        read_samples(Calibration(tmp_path, recipe), specs)
