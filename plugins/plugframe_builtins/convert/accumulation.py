"""Turn ``with accelerator.accumulate(model):`` into a loop over ``lite.accumulate``, which steps at the end of it."""

from __future__ import annotations

from typing import Any

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call, expression, keyword
from plugframe_builtins.convert.roles import LITE
from plugframe_builtins.convert.script import Scope, code, dotted, find, method

_STEPS = ("step", "zero_grad")
#: Functions around a loader whose loop has an item for each batch.
_AROUND = ("enumerate", "tqdm", "tqdm.tqdm", "trange", "track")


def convert(c: Conversion, steps: str) -> None:
    """Accumulate in the loop over the loader, where the context is all that accumulates in it."""
    contexts = [(node, found) for node, scope in c.script.all(cst.With) if (found := _accumulates(c, node, scope))]
    for node, found in contexts:
        lite = code(found.func.value) if isinstance(found.func, cst.Attribute) else ""
        loop = next((each for each in c.script.ancestors(node) if isinstance(each, cst.For | cst.FunctionDef)), None)
        others = [other for other, _ in contexts if other is not node and loop and c.script.inside(other, loop)]
        direct = isinstance(loop, cst.For) and c.script.parents[node] is loop.body
        if not isinstance(loop, cst.For) or not direct or others or not isinstance(node.body, cst.IndentedBlock):
            c.edits.by_hand(node, f"for batch in {lite}.accumulate(loader, model, steps={steps}): in place of this.")
            continue
        _accumulate(c, node, found, loop, lite, steps)


def _accumulates(c: Conversion, node: cst.With, scope: Scope) -> cst.Call | None:
    if len(node.items) != 1:
        return None
    found = method(node.items[0].item)
    if found is None or found[1] != "accumulate" or c.roles.of(found[0], scope) != LITE:
        return None
    item = node.items[0].item
    return item if isinstance(item, cst.Call) else None


def _accumulate(c: Conversion, node: cst.With, found: cst.Call, loop: cst.For, lite: str, steps: str) -> None:
    models = [each.with_changes(comma=cst.MaybeSentinel.DEFAULT) for each in found.args]
    c.edits.replace(
        _loader(loop.iter),
        lambda updated: call(f"{lite}.accumulate", updated, *models, keyword("steps", steps)),
    )
    if steps != "1":
        c.edits.check(loop, f"a last step of fewer batches is their mean: Accelerate divides by {steps} there too.")
    _only_last(c, list(node.body.body), f"not {lite}.accumulating")
    for attribute in find(loop.body, cst.Attribute):
        if attribute.attr.value == "sync_gradients" and dotted(attribute.value) == lite:
            parent = c.script.parents[attribute]
            plain = isinstance(parent, cst.If) or (isinstance(parent, cst.BooleanOperation) and not parent.lpar)
            text = f"not {lite}.accumulating"
            c.edits.replace(attribute, text if plain else f"({text})")
    c.edits.replace(node, _unwrapped)


def _loader(node: cst.BaseExpression) -> cst.BaseExpression:
    """Return the loader in ``enumerate(tqdm(loader))``."""
    while isinstance(node, cst.Call) and dotted(node.func) in _AROUND and node.args:
        node = node.args[0].value
    return node


def _unwrapped(node: cst.With) -> Any:
    """Return the statements of a block, in its place."""
    body = list(node.body.body)
    first: Any = body[0]
    body[0] = first.with_changes(leading_lines=[*node.leading_lines, *first.leading_lines])
    return cst.FlattenSentinel(body)


def _only_last(c: Conversion, body: list[cst.CSTNode], condition: str) -> None:
    """Put the calls of ``step`` and ``zero_grad`` that follow each other into one ``if``."""
    run: list[cst.SimpleStatementLine] = []
    for each in [*body, None]:
        if isinstance(each, cst.SimpleStatementLine) and _steps(each):
            run.append(each)
            continue
        if run:
            inner = [one.with_changes(leading_lines=()) if one is run[0] else one for one in run]
            block = cst.If(expression(condition), cst.IndentedBlock(inner), leading_lines=run[0].leading_lines)
            c.edits.replace(run[0], block)
            c.edits.removed.update(run[1:])
        run = []


def _steps(node: cst.SimpleStatementLine) -> bool:
    small = node.body[0]
    found = method(small.value) if isinstance(small, cst.Expr) and len(node.body) == 1 else None
    return found is not None and found[1] in _STEPS
