"""Reference values on disk: found again, thrown away where they are damaged, never more than there is room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt import optimize
from graphopt.runtime import session
from graphopt.verify.kept import KeptValues, kept_values, user_folder
from graphopt.verify.verifier import ReferenceRun

TEXT = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> { a = Mul(x, w) y = Sin(a) }"""
FEED = {"x": np.ones((2, 4), np.float32)}
VALUES = {
    "y": np.arange(8, dtype=np.float32).reshape(2, 4),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.int64),
    "scalar": np.array(np.nan),
}


def model(text: str = TEXT) -> bytes:
    return bytes(onnx.parser.parse_model(text).SerializeToString())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every run of a session, and values of small models kept too."""
    monkeypatch.setattr(kept_values, "__kwdefaults__", {"least": 0})
    found: list[Any] = []
    plain = session.Session.run

    def counted(one: Any, feeds: Any, names: Any = None) -> Any:
        found.append(one)
        return plain(one, feeds, names)

    monkeypatch.setattr(session.Session, "run", counted)
    return found


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    place = KeptValues(tmp_path / "m")
    assert (place.find(FEED), place.is_known) == (None, False)
    place.keep(FEED, VALUES)
    found = place.find(FEED)
    assert found is not None
    assert place.is_known
    for name, array in VALUES.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    found["y"] += 1  # not a view of something that others share
    assert place.find({"x": FEED["x"] + 1}) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "words"])
def test_what_is_damaged_is_thrown_away(tmp_path: Path, damage: str) -> None:
    place = KeptValues(tmp_path / "m")
    place.keep(FEED, VALUES)
    (file,) = (tmp_path / "m").iterdir()
    data = file.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    broken = {"cut": data[:-3], "flipped": flipped, "emptied": b"", "words": b"hello\nworld\n"}
    file.write_bytes(broken[damage])
    assert place.find(FEED) is None
    assert not file.exists()


def test_the_oldest_go_when_there_is_no_room(tmp_path: Path) -> None:
    array = np.zeros(1000, np.float32)
    place = KeptValues(tmp_path / "m", cap=20_000)
    feeds = [{"x": np.array(i)} for i in range(8)]
    for feed in feeds:
        place.keep(feed, {"y": array})
    sizes = [file.stat().st_size for file in (tmp_path / "m").iterdir()]
    assert sum(sizes) <= 20_000
    assert place.find(feeds[-1]) is not None
    assert place.find(feeds[0]) is None
    place.keep({"x": np.array(99)}, {"y": np.zeros(4000, np.float32)})
    assert place.find({"x": np.array(99)}) is None, "more than a quarter of the room"


def test_what_is_no_plain_array_is_not_kept(tmp_path: Path) -> None:
    place = KeptValues(tmp_path / "m")
    for value in (None, [np.zeros(2)], np.array(["a"], object)):
        place.keep(FEED, {"y": value})
    assert not place.is_known


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file where the folder should be")
    KeptValues(tmp_path / "m").keep(FEED, VALUES)
    assert KeptValues(tmp_path / "m").find(FEED) is None


def test_another_model_other_weights_and_other_taps_have_places_of_their_own(
    tmp_path: Path,
) -> None:
    def place(text: str, shown: tuple[str, ...] = ()) -> Path:
        found = kept_values(tmp_path, ir.from_proto(onnx.parser.parse_model(text)), shown, least=0)
        assert found is not None
        return found.folder

    plain = place(TEXT)
    assert place(TEXT) == plain
    others = {
        place(TEXT.replace("3, 4", "3, 5")),
        place(TEXT.replace("Sin", "Cos")),
        place(TEXT, ("a",)),
    }
    assert len(others | {plain}) == 4
    small = ir.from_proto(onnx.parser.parse_model(TEXT))
    assert kept_values(tmp_path, small, ()) is None, "not worth it"
    assert kept_values(None, small, (), least=0) is None


def test_a_second_comparison_does_not_run_the_reference(tmp_path: Path, runs: list[Any]) -> None:
    first = ReferenceRun(model(), thorough=True, kept=tmp_path)
    count = len(runs)
    assert count == len(first.feeds) + len(first.dropped)
    second = ReferenceRun(model(), thorough=True, kept=tmp_path)
    assert len(runs) == count
    assert [feed.name for feed in second.feeds] == [feed.name for feed in first.feeds]
    for one, other in zip(first.outputs, second.outputs, strict=True):
        np.testing.assert_array_equal(one["y"], other["y"])
    assert second.verify(model()).passed
    assert second.verify(model(TEXT.replace("Sin", "Cos"))).passed is False
    assert len(ReferenceRun(model(), thorough=True).feeds) == len(first.feeds)
    assert len(runs) > count, "without a folder it runs"


def test_what_is_random_is_not_kept(tmp_path: Path, runs: list[Any]) -> None:
    text = TEXT.replace("y = Sin(a)", "r = RandomNormalLike(a) y = Add(a, r)")
    ReferenceRun(model(text), kept=tmp_path)
    assert runs
    assert not any(tmp_path.iterdir())


def test_optimize_keeps_where_it_is_told(tmp_path: Path, runs: list[Any]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model())
    optimize(path, cache=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*/*"))) > 3
    before = len(runs)
    optimize(path, cache=tmp_path / "kept")
    again = len(runs) - before
    optimize(path, cache=tmp_path / "other")
    assert len(runs) - before - again > again


@pytest.mark.usefixtures("runs")
def test_nothing_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "m.onnx"
    path.write_bytes(model())
    optimize(path)
    assert not (tmp_path / "home").exists()
    optimize(path, cache=True)
    assert any((tmp_path / "home").rglob("*"))


def test_the_user_folder_lies_below_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", classmethod(lambda _: tmp_path))
    assert user_folder() == tmp_path / ".cache" / "graphopt" / "reference"

    def homeless(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert user_folder() is None
