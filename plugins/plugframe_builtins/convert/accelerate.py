"""Scripts of Hugging Face Accelerate: calls and attributes of the ``Accelerator`` become those of `Lite`."""

from __future__ import annotations

import libcst as cst

from plugframe_builtins.convert.accumulation import convert as accumulation
from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call, expression, keyword, renamed
from plugframe_builtins.convert.entry import add_import
from plugframe_builtins.convert.prepare import convert as prepare
from plugframe_builtins.convert.prepare import saved_state
from plugframe_builtins.convert.rank_zero import convert as rank_zero
from plugframe_builtins.convert.roles import LITE, MODEL
from plugframe_builtins.convert.script import Scope, Script, argument, code, dotted, method
from plugframe_builtins.convert.unused import convert as without_unused
from plugframe_builtins.convert.unused import drop_imports

_PRECISIONS = {"fp16": "16-mixed", "bf16": "bf16-mixed", "no": "32-true"}
_TABLE = "{" + ", ".join(f'"{name}": "{value}"' for name, value in _PRECISIONS.items()) + "}"
#: Arguments of ``Accelerator`` that choose nothing about the numbers.
_IGNORED = ("log_with", "project_dir", "project_config", "gradient_accumulation_steps", "device_placement", "rng_types")
_RENAMED = {
    "wait_for_everyone": "barrier",
    "no_sync": "no_backward_sync",
    "end_training": "teardown",
    "get_state_dict": "state_dict",
    "main_process_first": "rank_zero_first",
    "log": "log_dict",
}
_ATTRIBUTES = {
    "is_main_process": "is_global_zero",
    "process_index": "global_rank",
    "local_process_index": "local_rank",
    "num_processes": "world_size",
}
_SAME = ("backward", "print", "device", "autocast", "gather_for_metrics")
_ELSEWHERE = ("prepare", "accumulate", "save_state", "load_state", "sync_gradients", "register_for_checkpointing")


def convert(script: Script) -> str:
    """Convert a script of Accelerate."""
    c = Conversion(script, raw=False)
    _objects(c)
    steps = _accumulation_steps(c)
    accumulation(c, steps)
    prepared = prepare(c)
    for node, scope in script.all(cst.Call):
        name = script.qualified(node.func)
        found = method(node)
        if name == "accelerate.Accelerator":
            _constructor(c, node)
        elif name.startswith("accelerate.") and name.endswith(".set_seed"):
            c.edits.replace(node, lambda updated: updated.with_changes(func=cst.Name("seed_everything")), uses=False)
        elif found is not None and _is_object(c, found[0], scope):
            _method(c, node, found[0], found[1], scope, prepared)
        elif name.startswith("accelerate."):
            c.edits.by_hand(node, f"{name.rpartition('.')[2]} is of Accelerate, and has no counterpart.")
    for attribute, scope in script.all(cst.Attribute):
        if _is_object(c, attribute.value, scope):
            _attribute(c, attribute, steps)
    _class_names(c)
    drop_imports(c.edits, script, lambda name: name == "accelerate.Accelerator" or name.endswith(".set_seed"))
    module = c.edits.apply()
    names = "Lite, seed_everything" if "seed_everything(" in module.code else "Lite"
    text = add_import(module, names).code
    return _rank_zero(without_unused(text, script))


def _class_names(c: Conversion) -> None:
    """Replace the class where it is not called: in annotations."""
    for node, _ in [*c.script.all(cst.Name), *c.script.all(cst.Attribute)]:
        parent = c.script.parents[node]
        elsewhere = isinstance(parent, cst.Attribute | cst.ImportAlias | cst.ImportFrom | cst.Call)
        if c.script.qualified(node) == "accelerate.Accelerator" and not elsewhere:
            c.edits.replace(node, "Lite", uses=False)


def _objects(c: Conversion) -> None:
    for scope in c.script.scopes:
        for node in scope.all(cst.Assign):
            if isinstance(node.value, cst.Call) and c.script.qualified(node.value.func) == "accelerate.Accelerator":
                c.roles.set(scope, dotted(node.targets[0].target), LITE)
                c.lite = dotted(node.targets[0].target)
        if "accelerator" in scope.parameters:
            c.roles.set(scope, "accelerator", LITE)


def _is_object(c: Conversion, node: cst.BaseExpression, scope: Scope) -> bool:
    return c.roles.of(node, scope) == LITE


def _accumulation_steps(c: Conversion) -> str:
    for node, _ in c.script.all(cst.Call):
        if c.script.qualified(node.func) == "accelerate.Accelerator":
            value = argument(node, "gradient_accumulation_steps")
            return code(value) if value is not None else "1"
    return "1"


def _constructor(c: Conversion, node: cst.Call) -> None:
    args: list[cst.Arg] = []
    for each in node.args:
        word = each.keyword.value if each.keyword is not None else ""
        text = code(each.value).strip("\"'")
        if word == "mixed_precision" and text in _PRECISIONS:
            args.append(keyword("precision", f'"{_PRECISIONS[text]}"'))
        elif word == "mixed_precision":
            args.append(keyword("precision", f"{_TABLE}.get({code(each.value)})"))
        elif word == "cpu" and text in ("True", "False"):
            args += [keyword("accelerator", '"cpu"')] if text == "True" else []
        elif word == "cpu":
            args.append(keyword("accelerator", f'"cpu" if {text} else "auto"'))
        elif word not in _IGNORED:
            c.edits.by_hand(node, f"{word or 'an argument'} of Accelerator has no counterpart in Lite.")
    c.edits.replace(node, call("Lite", *args))


def _method(
    c: Conversion, node: cst.Call, target: cst.BaseExpression, name: str, scope: Scope, prepared: dict[str, str]
) -> None:
    lite = code(target)
    first = node.args[0].value if node.args else None
    if name in _RENAMED:
        c.edits.replace(node.func, renamed(_RENAMED[name]))
    elif name == "local_main_process_first":
        c.edits.replace(node, f"{lite}.rank_zero_first(local=True)")
    elif name in ("unwrap_model", "free_memory", "clear") and (first is not None or name != "unwrap_model"):
        if name == "unwrap_model":
            c.edits.replace(node, lambda updated: updated.args[0].value)
        elif not isinstance(c.script.parents[node], cst.Expr) or not c.edits.remove(node):
            c.edits.by_hand(node, f"{name}() has no counterpart.")
    elif name in ("clip_grad_norm_", "clip_grad_value_"):
        _clip(c, node, lite, name, scope)
    elif name == "reduce" and first is not None:
        _reduce(c, node, lite)
    elif name in ("save_state", "load_state"):
        _state(c, node, lite, name, prepared)
    elif name == "save":
        c.edits.check(node, "a dict of states is saved; for another object use 'if is_global_zero:' and torch.save().")
    elif name == "gather":
        _gather(c, node, lite)
    elif name == "register_for_checkpointing":
        c.edits.remove(node)
    elif name not in _SAME and name not in _ELSEWHERE:
        c.edits.by_hand(node, f"{name}() has no counterpart in Lite.")


def _clip(c: Conversion, node: cst.Call, lite: str, name: str, scope: Scope) -> None:
    found = method(node.args[0].value) if node.args else None
    model = dotted(found[0]) if found is not None and found[1] == "parameters" else ""
    optimizers = c.optimizers_of(model, scope) if c.roles.of(model, scope) == MODEL else []
    value = argument(node, "max_norm" if name.endswith("norm_") else "clip_value", 1)
    if len(optimizers) != 1 or value is None:
        c.edits.by_hand(node, f"{lite}.clip_gradients(model, optimizer, max_norm=...).")
        return
    word = "max_norm" if name.endswith("norm_") else "clip_val"
    args: list[cst.BaseExpression | cst.Arg] = [
        expression(model),
        expression(optimizers[0]),
        keyword(word, code(value)),
    ]
    c.edits.replace(node, call(f"{lite}.clip_gradients", *args))


def _reduce(c: Conversion, node: cst.Call, lite: str) -> None:
    value = argument(node, "reduction", 1)
    text = code(value) if value is not None else '"sum"'
    if argument(node, "scale", 2) is not None:
        c.edits.by_hand(node, "reduce() with a scale: multiply, and use all_reduce().")
        return
    c.edits.replace(node, lambda updated: call(f"{lite}.all_reduce", updated.args[0].value, keyword("reduce_op", text)))


def _gather(c: Conversion, node: cst.Call, lite: str) -> None:
    """Replace ``gather(x)`` where it is reduced at once; its shape is another one elsewhere."""
    parent = c.script.parents[node]
    c.edits.replace(node.func, renamed("all_gather"))
    if not (isinstance(parent, cst.Attribute) and parent.attr.value in ("mean", "sum", "max", "min", "numel")):
        c.edits.check(
            node, f"{lite}.all_gather() stacks over ranks: use .flatten(0, 1) for the shape that gather() gave."
        )


def _state(c: Conversion, node: cst.Call, lite: str, name: str, prepared: dict[str, str]) -> None:
    where = node.args[0].value if node.args else None
    if where is None or not prepared:
        c.edits.by_hand(node, f"{lite}.{name.partition('_')[0]}(path, {{'model': model, 'optimizer': optimizer}}).")
        return
    state = saved_state(c, prepared)
    word = name.partition("_")[0]
    c.edits.replace(node, lambda updated: call(f"{lite}.{word}", updated.args[0].value, expression(state)))


def _attribute(c: Conversion, node: cst.Attribute, steps: str) -> None:
    name = node.attr.value
    if name in _ATTRIBUTES:
        c.edits.replace(node, renamed(_ATTRIBUTES[name]))
    elif name == "is_local_main_process":
        text = f"{code(node.value)}.local_rank == 0"
        c.edits.replace(node, f"({text})")
    elif name == "gradient_accumulation_steps":
        c.edits.replace(node, steps)
    elif name in ("on_main_process", "on_local_main_process", "trackers", "state", "distributed_type", "scaler"):
        c.edits.by_hand(node, f"{name} has no counterpart in Lite.")


def _rank_zero(text: str) -> str:
    c = Conversion(Script(text), raw=False)
    for scope in c.script.scopes:
        for node in scope.all(cst.Assign):
            if isinstance(node.value, cst.Call) and dotted(node.value.func) == "Lite":
                c.lite = dotted(node.targets[0].target)
                c.roles.set(scope, c.lite, LITE)
        if "accelerator" in scope.parameters:
            c.roles.set(scope, "accelerator", LITE)
    rank_zero(c)
    return c.edits.apply().code
