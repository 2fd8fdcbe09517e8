"""Environment variables that libraries read when they are imported.

A script that sets one before it imports torch expects it to act. In a forked rank torch is imported already.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from plugframe.errors import PlugframeWarning

#: Beginnings of the names that torch, NumPy, OpenMP and the libraries of linear algebra read at import.
_PREFIXES = (
    *("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "NUMEXPR_", "NUMPY_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTORCH_"),
    "TORCH",
)
_OWN = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep, os.path.dirname(os.__file__) + os.sep)
_ASSIGNED = re.compile(rf"""(?:environ|putenv)[^\n'"]*['"]((?:{"|".join(_PREFIXES)})\w*)['"]""")


def assigned_in(command: Sequence[str]) -> str | None:
    """Return the first such variable that the text of a script mentions with the environment; None without one.

    Args:
        command: `Job.command`.
    """
    for path in _files(command):
        try:
            found = _ASSIGNED.search(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        return found[1] if found is not None else None
    return None


def warn_of_assignments() -> None:
    """Warn from now on if code outside of installed packages sets such a variable in this process."""
    warned: set[str] = set()

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event != "os.putenv":
            return
        name = arguments[0].decode(errors="replace") if isinstance(arguments[0], bytes) else str(arguments[0])
        if not name.startswith(_PREFIXES) or name in warned or not _is_users(sys._getframe(1)):
            return
        warned.add(name)
        text = (
            f"{name} is set after torch was imported, and has no effect: ranks are forked from the launcher. "
            "Set it in the shell, or use --launcher.start-method=spawn."
        )
        warnings.warn(text, PlugframeWarning, stacklevel=_depth(sys._getframe(1)))

    sys.addaudithook(look)  # it cannot be removed, and ends with the rank


def _files(command: Sequence[str]) -> list[Path]:
    if command[0] != "-m":
        return [Path(command[0])]
    module = Path(*command[1].split("."))
    return [module.with_suffix(".py"), module / "__main__.py"]


def _caller(frame: FrameType | None) -> FrameType | None:
    """Return the frame that assigned to ``os.environ``."""
    while frame is not None and frame.f_code.co_filename == os._Environ.__setitem__.__code__.co_filename:
        frame = frame.f_back
    return frame


def _depth(frame: FrameType) -> int:
    depth, caller = 2, _caller(frame)
    while frame is not caller and frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _is_users(frame: FrameType) -> bool:
    caller = _caller(frame)
    if caller is None:
        return False
    file = caller.f_code.co_filename
    return not file.startswith("<") and "site-packages" not in file and not file.startswith(_OWN)
