"""Automatic mixed precision by hand."""

from __future__ import annotations

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.roles import SCALER
from plugframe_builtins.convert.script import argument, code, dotted, method


def convert(c: Conversion) -> None:
    """Replace ``autocast`` and ``GradScaler`` by the precision."""
    dtype, enabled = "", ""
    for node, scope in c.script.all(cst.Call):
        name = c.script.qualified(node.func)
        found = method(node)
        if name.rpartition(".")[2] == "autocast" and name.startswith("torch."):
            if any(code(each.value) == "False" and each.keyword is not None for each in node.args):
                continue  # a part that the script keeps in full precision
            value = argument(node, "dtype", 1)
            text = dotted(value).rpartition(".")[2] if value is not None else ""
            on_cpu = "cpu" in name or any("cpu" in code(each.value) for each in node.args)
            dtype = text or ("bfloat16" if on_cpu else "float16")
            given = argument(node, "enabled", 0 if name.startswith(("torch.cuda", "torch.cpu")) else 2)
            enabled = code(given) if given is not None else enabled
            c.edits.replace(node, f"{c.lite}.autocast()")
        elif found is not None and c.roles.of(found[0], scope) == SCALER:
            _scaler_call(c, node, found[1])
        elif name.rpartition(".")[2] == "GradScaler":
            given = argument(node, "enabled")
            enabled = enabled or (code(given) if given is not None else "")
            c.edits.remove(node)
    if dtype:
        word = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}.get(dtype, "")
        if enabled in ("", "True") and word:
            c.precision = f'"{word}"'
        else:
            for node, _ in c.script.all(cst.Call):
                if c.script.qualified(node.func).rpartition(".")[2] == "autocast":
                    c.edits.check(node, "the precision is selected from outside: --precision=bf16-mixed or 16-mixed.")
                    break


def _scaler_call(c: Conversion, node: cst.Call, name: str) -> None:
    if name == "step" and node.args:
        c.edits.replace(
            node,
            lambda updated: updated.with_changes(
                func=cst.Attribute(updated.args[0].value, cst.Name("step")), args=list(updated.args[1:])
            ),
            uses=False,
        )
    elif name in ("update", "unscale_", "load_state_dict"):
        c.edits.remove(node)
    elif name == "state_dict":
        element = c.script.parents[node]
        holder = c.script.parents.get(element)
        if isinstance(holder, cst.Dict):
            c.edits.replace(element, cst.RemovalSentinel.REMOVE, uses=False)
    elif name not in ("scale",):
        c.edits.by_hand(node, f"the loss scale belongs to the precision: remove {name}().")
