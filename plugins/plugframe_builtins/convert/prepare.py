"""``accelerator.prepare(...)``: models with their optimizers, and loaders, are set up; schedulers stay."""

from __future__ import annotations

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import statement
from plugframe_builtins.convert.roles import LITE, LOADER, MODEL, OPTIMIZER, SCHEDULER, assignments
from plugframe_builtins.convert.script import Scope, code, dotted, method
from plugframe_builtins.convert.steps import _forward_methods

#: Parts of names that tell what a variable holds, where its value does not.
_WORDS = {"loader": LOADER, "model": MODEL, "net": MODEL, "optim": OPTIMIZER, "sched": SCHEDULER}


def convert(c: Conversion) -> dict[str, str]:
    """Replace the calls; return what was prepared, by variable, with its role."""
    prepared: dict[str, str] = {}
    for node, scope in c.script.all(cst.Call):
        found = method(node)
        if found is not None and found[1] == "prepare" and c.roles.of(found[0], scope) == LITE:
            prepared |= _prepare(c, node, code(found[0]), scope)
    for node, scope in c.script.all(cst.Call):
        found = method(node)
        if found is not None and found[1] == "register_for_checkpointing" and c.roles.of(found[0], scope) == LITE:
            prepared |= {dotted(each.value): SCHEDULER for each in node.args}
    return prepared


def _role(c: Conversion, node: cst.BaseExpression, scope: Scope) -> str:
    role = c.roles.infer(node, scope)
    words = [role for word, role in _WORDS.items() if word in dotted(node).lower()]
    return role or (words[0] if words else "")


def _prepare(c: Conversion, node: cst.Call, lite: str, scope: Scope) -> dict[str, str]:
    values = [each.value for each in node.args]
    targets = _targets(c, node)
    roles = [_role(c, each, scope) for each in values]
    known = (MODEL, OPTIMIZER, LOADER, SCHEDULER)
    if len(targets) != len(values) or not all(role in known for role in roles):
        c.edits.by_hand(node, f"{lite}.setup(model, optimizer), {lite}.setup_dataloaders(loader); schedulers stay.")
        return {}
    texts = [code(each) for each in values]
    lines = _lines(c, lite, scope, list(zip(targets, texts, roles, strict=True)))
    if SCHEDULER in roles:
        c.edits.check(node, "schedulers step once per call here, and with every process's batch in Accelerate.")
    small = c.script.parents[node]
    place = c.script.statement(node)
    if not lines or place is None:
        c.edits.remove(node)
        return {}
    parsed = statement(lines[0]).body[0]
    c.edits.replace(small, parsed)
    for line in lines[1:]:
        c.edits.insert_after(place, line)
    return dict(zip(targets, roles, strict=True))


def _targets(c: Conversion, node: cst.Call) -> list[str]:
    parent = c.script.parents[node]
    if not isinstance(parent, cst.Assign) or len(parent.targets) != 1:
        return []
    goal = parent.targets[0].target
    if isinstance(goal, cst.Tuple):
        return [code(each.value) for each in goal.elements]
    return [code(goal)]


def _lines(c: Conversion, lite: str, scope: Scope, given: list[tuple[str, str, str]]) -> list[str]:
    models = [each for each in given if each[2] == MODEL]
    optimizers = [each for each in given if each[2] == OPTIMIZER]
    loaders = [each for each in given if each[2] == LOADER]
    lines: list[str] = []
    owners = {each[1]: _owner(c, scope, each[1], [model[1] for model in models]) for each in optimizers}
    loose = [each for each in optimizers if not owners[each[1]]]
    for target, text, _ in models:
        own = [each for each in optimizers if owners[each[1]] == text]
        extra = _forward_methods(c, text, scope)
        if own:
            left, right = ", ".join([target, *(o[0] for o in own)]), ", ".join([text, *(o[1] for o in own)])
            lines.append(f"{left} = {lite}.setup({right}{extra})")
        else:
            lines.append(f"{target} = {lite}.setup_module({text}{extra})")
    if loose:
        left, right = ", ".join(each[0] for each in loose), ", ".join(each[1] for each in loose)
        lines.append(f"{left} = {lite}.setup_optimizers({right})")
    if loaders:
        left, right = ", ".join(each[0] for each in loaders), ", ".join(each[1] for each in loaders)
        lines.append(f"{left} = {lite}.setup_dataloaders({right})")
    return lines


def _owner(c: Conversion, scope: Scope, optimizer: str, models: list[str]) -> str:
    """Return the one model of an optimizer, ``""`` if it has several."""
    place: Scope | None = scope
    while place is not None:
        for target, value, _ in assignments(place):
            if target == optimizer and isinstance(value, cst.Call):
                found = [each for each in c.roles.models_of(value, place) if each in models]
                if found:
                    return found[0] if len(found) == 1 else ""
        place = place.parent
    return models[0] if len(models) == 1 else ""


def saved_state(c: Conversion, prepared: dict[str, str]) -> str:
    """Return the source of a dict of what is saved."""
    kept = [name for name, role in prepared.items() if role in (MODEL, OPTIMIZER, SCHEDULER)]
    return "{" + ", ".join(f'"{name}": {name}' for name in kept) + "}"
