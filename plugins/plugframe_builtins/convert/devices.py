"""Devices come from plugframe: what set-up and loaders move is not moved again."""

from __future__ import annotations

import re

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call
from plugframe_builtins.convert.roles import DEVICE, MODEL, assignments
from plugframe_builtins.convert.script import Scope, code, dotted, method, names


def convert(c: Conversion) -> None:
    """Take the device from plugframe, and leave out what set-up and loaders do."""
    for scope in c.script.scopes:
        for _, value, node in assignments(scope):
            made = isinstance(node, cst.Assign) and isinstance(value, cst.Call | cst.IfExp)
            if made and c.roles.infer(value, scope) == DEVICE:
                c.edits.replace(value, f"{c.lite}.device")
        for node in scope.all(cst.Call):
            _to_device(c, node, scope)


def _to_device(c: Conversion, node: cst.Call, scope: Scope) -> None:
    found = method(node)
    if found is None or found[1] not in ("to", "cuda") or not _is_move(c, node, found[1], scope):
        return
    value = found[0]
    statement = c.script.parents[node]
    target = statement.targets[0].target if isinstance(statement, cst.Assign) else value
    if MODEL in (c.roles.infer(value, scope), c.roles.of(target, scope)):
        _model_move(c, node, value, scope)
    elif _moves_batch(c, node, scope):
        c.edits.remove(node)
    elif found[1] == "cuda":
        c.edits.replace(node, lambda updated: call(f"{c.lite}.to_device", updated.func.value))
    elif _names_device(c, node.args[0].value, scope):
        c.edits.replace(node.args[0].value, f"{c.lite}.device")


def _names_device(c: Conversion, node: cst.BaseExpression, scope: Scope) -> bool:
    """Return whether an expression names a device itself, and is not a variable that holds one."""
    if isinstance(node, cst.Name | cst.Attribute):
        first, _, last = dotted(node).rpartition(".")
        settings = first in ("args", "cfg", "config", "opt", "opts", "options", "hparams", "FLAGS")
        return c.roles.infer(node, scope) in ("rank", "local_rank") or (settings and last in ("device", "gpu"))
    return True


def _is_move(c: Conversion, node: cst.Call, name: str, scope: Scope) -> bool:
    """Return whether a call moves something to a device, and changes nothing else."""
    if name == "cuda":
        return True
    if not node.args or (node.args[0].keyword is not None and node.args[0].keyword.value != "device"):
        return False
    value = node.args[0].value
    if any(each.keyword is not None and each.keyword.value == "dtype" for each in node.args):
        return False
    text = code(value).strip("\"'")
    last = dotted(value).rpartition(".")[2].lower()
    return (
        c.roles.infer(value, scope) in (DEVICE, "rank", "local_rank")
        or last in ("device", "dev", "gpu", "gpu_id", "local_rank", "rank")
        or re.fullmatch(r"cuda(:\d+)?", text) is not None
        or (text.startswith(("f'cuda", 'f"cuda', "cuda:")))
    )


def _model_move(c: Conversion, node: cst.Call, value: cst.BaseExpression, scope: Scope) -> None:
    """Leave a model where it is if set-up moves it; one that is not trained is moved."""
    statement = c.script.parents[node]
    target = dotted(statement.targets[0].target) if isinstance(statement, cst.Assign) else dotted(value)
    if not _is_set_up(c, target):
        name = method(node)
        if name is not None and name[1] == "cuda":
            c.edits.replace(node, lambda updated: call(f"{c.lite}.to_device", updated.func.value))
        elif _names_device(c, node.args[0].value, scope):
            c.edits.replace(node.args[0].value, f"{c.lite}.device")
        return
    alone = isinstance(statement, cst.Expr) or (isinstance(statement, cst.Assign) and target == dotted(value))
    if not (alone and c.edits.remove(node)):
        c.edits.replace(node, lambda updated: updated.func.value, uses=False)


def _is_set_up(c: Conversion, name: str) -> bool:
    """Return whether a model of that name gets an optimizer somewhere."""
    last = name.rpartition(".")[2]
    for texts in c.edits.after.values():
        for text in texts:
            targets = text.partition(" = ")[0].split(", ")
            if ".setup" in text and any(each.rpartition(".")[2] == last for each in targets):
                return True
    return False


def _moves_batch(c: Conversion, node: cst.Call, scope: Scope) -> bool:
    """Return whether a statement only moves variables of a loop over a loader: ``x, y = x.to(d), y.to(d)``."""
    loop = c.loader_loop(node)
    statement = c.script.statement(node)
    if loop is None or not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return False
    assign = statement.body[0]
    if not isinstance(assign, cst.Assign) or len(assign.targets) != 1:
        return False
    goal, value = assign.targets[0].target, assign.value
    pairs: list[tuple[cst.BaseExpression, cst.BaseExpression]] = [(goal, value)]
    if isinstance(goal, cst.Tuple) and isinstance(value, cst.Tuple) and len(goal.elements) == len(value.elements):
        pairs = [(a.value, b.value) for a, b in zip(goal.elements, value.elements, strict=True)]
    batch = {each.value for each in names(loop.target)} if isinstance(loop, cst.For) else set()
    for one, other in pairs:
        found = method(other)
        if found is None or found[1] not in ("to", "cuda") or dotted(found[0]) != dotted(one) or not dotted(one):
            return False
        assert isinstance(other, cst.Call)
        if dotted(one) not in batch or not _is_move(c, other, found[1], scope):
            return False
    return True
