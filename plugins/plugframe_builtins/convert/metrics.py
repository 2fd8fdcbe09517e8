"""The sixth step: sums, means and printed losses over the samples of all ranks."""

from __future__ import annotations

import re
from collections import defaultdict

import libcst as cst

from plugframe_builtins.convert import gathered
from plugframe_builtins.convert.conversion import Conversion, base
from plugframe_builtins.convert.edits import expression
from plugframe_builtins.convert.roles import assignments
from plugframe_builtins.convert.script import Scope, calls, code, dotted, method, names

_NUMBER = re.compile(r"\.item\(\)|\bfloat\(|\bint\(|\blen\(|\.size\(|\.shape\[|\.numel\(|\.tolist\(")


def convert(c: Conversion) -> None:
    """Reduce what a loop over a loader adds up, appends and prints."""
    for scope in c.script.scopes:
        for node in scope.all(cst.AugAssign):
            loop = c.loader_loop(node)
            if loop is not None and isinstance(node.operator, cst.AddAssign):
                _added(c, node, loop, scope)
        kept: dict[cst.For | cst.While, list[cst.Call]] = defaultdict(list)
        for call in scope.all(cst.Call):
            found = method(call)
            if found is not None and found[1] in ("append", "extend") and len(call.args) == 1:
                loop = _appended(c, call, scope)
                if loop is not None:
                    kept[loop].append(call)
            elif dotted(call.func) == "print" or (found is not None and found[1] == "print"):
                _printed(c, call, scope)
        for loop, appends in kept.items():
            _kept(c, appends, loop, scope)


def _added(c: Conversion, node: cst.AugAssign, loop: cst.For | cst.While, scope: Scope) -> None:
    name, lite = dotted(node.target), c.lite
    kind = c.reduction(node.value, scope)
    if _is_reduced(c, node.value):
        return
    if kind == "number" or c.is_loss(name, scope) or not _is_of_batch(c, node.value, loop, scope):
        return
    if kind not in ("sum", "size", "mean") or not isinstance(node.target, cst.Name):
        c.edits.check(node, f"{name or 'this'} is of this rank's samples only: reduce it with {lite}.all_reduce().")
        return
    trains = c.steps_in(loop)
    number = _is_number(c, node.value)
    if not number and trains and kind != "size" and not re.search(r"detach|==|\.eq\(", code(node.value)):
        c.edits.check(node, f"{name} is of this rank's samples only: reduce it with {lite}.all_reduce().")
        return
    operation = "mean" if kind == "mean" else "sum"
    if _used_inside(c, name, loop) or not _starts_before(c, name, loop, scope):
        if not trains:
            c.edits.check(node, f"{name} is of this rank's samples only: reduce it with {lite}.all_reduce().")
        else:
            text = _reduced("@", kind, lite, '"') if number else f'{lite}.all_reduce(@, reduce_op="{operation}")'
            c.edits.replace(node.value, lambda updated: expression(text.replace("@", _atom(updated, kind))))
        return
    if kind == "mean":
        c.edits.replace(node.value, lambda updated: expression(f"{_atom(updated)} * {lite}.batch_weight"))
    item = ".item()" if number else ""
    operand = "" if operation == "mean" else ', reduce_op="sum"'
    c.reduced.add((scope, name))
    c.edits.insert_after(loop, f"{name} = {lite}.all_reduce({name}{operand}){item}")


def _is_number(c: Conversion, node: cst.BaseExpression) -> bool:
    """Return whether a value is a number of Python, not a tensor."""
    if _NUMBER.search(code(node)):
        return True
    if isinstance(node, cst.Name):
        values = [value for target, value, _ in assignments(c.script.scope_of[node]) if target == node.value]
        return bool(values) and all(_NUMBER.search(code(value)) for value in values)
    function = c.called(node) if isinstance(node, cst.Call) else None
    returned = [each.value for each in function.all(cst.Return)] if function is not None else []
    return len(returned) == 1 and returned[0] is not None and _NUMBER.search(code(returned[0])) is not None


def _is_reduced(c: Conversion, node: cst.CSTNode) -> bool:
    """Return whether a value comes from a function of the file that reduces over ranks by itself."""
    for call in calls(node):
        function = c.called(call)
        if function is not None and any(dotted(each.func).endswith("all_reduce") for each in function.all(cst.Call)):
            return True
    return False


def _atom(node: cst.BaseExpression, kind: str = "mean") -> str:
    simple = isinstance(node, cst.Name | cst.Attribute | cst.Call | cst.Subscript) or node.lpar or kind != "mean"
    return code(node) if simple else f"({code(node)})"


def _reduced(text: str, kind: str, lite: str, quote: str) -> str:
    if kind == "mean":
        return f"{lite}.reduce_mean({text}, weight={lite}.batch_weight).item()"
    return f"{lite}.all_reduce({text}, reduce_op={quote}sum{quote}).item()"


def _is_of_batch(c: Conversion, value: cst.CSTNode, loop: cst.For | cst.While, scope: Scope) -> bool:
    """Return whether a value depends on what is computed in the loop."""
    inner = {each.value for each in names(loop.target)} if isinstance(loop, cst.For) else set()
    for target, _, node in assignments(scope):
        if c.script.inside(node, loop):
            inner.add(target)
    return any(each.value in inner for each in names(value))


def _used_inside(c: Conversion, name: str, loop: cst.For | cst.While) -> bool:
    """Return whether a loop reads or sets a variable besides adding to it."""
    for each in names(loop.body):
        if each.value == name:
            parent = c.script.parents[each]
            if not isinstance(parent, cst.AugAssign) and not _is_attribute(parent, each):
                return True
    return False


def _is_attribute(parent: cst.CSTNode, name: cst.Name) -> bool:
    return (isinstance(parent, cst.Attribute) and parent.attr is name) or (
        isinstance(parent, cst.Arg) and parent.keyword is name
    )


def _starts_before(c: Conversion, name: str, loop: cst.For | cst.While, scope: Scope) -> bool:
    """Return whether a variable is set anew whenever the loop begins, and no other loop adds to it."""
    around = _loop_around(c, loop)
    for each in scope.all(cst.AugAssign):
        other = dotted(each.target) == name and isinstance(each.operator, cst.AddAssign | cst.SubtractAssign)
        if other and not c.script.inside(each, loop):
            return False
    return any(
        target == name
        and not c.script.inside(node, loop)
        and c.script.is_before(node, loop)
        and _loop_around(c, node) is around
        for target, _, node in assignments(scope)
    )


def _loop_around(c: Conversion, node: cst.CSTNode) -> cst.CSTNode | None:
    for each in c.script.ancestors(node):
        if isinstance(each, cst.For | cst.While):
            return each
        if isinstance(each, cst.FunctionDef):
            return None
    return None


def _appended(c: Conversion, call: cst.Call, scope: Scope) -> cst.For | cst.While | None:
    """Reduce a loss that is appended to a list; return the loop of another value, which is this rank's."""
    loop = c.loader_loop(call)
    value = call.args[0].value
    appends = (method(call) or ("", ""))[1] == "append"
    if loop is None and isinstance(value, cst.Call) and appends:
        _last_loss(c, value, scope)
    if loop is None or not _is_of_batch(c, value, loop, scope) or _is_reduced(c, value):
        return None
    if any((scope, each.value) in c.reduced for each in names(value)):
        return None
    kind = c.reduction(value, scope) or ("mean" if c.is_loss(base(value), scope) else "")
    if kind in ("mean", "sum", "size") and c.steps_in(loop) and _is_number(c, value) and appends:
        c.edits.replace(value, lambda updated: expression(_reduced(_atom(updated, kind), kind, c.lite, '"')))
        return None
    return loop


def _kept(c: Conversion, calls: list[cst.Call], loop: cst.For | cst.While, scope: Scope) -> None:
    """Gather the values of an evaluation that are kept for each sample; mark those that may be of something else."""
    evaluates = isinstance(loop, cst.For) and not c.steps_in(loop) and not gathered.adds_up(loop)
    if evaluates and isinstance(loop, cst.For) and gathered.convert(c, calls, loop, scope):
        return
    for call in calls:
        name = dotted(call.func).rpartition(".")[0]
        c.edits.check(call, f"{name or 'this list'} is of this rank's samples only: see {c.lite}.gather_for_metrics().")


def _last_loss(c: Conversion, value: cst.Call, scope: Scope) -> None:
    """Reduce the loss of an epoch's last batch."""
    name = base(value)
    kind = c.reduction(value, scope) or ("mean" if c.is_loss(name, scope) else "")
    if name and kind in ("mean", "sum") and _is_batch_value(c, name, scope) and _is_number(c, value):
        c.edits.replace(value, lambda updated: expression(_reduced(code(updated), kind, c.lite, '"')))


def _printed(c: Conversion, call: cst.Call, scope: Scope) -> None:
    """Reduce the losses of a batch that are printed."""
    for each in _printed_values(call):
        name = base(each)
        if not name or not _is_batch_value(c, name, scope):
            continue
        value = each
        if isinstance(each, cst.Name):
            value = _number_of(c, each, scope) or each
        kind = c.reduction(value, scope) or ("mean" if c.is_loss(name, scope) else "")
        if kind not in ("mean", "sum") or value in c.edits.replaced:
            continue
        quote = "'" if _quoted_by(c, value).startswith(('"', 'f"', 'F"')) else '"'
        tail = ".item()" if isinstance(value, cst.Name) else ""
        text = _reduced(code(value) + tail, kind, c.lite, quote)
        c.edits.replace(value, text)


def _number_of(c: Conversion, node: cst.Name, scope: Scope) -> cst.BaseExpression | None:
    """Return ``loss.item()``, where that is what a variable was last set to before it is printed."""
    before = [
        value for target, value, place in assignments(scope) if target == node.value and c.script.is_before(place, node)
    ]
    return before[-1] if before and base(before[-1]) and not isinstance(before[-1], cst.Name) else None


def _printed_values(node: cst.CSTNode) -> list[cst.BaseExpression]:
    """Return the outermost ``x.item()``, ``float(x)``, and names with a format, in what is printed."""
    if isinstance(node, cst.FormattedStringExpression) and isinstance(node.expression, cst.Name):
        return [node.expression] if node.format_spec is not None else []
    if isinstance(node, cst.Call) and base(node) and not isinstance(node, cst.Name):
        return [node] if _NUMBER.search(code(node)) else []
    return [each for child in node.children for each in _printed_values(child)]


def _is_batch_value(c: Conversion, name: str, scope: Scope) -> bool:
    """Return whether a variable is set once for each batch of a training loop."""
    places = [node for target, _, node in assignments(scope) if target == name]
    for node in places:
        loop = c.loader_loop(node)
        if loop is not None and c.steps_in(loop):
            return True
    return (
        bool(places)
        and scope.parent is not None
        and any(c.loader_loop(call) is not None for call, _ in c.script.calls_of(scope))
        and all(c.is_loss(name, scope) for _ in places)
    )


def _quoted_by(c: Conversion, node: cst.CSTNode) -> str:
    for each in c.script.ancestors(node):
        if isinstance(each, cst.FormattedString):
            return each.start
        if isinstance(each, cst.BaseStatement):
            break
    return ""
