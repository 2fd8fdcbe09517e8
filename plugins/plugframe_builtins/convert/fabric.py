"""Scripts of Lightning Fabric and of early Lite: their imports change, and little else."""

from __future__ import annotations

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import keyword, renamed, without
from plugframe_builtins.convert.entry import add_import
from plugframe_builtins.convert.roles import LITE
from plugframe_builtins.convert.script import Scope, Script, argument, code, dotted, method
from plugframe_builtins.convert.unused import convert as without_unused
from plugframe_builtins.convert.unused import drop_imports

_PACKAGES = ("lightning.", "lightning_fabric.", "pytorch_lightning.", "lightning_lite.")
_CLASSES = ("Fabric", "LightningLite")
_FUNCTIONS = {"seed_everything": "seed_everything"}
_KEYWORDS = {"replace_sampler": "use_distributed_sampler"}
_RENAMED = {"sharded_model": "init_module"}
#: Strategies of Fabric and early Lite that have another name.
_STRATEGIES = {
    "ddp_find_unused_parameters_true": "ddp",
    "ddp_find_unused_parameters_false": "ddp",
    "ddp_sharded": "fsdp",
    "ddp_sharded_spawn": "fsdp",
    "fsdp_native": "fsdp",
}


def convert(script: Script) -> str:
    """Convert a script of Fabric or early Lite."""
    c = Conversion(script, raw=False)
    _objects(c)
    for node, scope in script.all(cst.Call):
        name = script.qualified(node.func)
        if _is_class(name):
            _constructor(c, node)
        found = method(node)
        if found is not None and _is_object(c, found[0], scope):
            _method(c, node, found[1])
        elif name.startswith(_PACKAGES) and not _is_class(name) and name.rpartition(".")[2] not in _FUNCTIONS:
            c.edits.by_hand(
                node, f"{name.rpartition('.')[2]} is of Lightning: select what it does by name, in Lite(...)."
            )
    imported = _names(c)
    drop_imports(c.edits, script, lambda name: _is_class(name) or _is_function(name))
    result = c.edits.apply()
    for name in imported:
        result = add_import(result, name)
    return without_unused(_imports(result.code), script)


def _is_class(name: str) -> bool:
    return name.startswith(_PACKAGES) and name.rpartition(".")[2] in _CLASSES


def _is_function(name: str) -> bool:
    return name.startswith(_PACKAGES) and name.rpartition(".")[2] in _FUNCTIONS


def _objects(c: Conversion) -> None:
    """Note the variables that hold the object: those that are assigned, and parameters that get them."""
    for scope in c.script.scopes:
        for node in scope.all(cst.Assign):
            if isinstance(node.value, cst.Call) and _makes_object(c, node.value):
                c.roles.set(scope, dotted(node.targets[0].target), LITE)
        for item in scope.all(cst.WithItem):
            if isinstance(item.item, cst.Call) and item.asname and _makes_object(c, item.item):
                c.roles.set(scope, dotted(item.asname.name), LITE)
        names = [each for each in scope.parameters if each in ("fabric", "lite")]
        for name in names:
            c.roles.set(scope, name, LITE)
    for scope in c.script.scopes[1:]:
        for call, where in c.script.calls_of(scope):
            for name, each in zip(scope.parameters, call.args, strict=False):
                if c.roles.of(each.value, where) == LITE:
                    c.roles.set(scope, name, LITE)


def _makes_object(c: Conversion, node: cst.Call) -> bool:
    name = c.script.qualified(node.func)
    return _is_class(name) or name in c.script.constructors("LightningLite") | c.script.constructors("Fabric")


def _is_object(c: Conversion, node: cst.BaseExpression, scope: Scope) -> bool:
    if c.roles.of(node, scope) == LITE:
        return True
    owners = c.script.constructors("LightningLite") | c.script.constructors("Fabric")
    outer: Scope | None = scope
    while outer is not None:
        if outer.owner is not None:
            return dotted(node) == "self" and outer.owner.name.value in owners
        outer = outer.parent
    return False


def _names(c: Conversion) -> list[str]:
    """Replace the classes and functions of Lightning by those of plugframe; return what to import."""
    found: list[str] = []
    for node, _ in c.script.all(cst.CSTNode):  # type: ignore[type-abstract]
        if not isinstance(node, cst.Name | cst.Attribute):
            continue
        parent = c.script.parents[node]
        if isinstance(parent, cst.Attribute | cst.ImportAlias | cst.ImportFrom):
            continue
        name = c.script.qualified(node)
        last = name.rpartition(".")[2]
        if _is_class(name):
            c.edits.replace(node, "Lite", uses=False)
            found.append("Lite")
        elif name.startswith(_PACKAGES) and last in _FUNCTIONS:
            c.edits.replace(node, _FUNCTIONS[last], uses=False)
            found.append(_FUNCTIONS[last])
    return sorted(set(found))


def _imports(text: str) -> str:
    """Remove the imports of what was replaced, and join those of plugframe in one line."""
    script = Script(text)
    c = Conversion(script, raw=False)
    ours = [node for node, _ in script.all(cst.ImportFrom) if dotted(node.module) == "plugframe"]
    names = sorted(
        {dotted(alias.name) for node in ours if not isinstance(node.names, cst.ImportStar) for alias in node.names}
    )
    for node in ours[1:]:
        c.edits.remove(node)
    if len(ours) > 1:
        aliases = [cst.ImportAlias(cst.Name(name)) for name in names]
        c.edits.replace(ours[0], lambda updated: updated.with_changes(names=aliases), uses=False)
    return c.edits.apply().code


def _constructor(c: Conversion, node: cst.Call) -> None:
    changes: list[cst.Arg] = []
    gpus = argument(node, "gpus")
    if gpus is not None:
        changes += [keyword("accelerator", '"gpu"'), keyword("devices", code(gpus))]
    strategy = argument(node, "strategy")
    text = code(strategy).strip("\"'") if isinstance(strategy, cst.SimpleString) else ""
    if text in _STRATEGIES:
        assert strategy is not None
        c.edits.replace(strategy, f'"{_STRATEGIES[text]}"', uses=False)
        if text.endswith("true"):
            c.edits.check(
                node, "pass strategy='ddp' the option find_unused_parameters, if a step leaves parameters out."
            )
    elif text == "dp":
        c.edits.by_hand(node, "strategy='dp' has no counterpart: use 'ddp'.")
    for name in ("tpu_cores", "ipus", "num_processes", "amp_backend"):
        if argument(node, name) is not None:
            c.edits.by_hand(node, f"{name}= has no counterpart: use accelerator= and devices=.")
    if gpus is not None:
        c.edits.replace(node, lambda updated: _extended(without(updated, "gpus"), changes), uses=False)


def _extended(node: cst.Call, more: list[cst.Arg]) -> cst.Call:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    args = [each.with_changes(comma=comma) for each in (*node.args, *more)]
    args[-1] = args[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return node.with_changes(args=args)


def _method(c: Conversion, node: cst.Call, name: str) -> None:
    if name in _RENAMED:
        c.edits.replace(node.func, renamed(_RENAMED[name]), uses=False)
    for each in node.args:
        word = each.keyword.value if each.keyword is not None else ""
        if word in _KEYWORDS and each.keyword is not None:
            c.edits.replace(each.keyword, _KEYWORDS[word], uses=False)
    if name == "setup" and argument(node, "_reapply_compile") is not None:
        c.edits.replace(node, lambda updated: without(updated, "_reapply_compile"), uses=False)
    if name in ("reduce", "reduce_decision", "cast"):
        c.edits.by_hand(node, f"{name}() has no counterpart: see all_reduce().")
    parent = c.script.parents[node]
    reduced = isinstance(parent, cst.Attribute) and parent.attr.value in ("sum", "mean", "min", "max", "any", "all")
    if name == "all_gather" and not reduced:
        c.edits.check(node, "the result has a dimension of ranks in front, on one rank too.")
