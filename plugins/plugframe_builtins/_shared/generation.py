"""Text generation with a module whose parameters are gathered in each forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

#: Read by transformers: ranks whose texts have ended go on calling forward until those of all ranks have.
_MARK = "_is_fsdp_managed_module"


def keep_in_step(module: nn.Module) -> Callable[[], None]:
    """Make ``generate`` of Hugging Face models keep ranks in step; return a function that undoes it.

    Args:
        module: such a model, or one that has such a model in it, as one of peft.
    """
    parts = [
        weakref.ref(part)
        for part in module.modules()
        if callable(getattr(type(part), "generate", None)) and _MARK not in vars(part)
    ]
    for reference in parts:
        vars(reference())[_MARK] = True

    def undo() -> None:
        for reference in parts:
            part = reference()
            if part is not None:
                vars(part).pop(_MARK, None)

    return undo
