"""``with accelerator.accumulate(model):`` written out: the last micro-batch of a step synchronises and steps."""

from __future__ import annotations

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call, expression
from plugframe_builtins.convert.roles import LITE
from plugframe_builtins.convert.script import Scope, argument, calls, code, dotted, find, method

LAST = "is_last"
_STEPS = ("step", "zero_grad")


def convert(c: Conversion, steps: str) -> None:
    """Write accumulation out, where its loop shows which micro-batch is the last."""
    if steps == "1":
        steps = ""
    for node, scope in c.script.all(cst.With):
        found = _accumulates(c, node, scope)
        if found is None:
            continue
        lite = code(found.func.value) if isinstance(found.func, cst.Attribute) else ""
        loop = next((each for each in c.script.ancestors(node) if isinstance(each, cst.For | cst.FunctionDef)), None)
        index = _index(loop) if isinstance(loop, cst.For) else ""
        if not isinstance(loop, cst.For) or c.script.parents[node] is not loop.body:
            c.edits.by_hand(node, f"{lite}.no_backward_sync(model, enabled=not last), and divide the loss.")
            continue
        _write_out(c, node, found, loop, index, steps or "1")


def _accumulates(c: Conversion, node: cst.With, scope: Scope) -> cst.Call | None:
    if len(node.items) != 1:
        return None
    found = method(node.items[0].item)
    if found is None or found[1] != "accumulate" or c.roles.of(found[0], scope) != LITE:
        return None
    item = node.items[0].item
    return item if isinstance(item, cst.Call) else None


def _index(loop: cst.For) -> str:
    """Return the variable that counts the batches of ``for i, batch in enumerate(loader):``."""
    counts = isinstance(loop.iter, cst.Call) and dotted(loop.iter.func) == "enumerate" and len(loop.iter.args) == 1
    if not counts or not isinstance(loop.target, cst.Tuple):
        return ""
    return dotted(loop.target.elements[0].value)


def _write_out(c: Conversion, node: cst.With, found: cst.Call, loop: cst.For, index: str, steps: str) -> None:
    lite = code(found.func.value) if isinstance(found.func, cst.Attribute) else ""
    loader = argument(loop.iter, "iterable", 0) if index and isinstance(loop.iter, cst.Call) else loop.iter
    assert loader is not None
    number = index or "batch_index"
    if not index:
        target, text = code(loop.target), code(loop.iter)
        bracketed = f"({target})" if isinstance(loop.target, cst.Tuple) and not loop.target.lpar else target
        new = cst.parse_statement(f"for {number}, {bracketed} in enumerate({text}):\n    pass\n")
        assert isinstance(new, cst.For)
        goal, iterated = new.target, new.iter
        c.edits.replace(loop.target, goal)
        c.edits.replace(loop.iter, iterated)
    c.edits.insert_before(node, f"{LAST} = ({number} + 1) % {steps} == 0 or {number} + 1 == len({code(loader)})")
    model = code(found.args[0].value)
    context = f"{lite}.no_backward_sync({model}, enabled=not {LAST})"
    c.edits.replace(found, context)
    for each in calls(node.body):
        name = method(each)
        if name is not None and name[1] == "backward" and each.args:
            _divide(c, each, steps)
    _only_last(c, list(node.body.body))
    for attribute in find(node.body, cst.Attribute):
        if attribute.attr.value == "sync_gradients":
            c.edits.replace(attribute, LAST)


def _divide(c: Conversion, node: cst.Call, steps: str) -> None:
    if steps == "1":
        return

    def change(updated: cst.Call) -> cst.Call:
        value = updated.args[0].value
        simple = isinstance(value, cst.Name | cst.Attribute | cst.Call | cst.Subscript) or value.lpar
        text = code(value) if simple else f"({code(value)})"
        return call(code(updated.func), expression(f"{text} / {steps}"), *updated.args[1:])

    c.edits.replace(node, change)


def _only_last(c: Conversion, body: list[cst.CSTNode]) -> None:
    """Put the calls of ``step`` and ``zero_grad`` that follow each other into one ``if``."""
    run: list[cst.SimpleStatementLine] = []
    for each in [*body, None]:
        if isinstance(each, cst.SimpleStatementLine) and _steps(each):
            run.append(each)
            continue
        if run:
            inner = [one.with_changes(leading_lines=()) if one is run[0] else one for one in run]
            block = cst.If(cst.Name(LAST), cst.IndentedBlock(inner), leading_lines=run[0].leading_lines)
            c.edits.replace(run[0], block)
            c.edits.removed.update(run[1:])
        run = []


def _steps(node: cst.SimpleStatementLine) -> bool:
    small = node.body[0]
    found = method(small.value) if isinstance(small, cst.Expr) and len(node.body) == 1 else None
    return found is not None and found[1] in _STEPS
