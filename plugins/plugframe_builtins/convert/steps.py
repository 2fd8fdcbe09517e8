"""The five steps for a plain loop: models and optimizers, loaders, devices, backward; and automatic mixed precision."""

from __future__ import annotations

import re
from collections import defaultdict

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call, expression, keyword
from plugframe_builtins.convert.roles import LOADER, MODEL, OPTIMIZER, SCALER, assignments
from plugframe_builtins.convert.script import Scope, argument, calls, code, dotted, method, names

#: Methods of a module that run no layer.
_PLAIN_METHODS = frozenset(
    """
    add_module apply bfloat16 buffers children compile cpu cuda double eval extra_repr float forward get_buffer
    get_parameter get_submodule half load_state_dict modules named_buffers named_children named_modules
    named_parameters parameters register_backward_hook register_buffer register_forward_hook
    register_forward_pre_hook register_full_backward_hook register_module register_parameter requires_grad_
    save_pretrained share_memory state_dict to to_empty train type zero_grad no_sync add append extend insert items
    keys values pop clear update __call__ push_to_hub gradient_checkpointing_enable
    """.split()  # noqa: SIM905  # a list of strings would fill a page
)


def set_up(c: Conversion) -> None:
    """Add ``model, optimizer = lite.setup(model, optimizer)`` after the optimizers of a model."""
    for scope in c.script.scopes:
        groups: dict[tuple[str, ...], list[tuple[str, cst.CSTNode]]] = defaultdict(list)
        for target, value, node in assignments(scope):
            if c.roles.infer(value, scope) != OPTIMIZER or dotted(value) or not isinstance(value, cst.Call):
                continue
            if target and not _returned_built(c, scope, target):
                groups[tuple(c.roles.models_of(value, scope))].append((target, node))
        for each in scope.all(cst.Assign):
            _set_up_returned(c, scope, each, groups)
        _set_up_groups(c, scope, groups)


def _returned_built(c: Conversion, scope: Scope, target: str) -> bool:
    """Return whether a function returns its optimizer to a caller of this file, which sets it up."""
    if scope.parent is None or not c.script.calls_of(scope):
        return False
    for each in scope.all(cst.Return):
        values = [e.value for e in each.value.elements] if isinstance(each.value, cst.Tuple) else [each.value]
        if any(dotted(value) == target for value in values):
            return True
    return False


def _set_up_returned(
    c: Conversion, scope: Scope, node: cst.Assign, groups: dict[tuple[str, ...], list[tuple[str, cst.CSTNode]]]
) -> None:
    """Note the optimizers that a function of the file returned together with their models."""
    goal = node.targets[0].target
    if not isinstance(goal, cst.Tuple) or not isinstance(node.value, cst.Call):
        return
    if dotted(node.value.func) not in c.script.functions:
        return
    names = [dotted(each.value) for each in goal.elements]
    optimizers = [name for name in names if c.roles.of(name, scope) == OPTIMIZER]
    models = [name for name in names if c.roles.of(name, scope) == MODEL]
    models = models or [dotted(each.value) for each in node.value.args if c.roles.of(each.value, scope) == MODEL]
    for optimizer in optimizers:
        groups[tuple(models)].append((optimizer, node))


def _set_up_groups(c: Conversion, scope: Scope, groups: dict[tuple[str, ...], list[tuple[str, cst.CSTNode]]]) -> None:
    lite = c.lite
    shared = [model for models in groups for model in models]
    done: set[str] = set()
    for models, built in groups.items():
        names = list(dict.fromkeys(name for name, _ in built))
        place = _last_place(c, [node for _, node in built])
        methods = [_forward_methods(c, model, scope) for model in models]
        if not models or place is None:
            node = built[-1][1]
            text = f"set up model and optimizer here: model, optimizer = {lite}.setup(model, optimizer)."
            c.edits.by_hand(node, text)
        elif len(models) == 1 and shared.count(models[0]) == 1:
            target = ", ".join([models[0], *names])
            _add(c, place, f"{target} = {lite}.setup({target}{methods[0]})")
        else:
            for model, extra in zip(models, methods, strict=True):
                if model not in done:
                    _add(c, place, f"{model} = {lite}.setup_module({model}{extra})")
                    done.add(model)
            target = ", ".join(names)
            _add(c, place, f"{target} = {lite}.setup_optimizers({target})")


def _add(c: Conversion, place: cst.CSTNode, text: str) -> None:
    c.trains = True
    c.edits.insert_after(place, text)


def _last_place(c: Conversion, nodes: list[cst.CSTNode]) -> cst.CSTNode | None:
    """Return the statement after which all `nodes` have run: the last, or the block that holds them all."""
    statements = [c.script.statement(node) for node in nodes]
    last = statements[-1]
    chain: list[cst.CSTNode] = [last, *c.script.ancestors(last)] if last is not None else []
    for each in chain:
        parent = c.script.parents.get(each)
        if not isinstance(each, cst.BaseStatement) or not isinstance(parent, cst.IndentedBlock | cst.Module):
            continue
        if all(other is not None and c.script.inside(other, parent) for other in statements):
            return each
    return None


def _forward_methods(c: Conversion, model: str, scope: Scope) -> str:
    """Return ``, forward_methods=(...)`` for the methods besides ``forward`` that the script calls on a model."""
    found: list[str] = []
    class_name = ""
    for where in c.script.scopes:
        for target, value, _ in assignments(where):
            if target == model and isinstance(value, cst.Call):
                class_name = class_name or next(
                    (dotted(each.func) for each in calls(value) if dotted(each.func) in c.script.classes), ""
                )
    for node, where in c.script.all(cst.Call):
        name = method(node)
        if name is None or name[1] in _PLAIN_METHODS or name[1].startswith("_"):
            continue
        if c.roles.of(name[0], where) == MODEL and dotted(name[0]).rpartition(".")[2] == model.rpartition(".")[2]:
            kind = _member(c, class_name, name[1])
            if kind == "part":
                c.edits.check(
                    node,
                    f"a part of {model} is called by itself: call it in a method of the model, and name that in "
                    "forward_methods=.",
                )
            elif kind == "layers" or not class_name:
                found.append(name[1])
    names = list(dict.fromkeys(found))
    if not names:
        return ""
    listed = ", ".join(f'"{name}"' for name in names)
    return f", forward_methods=({listed}{',' if len(names) == 1 else ''})"


def _member(c: Conversion, class_name: str, name: str) -> str:
    """Return what a member of a model class is: a method that runs ``"layers"``, a ``"part"``, or ``""``."""
    node = c.script.classes.get(class_name)
    if node is None:
        return ""
    for each in node.body.body:
        if isinstance(each, cst.FunctionDef) and each.name.value == name:
            return "layers" if re.search(r"\bself\.\w+[\[(.]|\bself\(", code(each.body)) else ""
    return "part" if re.search(rf"\bself\.{name}\s*=", code(node)) else ""


def loaders(c: Conversion) -> None:
    """Set loaders up, and divide the batch size of a script that ran in one process."""
    grouped: dict[cst.CSTNode, list[tuple[str, cst.CSTNode]]] = defaultdict(list)
    for node, scope in c.script.all(cst.Call):
        if c.script.qualified(node.func).rpartition(".")[2] != "DataLoader" or c.roles.infer(node, scope) != LOADER:
            continue
        _batch_size(c, node)
        parent = c.script.parents[node]
        statement = c.script.statement(node)
        if isinstance(parent, cst.Assign) and isinstance(parent.targets[0].target, cst.Name) and statement is not None:
            grouped[c.script.parents[statement]].append((parent.targets[0].target.value, statement))
        else:
            c.edits.replace(node, lambda updated: call(f"{c.lite}.setup_dataloaders", updated))
    for block, found in grouped.items():
        body: list[cst.CSTNode] = list(getattr(block, "body", ()))
        run: list[str] = []
        for index, (name, place) in enumerate(found):
            run.append(name)
            following = body[body.index(place) + 1] if body.index(place) + 1 < len(body) else None
            if index + 1 < len(found) and found[index + 1][1] is following:
                continue
            target = ", ".join(run)
            c.edits.insert_after(place, f"{target} = {c.lite}.setup_dataloaders({target})")
            run = []


def _batch_size(c: Conversion, node: cst.Call) -> None:
    if c.distributed or not c.raw:
        return
    value = argument(node, "batch_size", 1)
    if argument(node, "batch_sampler") is not None:
        c.edits.check(node, f"batches are those of one rank: divide their size by {c.lite}.world_size.")
    elif value is None:
        if any(each.star for each in node.args):
            c.edits.check(node, f"batch_size is that of one rank: divide it by {c.lite}.world_size.")
        elif argument(node, "sampler") is None and len(node.args) > 0:
            c.edits.check(node, "one sample a rank: on N ranks a step takes N samples.")
    elif code(value) == "1":
        c.edits.check(node, "one sample a rank: on N ranks a step takes N samples.")
    elif code(value) != "None" and "world_size" not in code(value):
        c.edits.replace(value, lambda updated: _divided(updated, c.lite))
        if isinstance(value, cst.Integer) and int(value.evaluated_value) % 2 and _is_trained_on(c, node):
            c.edits.check(
                node, f"no even number of ranks divides {code(value)}: a step takes fewer samples there than on one."
            )


def _is_trained_on(c: Conversion, loader: cst.Call) -> bool:
    """Return whether a loop over a loader trains, or none is found: an evaluation does not depend on batches."""
    parent = c.script.parents[loader]
    target = dotted(parent.targets[0].target) if isinstance(parent, cst.Assign) else ""
    loops = [node for node, _ in c.script.all(cst.For) if target in {each.value for each in names(node.iter)}]
    return not loops or any(c.steps_in(each) for each in loops)


def _divided(node: cst.BaseExpression, lite: str) -> cst.BaseExpression:
    simple = isinstance(node, cst.Name | cst.Attribute | cst.Integer | cst.Call | cst.Subscript) or node.lpar
    text = code(node) if simple else f"({code(node)})"
    return expression(f"{text} // {lite}.world_size")


def backward(c: Conversion) -> None:
    """Replace ``loss.backward()`` and what clips gradients."""
    for node, scope in c.script.all(cst.Call):
        found = method(node)
        if found is not None and found[1] == "backward" and _is_loss(c, found[0], scope):
            _backward(c, node, found[0], scope)
        name = c.script.qualified(node.func)
        if name.rpartition(".")[2] in ("clip_grad_norm_", "clip_grad_value_") and name.startswith("torch."):
            _clip(c, node, scope, name.rpartition(".")[2])
        elif name == "torch.autograd.backward":
            c.edits.by_hand(node, f"call {c.lite}.backward(loss) in place of torch.autograd.backward().")


def _is_loss(c: Conversion, node: cst.BaseExpression, scope: Scope) -> bool:
    if isinstance(node, cst.Name) and (c.is_lite(node, scope) or c.roles.of(node, scope)):
        return False
    if isinstance(node, cst.Call) and dotted(node.func) == "super":
        return False
    for target, value, _ in assignments(scope):
        if target == dotted(node) and isinstance(value, cst.Call):
            made = c.script.classes.get(dotted(value.func))
            if made is not None and "def backward" in code(made):
                return False
    return c.script.qualified(node) not in ("torch.autograd",)


def _backward(c: Conversion, node: cst.Call, loss: cst.BaseExpression, scope: Scope) -> None:
    inner = method(loss)
    scaled = inner is not None and inner[1] == "scale" and c.roles.of(inner[0], scope) == SCALER
    value = loss.args[0].value if scaled and isinstance(loss, cst.Call) else loss
    kind = c.reduction(value, scope)
    batches = c.reads_batches(node)
    extra = [keyword("reduction", '"sum"')] if kind == "sum" and batches else []
    if kind == "ratio" and batches:
        c.edits.check(
            node,
            "if this divides by a number that differs between ranks, see 'Losses that are sums' in the documentation.",
        )
    if not batches:
        c.edits.check(node, "every rank computes this from the same data: split it, if more ranks shall do more.")

    c.trains = True

    def change(updated: cst.Call) -> cst.Call:
        tensor = updated.func.value  # type: ignore[attr-defined]
        if scaled:
            tensor = tensor.args[0].value
        return call(f"{c.lite}.backward", tensor.with_changes(lpar=[], rpar=[]), *updated.args, *extra)

    c.edits.replace(node, change)


def _clip(c: Conversion, node: cst.Call, scope: Scope, name: str) -> None:
    found = [each for each in calls(node.args[0].value) if (method(each) or ("", ""))[1] == "parameters"]
    model = dotted(found[0].func.value) if found and isinstance(found[0].func, cst.Attribute) else ""
    model = model.removesuffix(".module")
    optimizers = c.optimizers_of(model, scope) if c.roles.of(model, scope) == MODEL else []
    value = argument(node, "max_norm" if name.endswith("norm_") else "clip_value", 1)
    if len(optimizers) != 1 or value is None or not found or node.args[0].value is not found[0]:
        c.edits.check(
            node, f"use {c.lite}.clip_gradients(model, optimizer, max_norm=...): a strategy may shard gradients."
        )
        return
    extra = [
        each.with_changes(comma=cst.MaybeSentinel.DEFAULT)
        for each in node.args
        if each.keyword is not None and each.keyword.value in ("norm_type", "error_if_nonfinite")
    ]
    word = "max_norm" if name.endswith("norm_") else "clip_val"
    args: list[cst.BaseExpression | cst.Arg] = [
        expression(model),
        expression(optimizers[0]),
        keyword(word, code(value)),
        *extra,
    ]
    c.edits.replace(node, call(f"{c.lite}.clip_gradients", *args))
