"""Whether a call is in the body of the script, where every process that imports the script would make it again."""

from __future__ import annotations

import ast
import linecache
import sys
from types import FrameType


def is_unguarded() -> bool:
    """Return whether the running script reached this call outside of ``if __name__ == "__main__":``.

    False where there is no script (a notebook, a prompt), or if its source cannot be read.
    """
    frame = _body_of_script()
    if frame is None:
        return False
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    except SyntaxError:
        return False
    running = (node for node in tree.body if node.lineno <= frame.f_lineno <= (node.end_lineno or node.lineno))
    statement = next(running, None)
    return statement is not None and not _is_guard(statement)


def _body_of_script() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return frame if "__file__" in frame.f_globals else None
        frame = frame.f_back
    return None


def _is_guard(statement: ast.stmt) -> bool:
    names = ast.walk(statement.test) if isinstance(statement, ast.If) else ()
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in names)
