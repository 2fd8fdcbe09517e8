"""Text generation with a module whose parameters are gathered in each forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack

from torch import nn

#: Read by transformers: ranks whose texts have ended go on calling forward until those of all ranks have.
_MARK = "_is_fsdp_managed_module"


def keep_in_step(module: nn.Module, undo: ExitStack) -> None:
    """Make ``generate`` of Hugging Face models keep ranks in step.

    Args:
        module: such a model, or one that has such a model in it, as one of peft.
        undo: gets what undoes it, if there is anything to undo.
    """
    parts = [
        weakref.ref(part)
        for part in module.modules()
        if callable(getattr(type(part), "generate", None)) and _MARK not in vars(part)
    ]
    for reference in parts:
        vars(reference())[_MARK] = True

    if parts:
        undo.callback(_unmark, parts)


def _unmark(parts: Iterable[weakref.ref[nn.Module]]) -> None:
    for reference in parts:
        part = reference()
        if part is not None:
            vars(part).pop(_MARK, None)
