"""Where the `Lite` object is made, and how functions get it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call as call_of
from plugframe_builtins.convert.edits import expression
from plugframe_builtins.convert.roles import LITE
from plugframe_builtins.convert.script import Scope, dotted, names


def convert(c: Conversion) -> None:
    """Make the object, pass it to functions, and print on rank 0."""
    made = _made_already(c)
    needing = {_outermost(c.script.scope_of[node]) for node in c.edits.uses if node in c.script.scope_of}
    if not needing and made is None:
        return
    _with_callers(c, needing)
    functions = [scope for scope in c.script.scopes if scope in needing and scope.parent is not None]
    root = made or _root(c, needing, functions)
    if made is None and root is not None:
        if root.parent is None:
            _make_at_top(c, needing)
        else:
            _make_in(c, root)
    elif root is None:
        _take_from_caller(c, functions)
    passed = [scope for scope in functions if scope is not root]
    if root is None or root.parent is not None:
        for scope in passed:
            _pass(c, scope)
    _prints(c, {*needing, *([root] if root is not None else [])})


def _made_already(c: Conversion) -> Scope | None:
    """Return the scope that assigns the object, if the script has one."""
    for scope in c.script.scopes:
        if c.roles.found.get((scope, c.lite)) == LITE:
            return _outermost(scope)
    return None


def _outermost(scope: Scope) -> Scope:
    """Return the function of the file, or the method, around inner functions."""
    while scope.parent is not None and scope.parent.parent is not None:
        scope = scope.parent
    return scope


def _with_callers(c: Conversion, needing: set[Scope]) -> None:
    """Add the functions that call functions which need the object."""
    waiting = list(needing)
    while waiting:
        scope = waiting.pop()
        if scope.parent is None or (scope.owner is not None and scope.name != "__init__"):
            continue
        for _, where in c.script.calls_of(scope):
            outer = _outermost(where)
            if outer.parent is not None and outer not in needing:
                needing.add(outer)
                waiting.append(outer)


def _root(c: Conversion, needing: set[Scope], functions: list[Scope]) -> Scope | None:
    """Return where the object is made: a function that starts it all, else the module; None for a library."""
    if c.script.top in needing or any(scope.owner is not None for scope in functions):
        return c.script.top
    if not all(_only_called(c, scope) for scope in functions):
        return c.script.top
    called_by = {scope: {_outermost(where) for _, where in c.script.calls_of(scope)} for scope in functions}
    roots = [scope for scope in functions if not any(each.parent is not None for each in called_by[scope])]
    from_module = [scope for scope in functions if c.script.top in called_by[scope]]
    sets_up = any(".setup" in text for texts in c.edits.after.values() for text in texts)
    if not from_module and not sets_up:
        return None
    if len(roots) == 1 and all(scope is roots[0] for scope in from_module) and not _called_in_loop(c, roots[0]):
        return roots[0]
    return c.script.top if from_module else roots[0] if len(roots) == 1 else c.script.top


def _called_in_loop(c: Conversion, scope: Scope) -> bool:
    calls = c.script.calls_of(scope)
    return len(calls) > 1 or any(
        isinstance(each, cst.For | cst.While | cst.ListComp) for call, _ in calls for each in c.script.ancestors(call)
    )


def _only_called(c: Conversion, scope: Scope) -> bool:
    """Return whether a function is used in direct calls alone."""
    calls = [call for call, _ in c.script.calls_of(scope)]
    functions = {call.func for call in calls}
    for node, _ in c.script.all(cst.Name):
        if node.value == scope.name and node not in functions and c.script.parents[node] is not scope.node:
            parent = c.script.parents[node]
            is_attribute = isinstance(parent, cst.Attribute) and parent.attr is node
            is_keyword = isinstance(parent, cst.Arg) and parent.keyword is node
            if not is_attribute and not is_keyword:
                return False
    return not any(each.star for call in calls for each in call.args[:1])


def _construct(c: Conversion) -> list[str]:
    arguments = f"precision={c.precision}" if c.precision else ""
    return [f"{c.lite} = Lite({arguments})", *([f"{c.lite}.launch()"] if c.launches else [])]


def _make_in(c: Conversion, scope: Scope) -> None:
    assert isinstance(scope.node, cst.FunctionDef)
    body = list(scope.node.body.body)
    first = body[1] if _is_text(body[0]) and len(body) > 1 else body[0]
    _insert(c, first)


def _insert(c: Conversion, node: cst.CSTNode) -> None:
    c.edits.before[node][:0] = _construct(c)


def _is_text(node: cst.CSTNode) -> bool:
    return (
        isinstance(node, cst.SimpleStatementLine)
        and isinstance(node.body[0], cst.Expr)
        and isinstance(node.body[0].value, cst.SimpleString | cst.ConcatenatedString)
    )


def _make_at_top(c: Conversion, needing: set[Scope]) -> None:
    """Make the object before the first statement of the module that needs it."""
    uses = [node for node in c.edits.uses if node in c.script.scope_of and c.script.scope_of[node] is c.script.top]
    for scope in needing:
        if scope.parent is not None:
            uses += [call for call, where in c.script.calls_of(scope) if where is c.script.top]
            if scope.owner is not None:
                name = scope.owner.name.value
                uses += [call for call in c.script.top.all(cst.Call) if dotted(call.func) == name]
    if not uses:
        last = [each for each in c.script.module.body if not isinstance(each, cst.FunctionDef | cst.ClassDef)]
        imports = [each for each in last if is_import(each)]
        place = c.script.module.body[list(c.script.module.body).index(imports[-1]) + 1]
        _insert(c, place)
        c.edits.check(place, "this is made when the module is imported: pass it in, if other files do so too.")
        return
    uses.sort(key=lambda node: c.script._index[node])
    chain = [each for each in (uses[0], *c.script.ancestors(uses[0])) if isinstance(each, cst.BaseStatement)]
    top = chain[-1]
    if isinstance(top, cst.If) and "__name__" in {each.value for each in names(top.test)}:
        inner = [each for each in chain if c.script.parents.get(each) is top.body]
        top = inner[0] if inner else top
    _insert(c, top)


def is_import(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and isinstance(node.body[0], cst.Import | cst.ImportFrom)


def _take_from_caller(c: Conversion, functions: list[Scope]) -> None:
    for scope in functions:
        if not c.script.calls_of(scope):
            c.edits.by_hand(scope.node, f"its callers pass their {c.lite} = Lite() first.")


def _pass(c: Conversion, scope: Scope) -> None:
    """Give a function the object as its first parameter, and pass it in every call."""
    node = scope.node
    assert isinstance(node, cst.FunctionDef)
    if c.lite in scope.parameters:
        return

    def change(updated: cst.FunctionDef) -> cst.FunctionDef:
        first = cst.Param(cst.Name(c.lite))
        params = updated.params
        if params.posonly_params:
            return updated.with_changes(params=params.with_changes(posonly_params=[first, *params.posonly_params]))
        return updated.with_changes(params=params.with_changes(params=[first, *params.params]))

    c.edits.replace(node, change, uses=False)
    for call, _ in c.script.calls_of(scope):
        c.edits.replace(call, lambda updated: _with_first(updated, c.lite), uses=False)


def _with_first(node: cst.Call, lite: str) -> cst.Call:
    if not node.args:
        return call_of(dotted(node.func), expression(lite))
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    return node.with_changes(args=[cst.Arg(expression(lite), comma=comma), *node.args])


def _prints(c: Conversion, scopes: set[Scope]) -> None:
    """Print on rank 0, where the object is at hand."""
    at_top = [node for node in c.edits.before if any("= Lite(" in text for text in c.edits.before[node])]
    for node, scope in c.script.all(cst.Call):
        if dotted(node.func) != "print" or _outermost(scope) not in scopes or _tells_rank(node):
            continue
        if (
            scope.parent is None
            and not any(c.script.is_before(each, node) or each is node for each in at_top)
            and at_top
        ):
            continue
        name = cst.Attribute(cst.Name(c.lite), cst.Name("print"))
        c.edits.replace(node, partial(_with_function, name), uses=False)


def _with_function(function: cst.BaseExpression, node: cst.Call) -> cst.Call:
    return node.with_changes(func=function)


def _tells_rank(node: cst.Call) -> bool:
    """Return whether every rank prints a line of its own, with its number."""
    return any(each.value in ("rank", "global_rank", "local_rank", "get_rank") for each in names(node))


def add_import(module: cst.Module, name: str = "Lite") -> cst.Module:
    """Return a module that imports a name from plugframe, beside its other imports."""
    body = list(module.body)
    imports = [index for index, each in enumerate(body) if is_import(each)]
    new = cst.parse_statement(f"from plugframe import {name}\n")
    assert isinstance(new, cst.SimpleStatementLine)
    place = imports[-1] + 1 if imports else _after_docstring(body)
    for index in imports:
        line = body[index]
        small = line.body[0] if isinstance(line, cst.SimpleStatementLine) else None
        if isinstance(small, cst.ImportFrom) and dotted(small.module).startswith("torch"):
            place = index
            new = new.with_changes(leading_lines=line.leading_lines)
            body[index] = line.with_changes(leading_lines=())
            break
    body.insert(place, new)
    return module.with_changes(body=body)


def _after_docstring(body: Sequence[cst.CSTNode]) -> int:
    return int(bool(body) and _is_text(body[0]))
