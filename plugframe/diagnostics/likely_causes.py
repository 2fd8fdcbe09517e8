"""Find likely causes of diverging ranks in the user's source code."""

from __future__ import annotations

import ast
import linecache
import re

from plugframe.diagnostics.call_log import Call, site

#: Matches conditions that depend on the rank.
_RANK_CONDITION = re.compile(r"is_global_zero|\brank\b|_rank\b|\brank_zero")


def source(call: Call) -> str:
    """Return the source line of a call without trailing comment, empty if it cannot be read."""
    return linecache.getline(call.file, call.line).partition("  # ")[0].strip()


def under_rank_condition(call: Call) -> str:
    """Return the rank condition around a call: ``'if lite.is_global_zero:' (train.py:56)``; empty for none."""
    for node, branch in reversed(_around(call)):
        if isinstance(node, ast.If) and branch != "test" and _RANK_CONDITION.search(ast.unparse(node.test)):
            word = "else of " if branch == "orelse" else ""
            return f"{word}'if {ast.unparse(node.test)}:' ({site(call.file, node.lineno)})"
    return ""


def under_swallowing(call: Call) -> str:
    """Return the handler around a call that does not re-raise: ``'except ValueError:' (a.py:9)``; empty for none."""
    for node, branch in reversed(_around(call)):
        if not isinstance(node, ast.Try) or branch != "body":
            continue
        for handler in node.handlers:
            if not any(isinstance(part, ast.Raise) for part in ast.walk(handler)):
                caught = f" {ast.unparse(handler.type)}" if handler.type is not None else ""
                return f"'except{caught}:' ({site(call.file, handler.lineno)})"
    return ""


def in_loop(call: Call) -> str:
    """Return the innermost loop around a call: ``'for batch in loader:' (train.py:4)``, empty for none."""
    return next((_loop_text(call, loop) for loop in _loops(call)), "")


def loop_left(inside: Call, other: Call) -> str:
    """Return the loop around the first call that ends before the other one; empty if there is none."""
    if inside.file != other.file:
        return ""
    loops = [loop for loop in _loops(inside) if other.line > (loop.end_lineno or loop.lineno)]
    return _loop_text(inside, loops[-1]) if loops else ""


def _loops(call: Call) -> list[ast.For | ast.While]:
    """Return the loops around a call, the innermost first."""
    return [n for n, branch in reversed(_around(call)) if branch == "body" and isinstance(n, ast.For | ast.While)]


def _loop_text(call: Call, loop: ast.For | ast.While) -> str:
    if isinstance(loop, ast.For):
        head = f"for {ast.unparse(loop.target)} in {ast.unparse(loop.iter)}:"
    else:
        head = f"while {ast.unparse(loop.test)}:"
    return f"'{head}' ({site(call.file, loop.lineno)})"


def _around(call: Call) -> list[tuple[ast.AST, str]]:
    """Return the statements around a line, the outermost first, each with the name of the AST field."""
    try:
        tree: ast.AST = ast.parse("".join(linecache.getlines(call.file)))
    except (SyntaxError, ValueError):
        return []
    found: list[tuple[ast.AST, str]] = []
    node: ast.AST | None = tree
    while node is not None:
        inner = None
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                first, last = getattr(child, "lineno", None), getattr(child, "end_lineno", None)
                if isinstance(child, ast.ExceptHandler | ast.stmt | ast.match_case) and _spans(
                    child, first, last, call
                ):
                    inner = (child, name)
        if inner is None:
            return found
        found.append((node, inner[1]))
        node = inner[0]
    return found


def _spans(node: ast.AST, first: int | None, last: int | None, call: Call) -> bool:
    if isinstance(node, ast.match_case):
        first, last = node.pattern.lineno, node.body[-1].end_lineno
    return first is not None and last is not None and first <= call.line <= last
