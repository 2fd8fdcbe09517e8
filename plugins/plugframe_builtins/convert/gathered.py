"""Lists of predictions: an evaluation that keeps values of each sample keeps those of all ranks."""

from __future__ import annotations

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call
from plugframe_builtins.convert.roles import MODEL, assignments
from plugframe_builtins.convert.script import Scope, argument, code, dotted, find, method

#: Methods of a tensor, or functions of torch, whose result has a row for each sample if the tensor has.
_ROWS = frozenset(
    """
    detach cpu cuda numpy float double half long int bool clone to sigmoid tanh exp log round tolist ge gt le lt eq
    """.split()  # noqa: SIM905  # a list of strings would fill lines
)
#: The same, if they go along another dimension than the first.
_ALONG = frozenset(("argmax", "argmin", "softmax", "log_softmax", "sum", "mean", "squeeze", "amax"))


def convert(c: Conversion, calls: list[cst.Call], loop: cst.For, scope: Scope) -> bool:
    """Gather what ``append(x)`` and ``extend(x)`` in one loop keep; return whether all of it has rows of samples."""
    values = [each.args[0].value for each in calls]
    if not all(has_rows(c, value, loop, scope) for value in values):
        return False
    for value in values:
        c.edits.replace(value, lambda updated: call(f"{c.lite}.gather_for_metrics", updated))
    return True


def adds_up(loop: cst.For) -> bool:
    """Return whether a loop also counts: samples that only fill up a rank's last step would count too."""
    return bool(find(loop.body, cst.AugAssign))


def has_rows(c: Conversion, node: cst.BaseExpression, loop: cst.For, scope: Scope, depth: int = 0) -> bool:
    """Return whether a value has a row for each sample of the batch, as far as the script shows."""
    if depth > 8:
        return False
    if isinstance(node, cst.Name):
        return _name_has_rows(c, node, loop, scope, depth)
    if isinstance(node, cst.Subscript):
        return _is_part_of_batch(node, loop)
    if isinstance(node, cst.Comparison):
        return has_rows(c, node.left, loop, scope, depth + 1)
    if isinstance(node, cst.Call):
        return _call_has_rows(c, node, loop, scope, depth)
    return False


def _name_has_rows(c: Conversion, node: cst.Name, loop: cst.For, scope: Scope, depth: int) -> bool:
    values = [
        value for target, value, place in assignments(scope) if target == node.value and c.script.inside(place, loop)
    ]
    own = [value for value in values if node.value in {each.value for each in find(value, cst.Name)}]
    if len(own) > 1 or len(values) > 1:
        return False
    if values and not own:
        return has_rows(c, values[0], loop, scope, depth + 1)
    moved = method(own[0]) if own else None
    if own and (moved is None or moved[1] not in ("to", "cuda", "float", "long") or dotted(moved[0]) != node.value):
        return False
    return node.value in _batch_names(loop)


def _batch(loop: cst.For) -> cst.BaseExpression:
    """Return the target of a loop that is the batch, without the number that ``enumerate`` gives."""
    counts = isinstance(loop.iter, cst.Call) and dotted(loop.iter.func) == "enumerate"
    if counts and isinstance(loop.target, cst.Tuple) and len(loop.target.elements) == 2:
        return loop.target.elements[1].value
    return loop.target


def _batch_names(loop: cst.For) -> set[str]:
    """Return the names of ``for x, y in loader:``, and of ``for i, (x, y) in enumerate(loader):``."""
    target = _batch(loop)
    elements = target.elements if isinstance(target, cst.Tuple) else ()
    return {each.value.value for each in elements if isinstance(each.value, cst.Name)}


def _is_part_of_batch(node: cst.Subscript, loop: cst.For) -> bool:
    """Return whether a value is ``batch["labels"]`` or ``batch[1]``."""
    index = node.slice[0].slice
    key = index.value if isinstance(index, cst.Index) else None
    target = _batch(loop)
    return (
        len(node.slice) == 1
        and isinstance(key, cst.SimpleString | cst.Integer)
        and isinstance(target, cst.Name)
        and dotted(node.value) == target.value
    )


def _call_has_rows(c: Conversion, node: cst.Call, loop: cst.For, scope: Scope, depth: int) -> bool:
    if c.roles.of(node.func, scope) == MODEL:
        return bool(node.args) and has_rows(c, node.args[0].value, loop, scope, depth + 1)
    found = method(node)
    if found is None:
        return False
    value, rest = found[0], node
    if c.script.qualified(node.func).startswith("torch.") and node.args:
        value, rest = node.args[0].value, node.with_changes(args=node.args[1:])
    along = argument(rest, "dim", 0) or argument(rest, "axis")
    allowed = found[1] in _ROWS or (found[1] in _ALONG and along is not None and code(along) not in ("0", "-2"))
    return allowed and has_rows(c, value, loop, scope, depth + 1)
