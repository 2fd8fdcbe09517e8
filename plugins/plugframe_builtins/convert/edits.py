"""Edits of a script: collected by the rules, applied in one pass that keeps formatting and comments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import libcst as cst

from plugframe_builtins.convert.script import Script

#: Begins every comment that the command writes.
MARK = "# plugframe: "
#: Begins the text of one about code that does not run as it stands.
BY_HAND = "change by hand: "

_Result = cst.CSTNode | cst.FlattenSentinel[Any] | cst.RemovalSentinel


class Edits:
    """What changes: replaced nodes, removed and inserted statements, comments."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.replaced: dict[cst.CSTNode, list[Callable[[Any], _Result]]] = defaultdict(list)
        self.before: dict[cst.CSTNode, list[str]] = defaultdict(list)
        self.after: dict[cst.CSTNode, list[str]] = defaultdict(list)
        self.marks: dict[cst.CSTNode, list[str]] = defaultdict(list)
        self.removed: set[cst.CSTNode] = set()
        #: Nodes whose new text uses the `Lite` object.
        self.uses: list[cst.CSTNode] = []

    def __bool__(self) -> bool:
        return bool(self.replaced or self.before or self.after or self.removed)

    def replace(self, node: cst.CSTNode, new: Callable[[Any], _Result] | _Result | str, *, uses: bool = True) -> None:
        """Replace a node by another one, by an expression as text, or by what a function makes of its updated form."""
        made = expression(new) if isinstance(new, str) else new
        self.replaced[node].append(made if callable(made) else _Constant(made))
        if uses:
            self.uses.append(node)

    def remove(self, node: cst.CSTNode) -> bool:
        """Remove the statement that a node is part of; return whether it stands on a line of its own."""
        statement = self._script.statement(node)
        if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
            return False
        self.removed.add(statement)
        return True

    def insert_after(self, node: cst.CSTNode, text: str) -> None:
        """Insert a statement that uses the `Lite` object after the one that a node is part of."""
        statement = self._script.statement(node)
        assert statement is not None
        if text not in self.after[statement]:
            self.after[statement].append(text)
        self.uses.append(node)

    def insert_before(self, node: cst.CSTNode, text: str) -> None:
        """Insert a statement before the one that a node is part of."""
        statement = self._script.statement(node)
        assert statement is not None
        if text not in self.before[statement]:
            self.before[statement].append(text)

    def check(self, node: cst.CSTNode, text: str) -> None:
        """Write a comment above the statement of a node: something the author has to look at."""
        statement = self._script.statement(node)
        if statement is not None and text not in self.marks[statement]:
            self.marks[statement].append(text)

    def by_hand(self, node: cst.CSTNode, text: str) -> None:
        """Write a comment above the statement of a node: something that does not run as it stands."""
        self.check(node, BY_HAND + text)

    def apply(self) -> cst.Module:
        """Return the edited module."""
        return self._script.module.visit(_Editor(self))


class _Constant:
    """Replaces whatever it is called with."""

    def __init__(self, result: _Result) -> None:
        self._result = result

    def __call__(self, _: object) -> _Result:
        return self._result


class _Editor(cst.CSTTransformer):
    def __init__(self, edits: Edits) -> None:
        super().__init__()
        self._edits = edits
        self._gone: list[cst.CSTNode] = []

    def on_leave(self, original_node: cst.CSTNode, updated_node: Any) -> Any:
        edits = self._edits
        updated: Any = super().on_leave(original_node, updated_node)
        for make in edits.replaced.get(original_node, ()):
            if isinstance(updated, cst.CSTNode):
                updated = make(updated)
        if original_node in edits.removed:
            updated = cst.SimpleStatementLine([cst.Pass()], leading_lines=getattr(updated, "leading_lines", ()))
            self._gone.append(updated)
        if isinstance(updated, cst.If) and updated.orelse is None and not updated.body.body:
            updated = cst.SimpleStatementLine([cst.Pass()], leading_lines=updated.leading_lines)
            self._gone.append(updated)
        if isinstance(original_node, cst.BaseStatement):
            updated = self._surround(original_node, updated)
        if isinstance(updated, cst.IndentedBlock | cst.Module):
            updated = self._settle(updated)
        return updated

    def _surround(self, original: cst.CSTNode, updated: Any) -> Any:
        edits = self._edits
        before = [statement(text) for text in edits.before.get(original, ())]
        after = [statement(text) for text in edits.after.get(original, ())]
        marks = edits.marks.get(original, ())
        if not before and not after and not marks:
            return updated
        middle = list(updated) if isinstance(updated, cst.FlattenSentinel) else [updated]
        if before:
            before[0] = before[0].with_changes(leading_lines=middle[0].leading_lines)
            middle[0] = _with_lines(middle[0], [], self._gone)
        if marks and hasattr(middle[0], "leading_lines"):
            lines = list(middle[0].leading_lines)
            there = {line.comment.value for line in lines if line.comment is not None}
            new = [MARK + text for text in marks if MARK + text not in there]
            lines += [cst.EmptyLine(comment=cst.Comment(text)) for text in new]
            middle[0] = _with_lines(middle[0], lines, self._gone)
        return cst.FlattenSentinel([*before, *middle, *after])

    def _settle(self, block: Any) -> Any:
        """Take removed statements out; the comments above them go to the next statement."""
        body: list[Any] = []
        carried: list[cst.EmptyLine] = []
        for each in block.body:
            if any(each is gone for gone in self._gone):
                lines = list(each.leading_lines)
                carried += lines if any(line.comment is not None for line in lines) or not carried else []
                continue
            if carried:
                lines = list(each.leading_lines)
                if not any(line.comment is not None for line in carried) and lines and lines[0].comment is None:
                    carried = []
                each = each.with_changes(leading_lines=[*carried, *lines])
                carried = []
            if not body and isinstance(block, cst.IndentedBlock) and each is not block.body[0]:
                each = each.with_changes(leading_lines=_without_blanks(each.leading_lines))
            body.append(each)
        if len(body) == len(block.body) and all(a is b for a, b in zip(body, block.body, strict=True)):
            return block
        footer = [*(line for line in carried if line.comment is not None), *block.footer]
        return block.with_changes(body=body, footer=footer)


def _without_blanks(lines: Sequence[cst.EmptyLine]) -> list[cst.EmptyLine]:
    """Return lines above a statement without the blank ones they begin with."""
    start = next((index for index, line in enumerate(lines) if line.comment is not None), len(lines))
    return list(lines[start:])


def _with_lines(node: Any, lines: Sequence[cst.EmptyLine], gone: list[cst.CSTNode]) -> Any:
    changed = node.with_changes(leading_lines=lines)
    if any(node is each for each in gone):
        gone.append(changed)
    return changed


def statement(text: str) -> cst.SimpleStatementLine:
    """Parse one simple statement."""
    parsed = cst.parse_statement(text)
    assert isinstance(parsed, cst.SimpleStatementLine)
    return parsed


def expression(text: str) -> cst.BaseExpression:
    """Parse an expression."""
    return cst.parse_expression(text)


def call(target: str, *values: cst.BaseExpression | cst.Arg, like: cst.Call | None = None) -> cst.Call:
    """Return a call of `target` (a dotted name), its commas set anew."""
    args = [value if isinstance(value, cst.Arg) else cst.Arg(value) for value in values]
    spaced = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    keep = like is not None and len(like.args) == len(args)
    if not keep:
        args = [
            arg.with_changes(
                comma=arg.comma
                if isinstance(arg.comma, cst.Comma) and index + 1 < len(args)
                else spaced
                if index + 1 < len(args)
                else cst.MaybeSentinel.DEFAULT
            )
            for index, arg in enumerate(args)
        ]
    return cst.Call(expression(target), args)


def keyword(name: str, text: str) -> cst.Arg:
    """Return an argument by keyword, without spaces around its equals sign."""
    none = cst.SimpleWhitespace("")
    return cst.Arg(expression(text), cst.Name(name), cst.AssignEqual(none, none))


def without(node: cst.Call, *names: str) -> cst.Call:
    """Return a call without some of its keyword arguments."""
    args = [each for each in node.args if each.keyword is None or each.keyword.value not in names]
    if len(args) != len(node.args) and args:
        last = node.args[-1]
        args[-1] = args[-1].with_changes(comma=last.comma, whitespace_after_arg=last.whitespace_after_arg)
    return node.with_changes(args=args)


def renamed(attribute: str) -> Callable[[cst.Attribute], cst.Attribute]:
    """Return an edit that changes the last name of a chain of attributes."""
    return lambda node: node.with_changes(attr=cst.Name(attribute))
