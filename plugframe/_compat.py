"""Standard modules with backports for older Pythons, imported on first access; and what is installed.

A listing needs metadata only: ``importlib.metadata`` imports parsers of mails and archives, half of its time. So
the metadata of distributions in folders is read here, in the same way; the rest is left to ``importlib.metadata``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import importlib.metadata as metadata

    tomllib: Any  # missing for a type checker that targets Python 3.10

__all__ = ["Folder", "distributions", "importable", "installed", "is_submodule", "metadata", "requires", "tomllib"]


def __getattr__(name: str) -> Any:
    new = sys.version_info >= (3, 11)
    modules = {
        "metadata": "importlib.metadata" if new else "importlib_metadata",
        "tomllib": "tomllib" if new else "tomli",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(modules[name])


def is_submodule(package: str, name: str) -> bool:
    """Return whether an imported package has a module of that name, by searching its folders only."""
    folders = getattr(sys.modules.get(package), "__path__", ())
    path, suffixes = name.replace(".", os.sep), ("", *importlib.machinery.all_suffixes())
    return any(os.path.exists(os.path.join(folder, path + suffix)) for folder in folders for suffix in suffixes)


def importable(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # noqa: BLE001 - to find "a.b", a is imported, which may raise anything
        return False


class Folder:
    """The metadata of one distribution: a folder ``NAME-VERSION.dist-info`` or ``.egg-info``, or a file."""

    def __init__(self, place: str, name: str) -> None:
        self._place, self._name = place, name

    def read_text(self, name: str) -> str | None:
        """Return the text of a file in it, None if there is none; for an empty name, of itself."""
        path = os.path.join(self._place, self._name, name) if name else os.path.join(self._place, self._name)
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
            return None

    def locate_file(self, path: str) -> str:
        """Return the path of a file of the distribution."""
        return os.path.join(self._place, path) if path else self._place

    @property
    def distribution(self) -> str:
        """The normalized name of the distribution, by that of the folder."""
        return _normalized(self._name.rpartition(".")[0].partition("-")[0])


def distributions() -> Iterable[Any]:
    """Return all distributions on the path, each with ``read_text`` and ``locate_file``."""
    folders = _folders()
    return _metadata().distributions() if folders is None else folders


def _folders() -> Iterator[Folder] | None:
    """Return the distributions in the folders of the path; None if there may be others, in archives or by hooks."""
    # A backport for older Pythons adds a finder, so that what it does counts.
    if any(hasattr(finder, "find_distributions") and finder is not PathFinder for finder in sys.meta_path):
        return None
    if any(place.endswith(".egg") or os.path.isfile(place) for place in sys.path):
        return None
    return itertools.chain.from_iterable(map(_folders_in, dict.fromkeys(sys.path)))


def _folders_in(place: str) -> list[Folder]:
    try:
        names = os.listdir(place or os.curdir)
    except OSError:
        return []
    return [Folder(place, name) for name in names if name.lower().endswith((".dist-info", ".egg-info"))]


@functools.lru_cache(maxsize=128)
def _names_in(place: str, changed_ns: int) -> frozenset[str]:
    return frozenset(folder.distribution for folder in _folders_in(place))


def _changed_ns(place: str) -> int:
    try:
        return os.stat(place or os.curdir).st_mtime_ns
    except OSError:
        return 0


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requires(distribution: str) -> list[str]:
    """Return the requirements of an installed distribution, with their markers."""
    folders = _folders()
    name = _normalized(distribution)
    found = next((each for each in folders or () if each.distribution == name), None)
    text = None if found is None else found.read_text("METADATA")
    if text is None:
        return _metadata().requires(distribution) or []
    head = re.sub(r"\n[ \t]+", " ", text.partition("\n\n")[0])
    return re.findall(r"^Requires-Dist:[ \t]*(.*\S)", head, re.MULTILINE | re.IGNORECASE)


def installed(distribution: str) -> bool:
    """Return whether a distribution is installed."""
    if _folders() is not None:
        name = _normalized(distribution)
        return any(name in _names_in(place, _changed_ns(place)) for place in sys.path)
    try:
        _metadata().version(distribution)
    except _metadata().PackageNotFoundError:
        return False
    return True


def _metadata() -> Any:
    return __getattr__("metadata")
