"""Code that only rank 0 runs: what all ranks must call comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import expression
from plugframe_builtins.convert.roles import LOCAL_RANK, RANK
from plugframe_builtins.convert.script import Scope, calls, code, dotted, method, names

#: Calls that every rank makes, `print` among them since it chooses the rank itself.
_EVERYWHERE = (
    "save",
    "load",
    "all_reduce",
    "all_gather",
    "gather_for_metrics",
    "barrier",
    "print",
    "state_dict",
    "broadcast",
)


def convert(c: Conversion) -> None:
    """Split the blocks of ``if rank == 0:``."""
    for node, scope in c.script.all(cst.If):
        rest = without_rank(c, node.test, scope)
        if rest is None:
            continue
        if node.orelse is not None or not isinstance(node.body, cst.IndentedBlock):
            if any(_on_every_rank(c, each, scope) == "collective" for each in node.body.body):
                c.edits.by_hand(node, "every rank must make the collective calls in this block.")
            _replace_test(c, node, rest)
            continue
        groups = _groups(c, list(node.body.body), scope)
        if all(kind == "zero" for kind, _ in groups):
            _replace_test(c, node, rest)
            continue
        c.edits.replace(node, partial(_split, c, groups, rest))


def _replace_test(c: Conversion, node: cst.If, rest: str) -> None:
    text = f"{c.lite}.is_global_zero" + (f" and {rest}" if rest else "")
    if code(node.test) != text and f"{c.lite}.is_global_zero" not in code(node.test):
        c.edits.replace(node.test, text)


def without_rank(c: Conversion, test: cst.BaseExpression, scope: Scope) -> str | None:
    """Return a condition without its ``rank == 0``: ``""`` if nothing is left, None if it has none."""
    if is_rank_zero(c, test, scope):
        return ""
    if isinstance(test, cst.BooleanOperation) and isinstance(test.operator, cst.And):
        left, right = (without_rank(c, each, scope) for each in (test.left, test.right))
        if left is not None or right is not None:
            texts = [code(test.left) if left is None else left, code(test.right) if right is None else right]
            return " and ".join(each for each in texts if each)
    return None


def is_rank_zero(c: Conversion, test: cst.BaseExpression, scope: Scope) -> bool:
    """Return whether a condition holds on rank 0 alone."""
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        return _is_rank(c, test.expression, scope)
    if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
        right = test.comparisons[0]
        texts = {"==": ("0",), "in": ("[-1, 0]", "(-1, 0)", "[0, -1]", "{-1, 0}")}
        word = {cst.Equal: "==", cst.In: "in"}.get(type(right.operator), "")
        return code(right.comparator) in texts.get(word, ()) and _is_rank(c, test.left, scope)
    if isinstance(test, cst.Call):
        function = c.script.functions.get(dotted(test.func))
        returned = function.all(cst.Return) if function is not None else []
        return (
            len(returned) == 1
            and function is not None
            and returned[0].value is not None
            and is_rank_zero(c, returned[0].value, function)
        )
    return (
        isinstance(test, cst.Attribute)
        and test.attr.value in ("is_global_zero", "is_main_process")
        and c.is_lite(test.value, scope)
    )


def _is_rank(c: Conversion, node: cst.BaseExpression, scope: Scope) -> bool:
    if isinstance(node, cst.Attribute) and c.is_lite(node.value, scope):
        return node.attr.value in ("global_rank", "local_rank")
    if c.roles.infer(node, scope) in (RANK, LOCAL_RANK):
        return True
    last = dotted(node).rpartition(".")[2]
    return last in ("rank", "local_rank", "global_rank")


def _on_every_rank(c: Conversion, node: cst.CSTNode, scope: Scope, depth: int = 0) -> str:
    """Return ``"print"`` or ``"collective"`` if a statement belongs on every rank, else ``""``."""
    kinds = ""
    for call in calls(node):
        found = method(call)
        if found is not None and c.is_lite(found[0], scope) and found[1] in _EVERYWHERE:
            kinds = "collective" if found[1] != "print" else kinds or "print"
        function = c.called(call)
        if function is not None and depth < 4 and _on_every_rank(c, function.node, function, depth + 1) == "collective":
            kinds = "collective"
    if kinds == "print" and not depth and not _is_expression(node):
        return ""
    return kinds


def _is_expression(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and isinstance(node.body[0], cst.Expr)


def _groups(c: Conversion, body: Sequence[cst.BaseStatement], scope: Scope) -> list[tuple[str, list[int]]]:
    """Group the statements of a block by whether rank 0 alone runs them; variables are set on all."""
    kinds = ["all" if _on_every_rank(c, each, scope) else "zero" for each in body]
    needed: set[str] = set()
    for index in reversed(range(len(body))):
        statement = body[index]
        if kinds[index] == "zero" and "all" in kinds and isinstance(statement, cst.SimpleStatementLine):
            small = statement.body[0]
            if isinstance(small, cst.Assign) and (dotted(small.targets[0].target) in needed or not calls(small.value)):
                kinds[index] = "all"
        if kinds[index] == "all":
            needed |= {each.value for each in names(statement)}
    groups: list[tuple[str, list[int]]] = []
    for index, kind in enumerate(kinds):
        if groups and groups[-1][0] == kind:
            groups[-1][1].append(index)
        else:
            groups.append((kind, [index]))
    return groups


def _split(
    c: Conversion, groups: list[tuple[str, list[int]]], rest: str, node: cst.If
) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
    pieces: list[cst.BaseStatement] = []
    body = list(node.body.body)
    for kind, indices in groups:
        statements = [body[index] for index in indices]
        if kind == "zero":
            block = node.body.with_changes(body=statements, footer=())
            pieces.append(cst.If(expression(f"{c.lite}.is_global_zero"), block))
        else:
            pieces += statements  # type: ignore[arg-type]
    if rest:
        return node.with_changes(test=expression(rest), body=node.body.with_changes(body=pieces))
    if hasattr(pieces[0], "leading_lines"):
        own = list(getattr(pieces[0], "leading_lines", ()))
        pieces[0] = pieces[0].with_changes(leading_lines=[*node.leading_lines, *own])
    return cst.FlattenSentinel(pieces)
