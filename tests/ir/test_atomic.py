"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from graphopt.errors import OptionError
from graphopt.ir.atomic import filled, write_file


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder, with what it says."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def write(stage: Path) -> None:
    """What a golden case looks like, roughly."""
    (stage / "a").write_text("new a")
    (stage / "set_1").mkdir()
    (stage / "set_1" / "x").write_text("new x")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that was filled before."""
    folder = tmp_path / "old"
    for name in ("a", "note", "set_0/x", "set_1/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"old {name}")
    return folder


def test_a_file_is_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    write_file(tmp_path / "f", b"new")
    assert listing(tmp_path) == {"f": "new"}


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "f").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(
            OptionError, match=r"cannot write .*f: No space left on device; free space"
        ):
            write_file(tmp_path / "f", b"new")
    assert listing(tmp_path) == {"f": "old"}


def test_a_new_folder_appears_with_its_parents(tmp_path: Path) -> None:
    with filled(tmp_path / "deep" / "new", stale="set_*") as stage:
        write(stage)
    assert listing(tmp_path) == {"deep/new/a": "new a", "deep/new/set_1/x": "new x"}


def test_entries_are_replaced_stale_ones_go_others_stay(old: Path) -> None:
    with filled(old, stale="set_*") as stage:
        write(stage)
    assert listing(old.parent) == {"old/a": "new a", "old/note": "old note", "old/set_1/x": "new x"}


def fail(folder: Path, error: BaseException) -> None:
    with filled(folder, stale="set_*") as stage:
        write(stage)
        raise error


def test_a_failure_while_filling_leaves_the_folder(old: Path) -> None:
    before = listing(old.parent)
    with pytest.raises(OptionError, match=r"cannot write .*old: No space left on device"):
        fail(old, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        fail(old, KeyboardInterrupt())
    assert listing(old.parent) == before
    assert [path.name for path in old.parent.iterdir()] == ["old"]


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_a_rename_that_fails_brings_back_what_was_there(
    old: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Two old entries and a stale one go aside, two new ones come: five renames."""
    before, original, count = listing(old.parent), Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(OptionError, match=r"cannot write .*old: Input/output error"),
        filled(old, stale="set_*") as stage,
    ):
        write(stage)
    assert count >= failing
    assert listing(old.parent) == before
    assert [path.name for path in old.parent.iterdir()] == ["old"]


def test_a_folder_where_none_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says = r"cannot write .*new: .*; give a path whose parent is a folder"
    with pytest.raises(OptionError, match=says), filled(tmp_path / "file" / "new"):
        pass
    assert listing(tmp_path) == {"file": ""}
