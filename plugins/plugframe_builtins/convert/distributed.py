"""Hand-made data parallelism: process groups, samplers and wrappers of ``torch.distributed`` go."""

from __future__ import annotations

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call, expression
from plugframe_builtins.convert.roles import LOCAL_RANK, MODEL, RANK, SAMPLER, WORLD_SIZE, WRAPPERS, rank_variable
from plugframe_builtins.convert.script import Scope, Script, argument, code, dotted, method

_DIST = "torch.distributed."
_REMOVED = ("init_process_group", "destroy_process_group")
_OPERATIONS = {"SUM": "sum", "AVG": "mean", "MAX": "max", "MIN": "min", "PRODUCT": "product"}
ATTRIBUTES = {RANK: "global_rank", LOCAL_RANK: "local_rank", WORLD_SIZE: "world_size"}
_MASTER = ("MASTER_ADDR", "MASTER_PORT")


def is_distributed(script: Script) -> bool:
    """Return whether a script sets up its own ranks."""
    names = {script.qualified(node.func) for node, _ in script.all(cst.Call)}
    return any(
        name.startswith(_DIST + "init_process_group")
        or name.rpartition(".")[2] in ("DistributedSampler", "DDP")
        or name.endswith(".DistributedDataParallel")
        for name in names
    )


def convert(c: Conversion) -> None:
    """Replace what a script does with ``torch.distributed``."""
    for node, scope in c.script.all(cst.Call):
        name = c.script.qualified(node.func)
        if name.startswith(_DIST):
            _call(c, node, name.removeprefix(_DIST))
        elif name.rpartition(".")[2] in WRAPPERS and name.startswith("torch.nn.") and node.args:
            _wrapper(c, node)
        elif name == "torch.cuda.set_device" and c.distributed:
            c.edits.remove(node)
        elif name.endswith("DataLoader") and c.distributed:
            _sampler_of_loader(c, node, scope)
        elif rank_variable(node, c.script):
            c.edits.replace(node, f"{c.lite}.{ATTRIBUTES[rank_variable(node, c.script)]}")
        elif _sets_epoch(c, node, scope):
            c.edits.remove(node)
        elif c.distributed and _is_no_sync(c, node, scope):
            c.edits.replace(node, lambda updated: call(f"{c.lite}.no_backward_sync", updated.func.value))
    for assign, scope in c.script.all(cst.Assign):
        if c.distributed and any(f'os.environ["{key}"]' in code(assign).replace("'", '"') for key in _MASTER):
            c.edits.remove(assign)
        elif c.roles.infer(assign.value, scope) == SAMPLER and c.distributed:
            _sampler(c, assign, scope)
    if c.distributed:
        _modules(c)
        _empty_functions(c)


def _call(c: Conversion, node: cst.Call, name: str) -> None:
    lite = c.lite
    if name in _REMOVED:
        if not c.edits.remove(node):
            c.edits.by_hand(node, f"{name}() belongs to plugframe now: remove it.")
    elif name == "get_rank":
        c.edits.replace(node, f"{lite}.global_rank")
    elif name == "get_world_size":
        c.edits.replace(node, f"{lite}.world_size")
    elif name == "barrier":
        c.edits.replace(node, f"{lite}.barrier()")
    elif name in ("all_reduce", "broadcast", "all_gather", "all_gather_object") and _is_statement(c, node):
        _collective(c, node, name)
    elif name not in ("is_initialized", "is_available", "utils.data.distributed.DistributedSampler"):
        c.edits.check(node, f"{name}() needs a process group, which a job of one rank does not have.")


def _is_statement(c: Conversion, node: cst.Call) -> bool:
    return isinstance(c.script.parents[node], cst.Expr)


def _collective(c: Conversion, node: cst.Call, name: str) -> None:
    lite = c.lite
    target = code(node.args[0].value)
    if any(each.keyword is not None and each.keyword.value in ("group", "async_op") for each in node.args):
        c.edits.check(node, f"{name}() of a group needs a process group, which a job of one rank does not have.")
        return
    if name == "all_reduce":
        operation = argument(node, "op", 1)
        word = _OPERATIONS.get(dotted(operation).rpartition(".")[2] if operation is not None else "SUM")
        if word is None or not isinstance(node.args[0].value, cst.Name):
            c.edits.check(node, f"{name}() needs a process group, which a job of one rank does not have.")
            return
        text = f'{target} = {lite}.all_reduce({target}, reduce_op="{word}")'
    elif name == "broadcast":
        source = argument(node, "src", 1)
        text = f"{target}.copy_({lite}.broadcast({target}, src={code(source) if source is not None else 0}))"
    else:
        value = code(node.args[1].value)
        text = f"{target}[:] = {lite}.all_gather({value}{', as_object=True' if name.endswith('object') else ''})"
    parsed = cst.parse_statement(text)
    assert isinstance(parsed, cst.SimpleStatementLine)
    small = parsed.body[0]
    c.edits.replace(c.script.parents[node], small)


def _wrapper(c: Conversion, node: cst.Call) -> None:
    inner = node.args[0].value
    parent = c.script.parents[node]
    if isinstance(parent, cst.Assign) and code(parent.targets[0].target) == code(inner) and c.edits.remove(node):
        return
    c.edits.replace(node, lambda updated: updated.args[0].value, uses=False)


def _sets_epoch(c: Conversion, node: cst.Call, scope: Scope) -> bool:
    found = method(node)
    if found is None or found[1] != "set_epoch" or not c.distributed:
        return False
    return c.roles.of(found[0], scope) == SAMPLER or dotted(found[0]).endswith(".sampler")


def _is_no_sync(c: Conversion, node: cst.Call, scope: Scope) -> bool:
    found = method(node)
    return found is not None and found[1] == "no_sync" and c.roles.of(found[0], scope) == MODEL


def _modules(c: Conversion) -> None:
    """Replace ``model.module`` by ``model``."""
    for node, scope in c.script.all(cst.Attribute):
        if node.attr.value == "module" and c.roles.of(node.value, scope) == MODEL:
            c.edits.replace(node, lambda updated: updated.value, uses=False)


def _sampler(c: Conversion, node: cst.Assign, scope: Scope) -> None:
    """Remove a sampler's assignment, or set it to None where the script asks for it elsewhere."""
    name = dotted(node.targets[0].target)
    uses = 0
    for each in c.script.top.nodes if scope.parent is None else scope.nodes:
        if dotted(each) != name or each is node.targets[0].target or not isinstance(each, cst.Name | cst.Attribute):
            continue
        used_by_loader = any(
            isinstance(outer, cst.Call) and c.script.qualified(outer.func).endswith("DataLoader")
            for outer in c.script.ancestors(each)
        )
        statement = c.script.statement(each)
        sets_epoch = isinstance(statement, cst.SimpleStatementLine) and ".set_epoch(" in code(statement)
        uses += not used_by_loader and not sets_epoch and not _guards_only_epochs(c, each)
    others = any(
        dotted(each) == name
        for other in c.script.scopes
        if other is not scope
        for each in other.nodes
        if isinstance(each, cst.Name | cst.Attribute)
    )
    if uses or others or not c.edits.remove(node):
        c.edits.replace(node.value, "None", uses=False)


def _guards_only_epochs(c: Conversion, node: cst.CSTNode) -> bool:
    """Return whether a node is in the condition of an ``if`` that only sets the epoch, and remove that."""
    for each in c.script.ancestors(node):
        if isinstance(each, cst.If) and c.script.inside(node, each.test) and each.orelse is None:
            body = each.body.body
            if len(body) == 1 and ".set_epoch(" in code(body[0]):
                return True
        if isinstance(each, cst.BaseStatement):
            return False
    return False


def _sampler_of_loader(c: Conversion, node: cst.Call, scope: Scope) -> None:
    """Replace a loader's ``sampler=DistributedSampler(...)`` by ``shuffle=``."""
    sampler = argument(node, "sampler")
    if sampler is None:
        return
    built = sampler if isinstance(sampler, cst.Call) else None
    if built is None:
        for each in scope.all(cst.Assign):
            if dotted(each.targets[0].target) == dotted(sampler) and c.roles.infer(each.value, scope) == SAMPLER:
                value = each.value.body if isinstance(each.value, cst.IfExp) else each.value
                built = value if isinstance(value, cst.Call) else None
    if built is None or not c.script.qualified(built.func).endswith("DistributedSampler"):
        return
    shuffle = argument(built, "shuffle", 3)
    text = code(shuffle) if shuffle is not None else "True"
    if argument(built, "drop_last", 5) is not None:
        c.edits.check(
            node, "the sampler had drop_last=: every sample is read now, in batches of uneven size at the end."
        )

    def change(updated: cst.Call) -> cst.Call:
        kept: list[cst.Arg] = []
        for each in updated.args:
            name = each.keyword.value if each.keyword is not None else ""
            if name == "sampler":
                kept.append(each.with_changes(keyword=cst.Name("shuffle"), value=expression(text)))
            elif name != "shuffle":
                kept.append(each)
        last = updated.args[-1]
        kept[-1] = kept[-1].with_changes(comma=last.comma, whitespace_after_arg=last.whitespace_after_arg)
        return updated.with_changes(args=kept)

    c.edits.replace(node, change, uses=False)


def _empty_functions(c: Conversion) -> None:
    """Remove functions that have nothing left to do, and the calls of them."""
    for name, scope in c.script.functions.items():
        assert isinstance(scope.node, cst.FunctionDef)
        body = [each for each in scope.node.body.body if not _is_text(each)]
        if not body or not all(each in c.edits.removed or _does_nothing(each) for each in body):
            continue
        if not any(each in c.edits.removed for each in body):
            continue
        calls = c.script.calls_of(scope)
        mentions = [node for node, _ in c.script.all(cst.Name) if node.value == name]
        if len(mentions) == len(calls) + 1 and all(_is_statement(c, each) for each, _ in calls):
            for each, _ in calls:
                c.edits.remove(each)
            c.edits.removed.add(scope.node)


def _is_text(node: cst.CSTNode) -> bool:
    return (
        isinstance(node, cst.SimpleStatementLine)
        and isinstance(node.body[0], cst.Expr)
        and isinstance(node.body[0].value, cst.SimpleString)
    )


def _does_nothing(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and isinstance(
        node.body[0], cst.Pass | cst.Import | cst.ImportFrom
    )


def spawned(c: Conversion) -> bool:
    """Replace ``mp.spawn(main, args=(...), nprocs=n)`` by a call of the function on every rank."""
    done = False
    for node, _ in c.script.all(cst.Call):
        if c.script.qualified(node.func) not in (
            "torch.multiprocessing.spawn",
            "torch.multiprocessing.start_processes",
        ):
            continue
        function = argument(node, "fn", 0)
        given = argument(node, "args", 1)
        ranks = argument(node, "nprocs", 2)
        if dotted(function) not in c.script.functions or not isinstance(given, cst.Tuple | None):
            c.edits.by_hand(node, f"call the function with {c.lite}.global_rank, on every rank, in place of spawn().")
            continue
        values = [code(each.value) for each in given.elements] if given is not None else []
        values = [f"{c.lite}.world_size" if ranks is not None and each == code(ranks) else each for each in values]
        values = [f"{c.lite}.global_rank", *values]
        made = call(dotted(function), *(expression(each) for each in values))
        c.edits.replace(node, made)
        c.edits.insert_before(node, f"{c.lite} = Lite()")
        c.edits.insert_before(node, f"{c.lite}.launch()")
        done = True
    return done
