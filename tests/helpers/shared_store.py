"""A file system of fsspec that several processes reach."""

from __future__ import annotations

from typing import Any

from fsspec.implementations.local import LocalFileSystem


class SharedStore(LocalFileSystem):
    """A store that several processes reach: a folder, at ``shared:///…``."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("shared://")))
