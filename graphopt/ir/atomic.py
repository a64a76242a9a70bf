"""Writes files and folders so that each is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from graphopt.errors import OptionError
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.message import Piece, tensor_chunks

_LARGE_BYTES = 1 << 20
_REMEDY = {
    errno.ENOSPC: "free space there or write elsewhere",
    errno.EDQUOT: "free space within the quota or write elsewhere",
    errno.EFBIG: "raise the file size limit (`ulimit -f`), or use a file system that allows such files",
    errno.EACCES: "write to a folder in which you may create files",
    errno.EPERM: "write to a folder in which you may create files",
    errno.EROFS: "write to a file system that is not read-only",
    errno.ENOENT: "create the folder first",
    errno.EEXIST: "give a path whose parent is a folder",
    errno.ENOTDIR: "give a path whose parent is a folder",
    errno.ENAMETOOLONG: "give a shorter name",
}


class FileSet:
    """Files that appear together: written under temporary names beside their places, renamed by `commit`.

    Args:
        durable: whether they shall survive the machine's end; files that are soon gone need not reach the disk.
    """

    def __init__(self, *, durable: bool = True) -> None:
        self._temporary: dict[Path, Path] = {}
        self._durable = durable

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        """Writes one file, under a temporary name.

        Raises:
            OptionError: the file system refuses.
        """
        _refuse_special(path)
        temporary = path.parent / f".graphopt-{secrets.token_hex(8)}.tmp"
        with told(path):
            fd = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
            )
            self._temporary[path] = temporary
            try:
                _stream(fd, pieces)
                if self._durable:
                    os.fsync(fd)
            finally:
                os.close(fd)

    def adopt(self, path: Path, written: Path) -> None:
        """Takes a file that is written already, on the same file system, for `path`.

        Raises:
            OptionError: there is something at `path` that is no file.
        """
        _refuse_special(path)
        self._temporary[path] = written

    def commit(self) -> None:
        """Renames all files to their places, in the order written; puts back what was there if one cannot be.

        Raises:
            OptionError: the file system refuses.
        """
        replaced: list[tuple[Path, Path | None]] = []
        try:
            for path, temporary in self._temporary.items():
                with told(path):
                    # The last file is replaced in one step; what comes before it must be able to come back.
                    last = len(replaced) == len(self._temporary) - 1
                    replaced.append((path, None if last else _kept(path)))
                    temporary.replace(path)
        except BaseException:
            for path, kept in replaced:
                _restore(path, kept, self._temporary[path])
            raise
        for _, kept in replaced:
            if kept is not None:
                kept.unlink(missing_ok=True)
        for folder in {path.parent for path in self._temporary} if self._durable else ():
            _sync_folder(folder)
        self._temporary.clear()

    def discard(self) -> None:
        """Removes what has not been renamed."""
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)
        self._temporary.clear()


def write_file(path: Path, data: bytes) -> None:
    """Writes one file.

    Raises:
        OptionError: the file system refuses; what was at `path` is still there.
    """
    outputs = FileSet()
    try:
        outputs.write(path, [data])
        outputs.commit()
    finally:
        outputs.discard()


@contextlib.contextmanager
def filled(folder: Path, stale: str = "") -> Iterator[Path]:
    """A new folder to write to, whose entries replace those of `folder` when the block ends without an exception.

    Args:
        folder: made, with its parents, where it does not exist; entries of other names stay.
        stale: a pattern of entries that go if the block makes none of that name.

    Raises:
        OptionError: the file system refuses; `folder` is as it was.
    """
    stage = folder.parent / f".graphopt-{secrets.token_hex(8)}.tmp"
    with told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        try:
            yield stage
            _move_in(stage, folder, stale)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _move_in(stage: Path, folder: Path, stale: str) -> None:
    """Renames what is in `stage`; what it replaces waits there, to come back if a rename fails."""
    if not folder.exists():
        stage.rename(folder)
        return
    names = {entry.name for entry in stage.iterdir()}
    names |= {entry.name for entry in folder.glob(stale)} if stale else set()
    aside = stage / f"{secrets.token_hex(8)}.old"
    aside.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for name in sorted(names):
            for source, target in ((folder, aside), (stage, folder)):
                if os.path.lexists(source / name):
                    (source / name).rename(target / name)
                    moved.append((source / name, target / name))
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        raise


def _kept(path: Path) -> Path | None:
    """A second name for the file now at `path`."""
    if not path.exists():
        return None
    kept = path.parent / f".graphopt-{secrets.token_hex(8)}.old"
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        path.replace(kept)
    return kept


def _restore(path: Path, kept: Path | None, temporary: Path) -> None:
    if kept is not None:
        kept.replace(path)
        kept.unlink(
            missing_ok=True
        )  # rename leaves both names of one file, where `path` was never replaced
    elif not temporary.exists():  # it was renamed, and there had been nothing
        path.unlink(missing_ok=True)


def _refuse_special(path: Path) -> None:
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a device, pipe or socket"
            raise OptionError(f"cannot write {path}: it is {kind}; give the name of a file")


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns what the system says into what the user needs."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDY.get(error.errno or 0, "check the folder and write again")
        raise OptionError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def _stream(fd: int, pieces: Iterable[Piece]) -> None:
    # Small pieces are gathered; what is large goes to the file from where it is.
    pending = bytearray()

    def flush() -> None:
        _write_all(fd, pending)
        pending.clear()

    for piece in pieces:
        if (
            isinstance(piece, MappedTensor)
            and piece.mapping is not None
            and piece.nbytes >= _LARGE_BYTES
        ):
            flush()
            _copy(fd, piece)
            continue
        for chunk in (piece,) if isinstance(piece, bytes) else tensor_chunks(piece):
            if len(chunk) >= _LARGE_BYTES:
                flush()
                _write_all(fd, chunk)
                continue
            pending += chunk
            if len(pending) >= _LARGE_BYTES:
                flush()
    flush()


def _copy(fd: int, tensor: MappedTensor) -> None:
    """Copies file to file inside the kernel, or in pieces where it cannot (other platform or file system)."""
    assert tensor.mapping is not None
    file, offset = tensor.mapping
    left = tensor.nbytes
    try:
        while left:
            copied = os.copy_file_range(file.fileno(), fd, left, offset_src=offset)
            if not copied:
                break
            offset, left = offset + copied, left - copied
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY:
            raise
    for chunk in file.chunks(offset, left):
        _write_all(fd, chunk)


_NO_KERNEL_COPY = (
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
)


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.write(fd, view[done:])


def _sync_folder(folder: Path) -> None:
    # Not every platform can open or sync a folder; the rename itself has been done.
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
