"""Environment variables that libraries read when they are imported.

A script that sets one before it imports torch expects it to act. In a forked rank torch is imported already.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import MutableMapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType

from plugframe.errors import PlugframeWarning

#: The names that torch, NumPy, OpenMP and the libraries of linear algebra read at import;
#: TORCHELASTIC_* are the launcher's.
_NAMES = r"(?:(?:ATEN|DNNL|GOMP|KMP|MKL|NUMEXPR|NUMPY|OMP|ONEDNN|OPENBLAS|PYTORCH)_|TORCH(?!ELASTIC_))\w*"
_OWN = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep, os.path.dirname(os.__file__) + os.sep)
_MENTIONED = re.compile(rf"""(?:environ|putenv)[^\n'"]*['"]({_NAMES})['"]""")
#: Files of the standard library between an assignment (``update``, ``setdefault``) and ``__setitem__``.
_BETWEEN = {method.__code__.co_filename for method in (os._Environ.__setitem__, MutableMapping.update)}


def mentioned_in(command: Sequence[str]) -> str | None:
    """Return the first such variable that the text of a script mentions with the environment; None without one.

    Args:
        command: `Job.command`.
    """
    for path in _files(command):
        try:
            found = _MENTIONED.search(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        return found[1] if found is not None else None
    return None


def warn_of_assignments() -> None:
    """Warn from now on if code outside of installed packages sets such a variable in this process."""
    # Not an audit hook: it would make every call of id() six times slower (Python 3.11).
    os.environ.__class__ = _Watched


class _Watched(os._Environ):  # type: ignore[type-arg]
    """``os.environ`` of a rank whose torch is imported already."""

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(name, value)
        depth, frame = 2, sys._getframe(1)
        while frame.f_code.co_filename in _BETWEEN and frame.f_back is not None:
            depth, frame = depth + 1, frame.f_back
        if _is_read_at_import(name) and _is_users(frame):
            text = (
                f"{name} is set after torch was imported, and has no effect: ranks are forked from the launcher. "
                "Set it in the shell, or use --launcher.start-method=spawn."
            )
            warnings.warn(text, PlugframeWarning, stacklevel=depth)


def _is_read_at_import(name: str) -> bool:
    return re.fullmatch(_NAMES, name) is not None


def _files(command: Sequence[str]) -> list[Path]:
    if command[0] != "-m":
        return [Path(command[0])]
    # Not find_spec(), which would import the parent packages.
    top, *rest = command[1].split(".")
    spec = PathFinder.find_spec(top, [os.getcwd(), *sys.path])
    if spec is None or spec.origin is None:
        return []
    if spec.submodule_search_locations is None:
        return [Path(spec.origin)]
    module = Path(spec.submodule_search_locations[0], *rest)
    return [module.with_suffix(".py"), module / "__main__.py"]


def _is_users(frame: FrameType) -> bool:
    if frame.f_globals.get("__name__") == "__main__":
        return True
    file = frame.f_code.co_filename
    return not file.startswith("<") and "site-packages" not in file and not file.startswith(_OWN)
