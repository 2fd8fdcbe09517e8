"""A folder at a URL, through fsspec."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec  # type: ignore[import-untyped]
from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from plugframe.checkpoint import printable_cause
from plugframe.errors import CheckpointError, closest

# A URL may be chained, which fsspec writes as "simplecache::s3://…".
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_URL = re.compile(rf"(?:{_SCHEME}::)*{_SCHEME}://")


def local_path(path: str) -> str | None:
    """Return the file system path of `path`, which may be ``file:///…``; None for another URL."""
    if not _URL.match(path):
        return path
    if path.startswith(("file://", "local://")):
        return str(url_to_fs(path)[1])
    return None


@contextmanager
def checkpoint_errors(what: str, *, after: str = "") -> Iterator[None]:
    """Turn any library's error into a one-line `CheckpointError` that names the failed action."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 from any library
        text = " ".join((str(error) or "no message").split())
        raise CheckpointError(f"{what}: {type(error).__name__}: {text[:500].rstrip('.')}{after}.") from printable_cause(
            error
        )


class RemoteFolder:
    """The files at a URL, by name.

    fsspec takes credentials and endpoints from its own configuration.

    Raises:
        CheckpointError: if fsspec cannot open the URL, with the package to install.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            fs, path = url_to_fs(url)
        except ImportError as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise CheckpointError(f"{url} cannot be opened, fsspec lacks a package for it: {text}.") from error
        except ValueError as error:
            scheme = url.partition("://")[0]
            known = [str(name) for name in fsspec.available_protocols()]
            if scheme in known:
                raise CheckpointError(f"{url} is not a URL fsspec can open: {error}.") from error
            raise CheckpointError(
                f"{url}: fsspec has no protocol {scheme!r}.{closest(scheme, known)} "
                "Install the package that brings it to fsspec, or give another URL."
            ) from error
        except Exception as error:
            text = " ".join((str(error) or "no message").split()).rstrip(".")
            raise CheckpointError(f"{url} cannot be opened: {type(error).__name__}: {text}.") from error
        # Untyped: fsspec has no annotations.
        self._fs: Any = fs
        self._path = str(path)

    def shown(self, name: str) -> str:
        """Return a file's URL."""
        return f"{self.url.rstrip('/')}/{name}"

    def sizes(self) -> dict[str, int | None]:
        """Return the sizes of all files in the folder by name, None if unknown; empty if there is no folder.

        Raises:
            CheckpointError: if it is a file.
        """
        self._fs.invalidate_cache(self._path)
        try:
            entries = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        sizes: dict[str, int | None] = {}
        for entry in entries:
            full = str(entry["name"])
            if full.strip("/") != self._path.strip("/"):
                sizes[full.rstrip("/").rpartition("/")[2]] = entry.get("size")
            elif entry.get("type") == "file" and not full.endswith("/"):
                raise CheckpointError(f"{self.url} is a file, and a checkpoint at a URL is a folder: give another URL.")
        return sizes

    def size(self, name: str) -> int | None:
        """Return a file's size, None if it does not exist."""
        self._fs.invalidate_cache(self._path)
        try:
            found = self._fs.info(self._at(name)).get("size")
        except FileNotFoundError:
            return None
        if found is None:
            raise CheckpointError(f"cannot read {self.shown(name)}: its size is unknown.")
        return int(found)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return a file's bytes, optionally from `start` to before `end`; thread-safe.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        return bytes(self._fs.cat_file(self._at(name), start=start, end=end))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file for writing; it exists at the end of the block."""
        try:
            file = self._fs.open(self._at(name), "wb")
        except FileNotFoundError:
            # Object stores have no folders, so one is created only when it is missing.
            self._fs.makedirs(self._path, exist_ok=True)
            file = self._fs.open(self._at(name), "wb")
        with file:
            yield cast("BinaryIO", file)

    def rename(self, name: str, new: str) -> None:
        """Replace a file by another, atomically."""
        self._fs.invalidate_cache(self._path)
        self._fs.mv(self._at(name), self._at(new))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._fs.rm_file(self._at(name))

    def move(self, target: RemoteFolder) -> None:
        """Move the folder, which object stores do by copying each file."""
        self._fs.invalidate_cache(self._path)
        self._fs.mv(self._path, target._path, recursive=True)

    def remove_empty(self) -> None:
        """Remove the folder itself; it must be empty."""
        self._fs.rmdir(self._path)

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"
