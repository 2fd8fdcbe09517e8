"""Files, plots and trackers that every rank would write."""

from __future__ import annotations

import re

import libcst as cst

from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import call, keyword
from plugframe_builtins.convert.rank_zero import without_rank
from plugframe_builtins.convert.script import argument, code

_WRITERS = ("numpy.save", "numpy.savez", "numpy.savetxt", "wandb.init", "mlflow.start_run", "pickle.dump", "json.dump")
_NAMES = ("savefig", "to_csv", "SummaryWriter", "save_pretrained")


def convert(c: Conversion) -> None:
    """Mark what should happen on rank 0 alone."""
    for node, scope in c.script.all(cst.Call):
        name = c.script.qualified(node.func)
        if name.startswith("tqdm.") and name.rpartition(".")[2] in ("tqdm", "trange"):
            _progress(c, node)
        if not (name in _WRITERS or name.rpartition(".")[2] in _NAMES or (name == "open" and _writes(node))):
            continue
        guards = [each for each in c.script.ancestors(node) if isinstance(each, cst.If | cst.With)]
        if any(isinstance(each, cst.If) and without_rank(c, each.test, scope) is not None for each in guards):
            continue
        opened = any(isinstance(each, cst.With) and "open(" in code(each.items[0]) for each in guards)
        if name.endswith(".dump") and opened:
            continue
        c.edits.check(node, f"every rank writes this: put it under 'if {c.lite}.is_global_zero:'.")


def _progress(c: Conversion, node: cst.Call) -> None:
    """Show the bar on rank 0 alone."""
    if node.args and argument(node, "disable") is None:
        more = keyword("disable", f"not {c.lite}.is_global_zero")
        c.edits.replace(node, lambda updated: call(code(updated.func), *updated.args, more))


def _writes(node: cst.Call) -> bool:
    mode = argument(node, "mode", 1)
    return mode is not None and re.search("[wax]", code(mode)) is not None
