"""``torch.save`` and ``torch.load`` of training states."""

from __future__ import annotations

from collections.abc import Callable

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call
from plugframe_builtins.convert.roles import assignments
from plugframe_builtins.convert.script import Scope, argument, code, dotted, method


def convert(c: Conversion) -> None:
    """Save and load training states with the checkpoint plugin."""
    for node, scope in c.script.all(cst.Call):
        name = c.script.qualified(node.func)
        if name == "torch.save":
            _save(c, node, scope)
        elif name == "torch.load" and _is_state(c, node, scope):
            _load(c, node)


def _save(c: Conversion, node: cst.Call, scope: Scope) -> None:
    value, path = argument(node, "obj", 0), argument(node, "f", 1)
    if value is None or path is None or not _is_mapping(value, scope, lambda place: c.script.is_before(place, node)):
        text = f"every rank writes this: 'if {c.lite}.is_global_zero:', or {c.lite}.save() for a dict of states."
        c.edits.check(node, text)
        return
    args = (value, path)
    plain = all(each.keyword is None for each in node.args) and len(node.args) == len(args)

    def change(updated: cst.Call) -> cst.Call:
        first, second = argument(updated, "obj", 0), argument(updated, "f", 1)
        assert first is not None
        assert second is not None
        name = f"{c.lite}.save"
        if plain:
            return updated.with_changes(func=cst.Attribute(cst.Name(c.lite), cst.Name("save")))
        return call(name, first, second)

    c.edits.replace(node, change)


def _is_mapping(value: cst.BaseExpression, scope: Scope, is_before: Callable[[cst.CSTNode], bool]) -> bool:
    """Return whether a value is a dict of states, where it is saved."""
    found = method(value)
    if isinstance(value, cst.Dict) or (found is not None and found[1] == "state_dict"):
        return True
    if isinstance(value, cst.Call):
        return dotted(value.func) == "dict"
    text = dotted(value)
    before = [each for target, each, place in assignments(scope) if text and target == text and is_before(place)]
    return bool(before) and dotted(before[-1]) != text and _is_mapping(before[-1], scope, is_before)


def _is_state(c: Conversion, node: cst.Call, scope: Scope) -> bool:
    """Return whether what is loaded goes into ``load_state_dict``, or is indexed by keys."""
    parent = c.script.parents[node]
    if isinstance(parent, cst.Arg):
        found = method(c.script.parents[parent])
        return found is not None and found[1] == "load_state_dict"
    if isinstance(parent, cst.Subscript):
        return True
    if not isinstance(parent, cst.Assign) or not isinstance(parent.targets[0].target, cst.Name):
        return False
    name = parent.targets[0].target.value
    for each in scope.nodes:
        if isinstance(each, cst.Subscript) and dotted(each.value) == name and '["' in code(each).replace("'", '"'):
            return True
        found = method(each)
        if found is not None and found[1] == "load_state_dict" and name in _arguments(each):
            return True
    return False


def _load(c: Conversion, node: cst.Call) -> None:
    c.edits.replace(node, lambda updated: call(f"{c.lite}.load", updated.args[0].with_changes(keyword=None).value))


def _arguments(node: cst.CSTNode) -> list[str]:
    return [dotted(each.value) for each in node.args] if isinstance(node, cst.Call) else []
