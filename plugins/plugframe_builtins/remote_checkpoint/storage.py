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
    """Return the path of the file system that `path` is or, as ``file:///…``, stands for; None for another URL."""
    if not _URL.match(path):
        return path
    if path.startswith(("file://", "local://")):
        return str(url_to_fs(path)[1])
    return None


@contextmanager
def told(what: str, *, after: str = "") -> Iterator[None]:
    """Turn every error, whichever library raised it, into one line that says `what` failed."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 of whichever library
        text = " ".join((str(error) or "no message").split())
        raise CheckpointError(f"{what}: {type(error).__name__}: {text[:500].rstrip('.')}{after}.") from printable_cause(
            error
        )


class RemoteFolder:
    """The files at a URL, by name.

    What fsspec needs to get in (keys, endpoints) it takes from its own configuration.

    Raises:
        CheckpointError: if fsspec has no access to such URLs, saying which package it wants.
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
                raise CheckpointError(f"{url} is no URL fsspec can open: {error}.") from error
            raise CheckpointError(
                f"{url}: fsspec knows no protocol {scheme!r}.{closest(scheme, known)} "
                "Install the package that brings it to fsspec, or give another URL."
            ) from error
        except Exception as error:
            text = " ".join((str(error) or "no message").split()).rstrip(".")
            raise CheckpointError(f"{url} cannot be opened: {type(error).__name__}: {text}.") from error
        # Typed by nobody.
        self._fs: Any = fs
        self._path = str(path)

    def shown(self, name: str) -> str:
        """Return a file's URL."""
        return f"{self.url.rstrip('/')}/{name}"

    def sizes(self) -> dict[str, int | None]:
        """Return the size of everything in the folder by name, None where nobody tells; empty if there is no folder.

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
        """Return a file's size, None if there is no such file."""
        self._fs.invalidate_cache(self._path)
        try:
            found = self._fs.info(self._at(name)).get("size")
        except FileNotFoundError:
            return None
        if found is None:
            raise CheckpointError(f"cannot read {self.shown(name)}: nobody tells its size.")
        return int(found)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return a file, or the bytes of it from `start` to before `end`; threads may do so at the same time.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        return bytes(self._fs.cat_file(self._at(name), start=start, end=end))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Give a new file to write into; at the end of the block it is there."""
        try:
            file = self._fs.open(self._at(name), "wb")
        except FileNotFoundError:
            # Object stores have no folders, so none is made before it is missed.
            self._fs.makedirs(self._path, exist_ok=True)
            file = self._fs.open(self._at(name), "wb")
        with file:
            yield cast("BinaryIO", file)

    def rename(self, name: str, new: str) -> None:
        """Put a file in the place of another, at once."""
        self._fs.invalidate_cache(self._path)
        self._fs.mv(self._at(name), self._at(new))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._fs.rm_file(self._at(name))

    def move(self, target: RemoteFolder) -> None:
        """Move the whole folder, which object stores do by copying each file."""
        self._fs.invalidate_cache(self._path)
        self._fs.mv(self._path, target._path, recursive=True)

    def remove_empty(self) -> None:
        """Remove the folder itself; it must be empty."""
        self._fs.rmdir(self._path)

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"
