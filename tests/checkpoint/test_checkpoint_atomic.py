"""Files are replaced atomically, and the next save removes what a crash left."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugframe.checkpoint import remove_leftovers, replacing
from plugframe.errors import CheckpointError


def put(path: Path, content: bytes) -> None:
    with replacing(str(path), size_bytes=len(content)) as file:
        file.write(content)


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    """The second content replaces the first, parent folders are created, and no other file remains."""
    path = tmp_path / "runs" / "1" / "last.ckpt"
    put(path, b"old")
    put(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    """A symbolic link keeps its target, and the replaced file its permissions."""
    real, link = tmp_path / "real.ckpt", tmp_path / "last.ckpt"
    put(real, b"old")
    real.chmod(0o640)
    link.symlink_to(real.name)
    put(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    """A new file gets the permissions of the umask."""
    put(tmp_path / "last.ckpt", b"new")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "last.ckpt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_relative_path_and_a_long_name_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is in the working folder, and a name of 255 bytes leaves room for the temporary one."""
    monkeypatch.chdir(tmp_path)
    put(Path("last.ckpt"), b"1")
    put(Path("n" * 255), b"2")
    assert sorted(os.listdir()) == ["last.ckpt", "n" * 255]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ZeroDivisionError(), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    """After any error while writing, the old file is unchanged and the temporary one is removed."""
    path = tmp_path / "last.ckpt"
    put(path, b"old")

    def interrupted() -> None:
        with replacing(str(path), size_bytes=100) as file:
            file.write(b"half")
            raise error

    with pytest.raises((CheckpointError, ZeroDivisionError, KeyboardInterrupt)) as caught:
        interrupted()
    assert caught.value is error or caught.value.__cause__ is error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_at_the_end_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """If fsync or rename fails, the old file is unchanged."""
    path = tmp_path / "last.ckpt"
    put(path, b"old")
    monkeypatch.setattr(os, step, failing(errno.EIO))
    with pytest.raises(CheckpointError, match=r"cannot write .*last\.ckpt: Input/output error; what was .* untouched"):
        put(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_disk_that_fills_up_says_how_much_is_missing(tmp_path: Path) -> None:
    """If the disk fills up while writing, the error has the bytes needed and the bytes free."""
    with (
        pytest.raises(
            CheckpointError, match=r"No space left on device \(it needs 12345 bytes and .* has \d+ bytes free"
        ),
        replacing(str(tmp_path / "last.ckpt"), size_bytes=12345),
    ):
        failing(errno.ENOSPC)()
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without enough space nothing is written, and no folders are created."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"it needs 11 bytes and .* has 10 bytes free"):
        put(tmp_path / "new" / "last.ckpt", b"x" * 11)
    assert os.listdir(tmp_path) == []
    put(tmp_path / "new" / "last.ckpt", b"x" * 10)


def test_a_folder_that_cannot_be_synced_is_reported_unless_it_need_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that may not survive a power failure is an error, unless folders cannot be synced."""
    real = os.fsync

    def fsync(number: int) -> Callable[[int], None]:
        return lambda fd: failing(number)() if stat.S_ISDIR(os.fstat(fd).st_mode) else real(fd)

    monkeypatch.setattr(os, "fsync", fsync(errno.EINVAL))
    put(tmp_path / "last.ckpt", b"old")
    monkeypatch.setattr(os, "fsync", fsync(errno.EIO))
    with pytest.raises(CheckpointError, match="is written, but .* cannot be forced to disk"):
        put(tmp_path / "last.ckpt", b"new")
    assert (tmp_path / "last.ckpt").read_bytes() == b"new"


def test_leftovers_of_dead_writers_are_cleared_and_of_live_ones_not(tmp_path: Path) -> None:
    """The lock on a temporary file ends with its writer; only files of the same checkpoint are removed."""
    path = tmp_path / "last.ckpt"
    dead = tmp_path / (".last.ckpt.tmp-" + "0" * 16)
    live = tmp_path / (".last.ckpt.tmp-" + "1" * 16)
    others = [
        ".best.ckpt.tmp-" + "0" * 16,
        ".last.ckpt.tmp-xyz",
        "last.ckpt.tmp-" + "0" * 16,
        ".lastXckpt.tmp-" + "0" * 16,
    ]
    for other in [dead, live, *(tmp_path / name for name in others)]:
        other.write_bytes(b"half")
    (tmp_path / (".last.ckpt.tmp-" + "2" * 16)).mkdir()
    (tmp_path / (".last.ckpt.tmp-" + "3" * 16)).symlink_to("last.ckpt")
    with live.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        put(path, b"new")
        assert not dead.exists()
        assert live.exists()
    assert remove_leftovers(str(path)) == [live.name]
    assert remove_leftovers(str(tmp_path / "nowhere" / "last.ckpt")) == []
    assert all((tmp_path / name).exists() for name in others)
    assert path.read_bytes() == b"new"


def test_writers_of_one_path_do_not_clear_each_other(tmp_path: Path) -> None:
    """With two concurrent writers of one path the last one wins, and the file is intact."""
    path = tmp_path / "last.ckpt"
    with replacing(str(path), size_bytes=6) as first:
        first.write(b"first")
        put(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_writer_whose_file_is_cleared_too_early_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove a new file before it is locked."""
    real, seen = fcntl.flock, []

    def cleared_first(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        seen.append(sorted(os.listdir(tmp_path)))
        if len(seen) == 1:
            os.unlink(tmp_path / seen[0][0])

    monkeypatch.setattr(fcntl, "flock", cleared_first)
    put(tmp_path / "last.ckpt", b"new")
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_writer_beaten_to_its_own_lock_takes_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another process has locked is not written to."""
    real, calls = fcntl.flock, []

    def held(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise BlockingIOError
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", held)
    put(tmp_path / "last.ckpt", b"new")
    assert (tmp_path / "last.ckpt").read_bytes() == b"new"


def test_without_locks_saving_works_and_nothing_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks, dead writers cannot be detected, so their files stay."""
    leftover = tmp_path / (".last.ckpt.tmp-" + "0" * 16)
    leftover.write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))
    put(tmp_path / "last.ckpt", b"new")
    assert (tmp_path / "last.ckpt").read_bytes() == b"new"
    assert leftover.exists()


def test_paths_that_are_no_place_for_a_file_are_refused(tmp_path: Path) -> None:
    """A folder, a URL, a device, or a file in place of a folder is refused and unchanged."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    cases = {
        str(tmp_path): r"is a folder: give the name of a file, such as '.*last\.ckpt'",
        f"{tmp_path}/new/": "is a folder",
        "": "is a folder",
        "s3://bucket/last.ckpt": "is a URL",
        str(tmp_path / "pipe"): "is not a regular file",
        str(tmp_path / "file" / "last.ckpt"): "Not a directory",
    }
    for path, text in cases.items():
        with pytest.raises(CheckpointError, match=text), replacing(path, size_bytes=1):
            pytest.fail("nothing may be written")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]
    assert not os.path.exists("s3:")
