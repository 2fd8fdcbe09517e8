"""Text generation with a module whose parameters are gathered in each forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

#: Read by transformers: ranks whose texts have ended go on calling forward until those of all ranks have.
_MARK = "_is_fsdp_managed_module"


def keep_in_step(module: nn.Module) -> Callable[[], None] | None:
    """Make ``generate`` of a Hugging Face model keep ranks in step; return a function that undoes it, if it is one."""
    if not callable(getattr(type(module), "generate", None)) or _MARK in vars(module):
        return None
    vars(module)[_MARK] = True
    reference = weakref.ref(module)

    def undo() -> None:
        module = reference()
        if module is not None:
            vars(module).pop(_MARK, None)

    return undo
