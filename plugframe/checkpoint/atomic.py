"""Putting a new file in the place of an old one, so that a crash at any instant leaves one of the two whole.

The new file is written beside the old one under a name of its own, ``.NAME.tmp-<random>``, forced to disk,
and renamed over it. While it is being written its writer holds a lock on it, which the kernel drops with the
writer: that tells what a crash left behind from what another process is writing now, without trusting process
ids, which containers share and reboots reuse.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from plugframe.errors import CheckpointError, CheckpointURLError


@contextmanager
def replacing(path: str, *, size_bytes: int, over_folder: Callable[[str], bool] | None = None) -> Iterator[BinaryIO]:
    """Give a file to write `size_bytes` into; at the end of the block it is at `path`, and on disk.

    Parent folders are made, a symbolic link keeps pointing where it does, and the permissions of what was
    there before stay. Files that dead writers of the same path left behind are removed first.

    Args:
        over_folder: says of a folder at `path` whether it may be replaced, with all that is in it.

    Raises:
        CheckpointError: naming the path and the reason, with what was there before untouched.
    """
    target = _target(path, over_folder)
    folder = os.path.dirname(target)
    try:
        remove_leftovers(target)
        check_space(path, folder, size_bytes)
        made = make_folders(folder)
        with _temporary(target) as (file, temporary):
            yield file
            file.flush()
            _copy_mode(target, file)
            os.fsync(file.fileno())
            _put(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}{_free(error, folder, size_bytes)}; "
            "what was there before is untouched."
        ) from error
    try:
        for changed in [folder, *made]:
            sync_folder(changed)
    except OSError as error:
        raise CheckpointError(
            f"{path} is written, but {folder} cannot be forced to disk ({error.strerror}): "
            "after a power failure the previous file may be back."
        ) from error


def remove_leftovers(path: str) -> list[str]:
    """Remove what writers of `path` that are dead now left beside it; return the names removed."""
    folder, pattern = os.path.dirname(path), re.compile(re.escape(_prefix(path)) + "[0-9a-f]{16}")
    try:
        names = [name for name in os.listdir(folder or ".") if pattern.fullmatch(name)]
    except FileNotFoundError:
        return []
    return [name for name in names if remove_if_dead(os.path.join(folder, name))]


def exchange(first: str, second: str) -> None:
    """Put what is at either path at the other, at once: a file and a folder, say.

    Raises:
        OSError: where the system or the file system cannot.
    """
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "a file and a folder cannot take each other's place on this system")
    here, flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), flag) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"a file and a folder cannot take each other's place here ({os.strerror(number)})")


def _put(temporary: str, target: str) -> None:
    if not os.path.isdir(target):
        os.replace(temporary, target)
        return
    exchange(temporary, target)
    shutil.rmtree(temporary, ignore_errors=True)  # the old one; what stays the next save removes


def _target(path: str, over_folder: Callable[[str], bool] | None) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise CheckpointURLError(f"{path} is a URL: this checkpoint format writes to a path of the file system.")
    folder = bool(path) and os.path.isdir(path)
    if folder and over_folder is not None and over_folder(path):
        return os.path.realpath(path)
    if not path or path.endswith(os.sep) or folder:
        raise CheckpointError(
            f"{path!r} is a folder: give the name of a file, such as {os.path.join(path, 'last.ckpt')!r}."
        )
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path} is there already and is no regular file: give another name.")
    return os.path.realpath(path)


def draft_name(path: str) -> str:
    """Return a new name beside `path` for what will take its place; `remove_leftovers` knows such names."""
    target = os.path.realpath(path)
    return os.path.join(os.path.dirname(target), f"{_prefix(target)}{secrets.token_hex(8)}")


def _prefix(path: str) -> str:
    name = os.path.basename(path)
    if len(os.fsencode(name)) > 200:
        # A file name has 255 bytes at most.
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.tmp-"


def check_space(path: str, folder: str, size_bytes: int) -> None:
    """Refuse to write `size_bytes` at `path` if there is no room for them in `folder`, which need not be there yet.

    Raises:
        CheckpointError: with the bytes needed and free.
    """
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise CheckpointError(
            f"cannot write {path}: it needs {size_bytes} bytes and {folder} has {free_bytes} bytes free; "
            "what was there before is untouched."
        )


def _free(error: OSError, folder: str, size_bytes: int) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not os.path.isdir(folder):
        return ""
    return f" (it needs {size_bytes} bytes and {folder} has {shutil.disk_usage(folder).free} bytes free)"


def make_folders(folder: str) -> list[str]:
    """Make `folder` and those above it; return the folders that got a new entry by it."""
    changed: list[str] = []
    above = folder
    while not os.path.isdir(above):
        above = os.path.dirname(above)
        changed.append(above)
    os.makedirs(folder, exist_ok=True)
    return changed


@contextmanager
def _temporary(target: str) -> Iterator[tuple[BinaryIO, str]]:
    file, temporary = _open_draft(target)
    try:
        yield file, temporary
        file.close()
    except BaseException:
        # The error on its way out is the one to tell; the next save removes what cannot be removed now.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _open_draft(target: str) -> tuple[BinaryIO, str]:
    while True:
        temporary = draft_name(target)
        file = open_locked(temporary)
        if file is not None:
            return file, temporary


def open_locked(path: str) -> BinaryIO | None:
    """Make a file at `path` and hold its writer's lock while it is open; None if it was taken away at once."""
    file = open(path, "xb")  # noqa: SIM115 the caller closes it
    if _lock(file.fileno()) is not False and os.path.exists(path):
        return file
    # Another process, clearing up, saw the file before it was locked and takes it away.
    file.close()
    return None


def _lock(descriptor: int) -> bool | None:
    """Take the writer's lock: True if it is ours now, False if another has it, None if there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_being_written(path: str) -> bool:
    """Say whether somebody has the file at `path` open for writing, as `open_locked` opens it.

    Where there are no locks nobody can tell, and it counts as being written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def remove_if_dead(temporary: str) -> bool:
    """Remove a file, or a folder of files, whose writers are gone; say whether it was removed."""
    if os.path.isdir(temporary) and not os.path.islink(temporary):
        return _remove_folder_if_dead(temporary)
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        # Gone, not a file, or another user's.
        return False
    try:
        # Where locks do not exist nobody can tell a dead writer's file from a live one's: it stays.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not _lock(descriptor):
            return False
        os.unlink(temporary)
    except FileNotFoundError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove_folder_if_dead(folder: str) -> bool:
    with suppress(OSError):
        removed = [remove_if_dead(os.path.join(folder, name)) for name in os.listdir(folder)]
        if all(removed):
            os.rmdir(folder)
            return True
    return False


def _copy_mode(target: str, file: BinaryIO) -> None:
    # Some file systems have no permissions to set; a checkpoint is worth more than its mode.
    with suppress(FileNotFoundError, PermissionError):
        os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode) & 0o666)


def sync_folder(folder: str) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
