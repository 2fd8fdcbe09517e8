"""Replace files atomically: a crash at any instant leaves the old or the new file intact.

The new file is written beside the old one as ``.NAME.tmp-<random>``, forced to disk, and renamed over it. Its writer
holds a lock on it, which the kernel releases when the process ends. So files left by a crash can be distinguished from
those being written, without process ids, which containers share and reboots reuse.
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
    """Open a file for `size_bytes`; at the end of the block it is at `path`, and on disk.

    Parent folders are created. A symbolic link keeps its target, and an existing file its permissions. Files of dead
    writers of the same path are removed first.

    Args:
        over_folder: returns whether a folder at `path` may be replaced, with its contents.

    Raises:
        CheckpointError: with the path and the reason; an existing file is unchanged.
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
            _move_into_place(temporary, target)
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
            "after a power failure the previous file may be there again."
        ) from error


def remove_leftovers(path: str) -> list[str]:
    """Remove temporary files of dead writers of `path`; return the names removed."""
    folder, pattern = os.path.dirname(path), re.compile(re.escape(_prefix(path)) + "[0-9a-f]{16}")
    try:
        names = [name for name in os.listdir(folder or ".") if pattern.fullmatch(name)]
    except FileNotFoundError:
        return []
    return [name for name in names if remove_if_dead(os.path.join(folder, name))]


def exchange(first: str, second: str) -> None:
    """Exchange two paths atomically, such as a file and a folder.

    Raises:
        OSError: if the system or the file system does not support it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    rename = getattr(library, "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "this system cannot exchange a file and a folder atomically")
    here, flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), flag) != 0:
        number = ctypes.get_errno()
        raise OSError(
            number, f"this file system cannot exchange a file and a folder atomically ({os.strerror(number)})"
        )


def _move_into_place(temporary: str, target: str) -> None:
    if not os.path.isdir(target):
        os.replace(temporary, target)
        return
    exchange(temporary, target)
    shutil.rmtree(temporary, ignore_errors=True)  # the old folder; the next save removes what remains


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
        raise CheckpointError(f"{path} exists and is not a regular file: give another name.")
    return os.path.realpath(path)


def draft_name(path: str) -> str:
    """Return a new temporary name beside `path`, of the form that `remove_leftovers` removes."""
    target = os.path.realpath(path)
    return os.path.join(os.path.dirname(target), f"{_prefix(target)}{secrets.token_hex(8)}")


def _prefix(path: str) -> str:
    name = os.path.basename(path)
    if len(os.fsencode(name)) > 200:
        # File names are limited to 255 bytes.
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.tmp-"


def check_space(path: str, folder: str, size_bytes: int) -> None:
    """Raise if `folder`, which need not exist yet, has less than `size_bytes` free for `path`.

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
    """Create `folder` and its parents; return the folders that got a new entry."""
    changed: list[str] = []
    above = folder
    while not os.path.isdir(above):
        above = os.path.dirname(above)
        changed.append(above)
    os.makedirs(folder, exist_ok=True)
    return changed


@contextmanager
def _temporary(target: str) -> Iterator[tuple[BinaryIO, str]]:
    file, temporary = _open_temporary(target)
    try:
        yield file, temporary
        file.close()
    except BaseException:
        # Keep the original error; the next save removes the file if it cannot be removed now.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _open_temporary(target: str) -> tuple[BinaryIO, str]:
    while True:
        temporary = draft_name(target)
        file = open_locked(temporary)
        if file is not None:
            return file, temporary


def open_locked(path: str) -> BinaryIO | None:
    """Create a file at `path`, locked while it is open; return None if another process removed it at once."""
    file = open(path, "xb")  # noqa: SIM115 the caller closes it
    if _lock(file.fileno()) is not False and os.path.exists(path):
        return file
    # Another process saw the file in `remove_leftovers` before it was locked, and removes it.
    file.close()
    return None


def _lock(descriptor: int) -> bool | None:
    """Take the writer's lock: True on success, False if another process has it, None if locks are not supported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_being_written(path: str) -> bool:
    """Return whether a process has the file at `path` open with `open_locked`.

    True where locks are not supported.
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
    """Remove a file, or a folder of files, of dead writers; return whether it was removed."""
    if os.path.isdir(temporary) and not os.path.islink(temporary):
        return _remove_folder_if_dead(temporary)
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        # Removed already, not a file, or another user's.
        return False
    try:
        # Without locks, the file of a dead writer cannot be distinguished from one being written: it stays.
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
    # Some file systems do not support permissions: save the checkpoint nevertheless.
    with suppress(FileNotFoundError, PermissionError):
        os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode) & 0o666)


def sync_folder(folder: str) -> None:
    """Force the entries of a folder to disk."""
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems neither support nor need it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
