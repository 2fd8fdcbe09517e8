"""Parameters that a precision or a move to another device replaced, and optimizers that were made with the old ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.errors import SettingError
from plugframe.utils.references import repoint


class Successors:
    """Knows which parameter took the place of which, as long as the old one lives, in an optimizer for instance."""

    def __init__(self) -> None:
        # By id: tensors are compared by value. The reference says whether an id is still that of the same parameter.
        self._found: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor] | None, str]] = {}

    def note(self, before: Mapping[str, nn.Parameter], module: nn.Module) -> None:
        """Take note of the parameters of `module` that are others than `before`, by name."""
        now = dict(module.named_parameters(remove_duplicate=False))
        kept = set(map(id, now.values()))
        self._found = {key: each for key, each in self._found.items() if each[0]() is not None}
        for name, old in before.items():
            if id(old) not in kept:
                new = now.get(name)
                self._found[id(old)] = (weakref.ref(old), None if new is None else weakref.ref(new), name)

    def carry_over(self, optimizers: Iterable[Optimizer]) -> None:
        """Have optimizers refer to the new parameters, in place.

        Raises:
            SettingError: if one holds a parameter that nothing trainable has taken the place of, by name.
        """
        if not self._found:
            return
        optimizers = list(optimizers)
        pairs: dict[Any, Any] = {}
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                reference, successor, name = self._found.get(id(parameter), (None, None, ""))
                if reference is None or id(reference()) != id(parameter):
                    continue
                new = None if successor is None else successor()
                trains = getattr(new, "requires_grad", False)
                if parameter.requires_grad and not trains:
                    what = "is not there any more" if new is None else "cannot be trained any more"
                    raise SettingError(
                        f"Set-up has replaced parameter {name!r}, which this {type(optimizer).__name__} updates, and "
                        f"it {what}: call lite.setup_module(model) first, make the optimizer of the parameters it has "
                        "then, and call lite.setup_optimizers(optimizer)."
                    )
                if new is not None:
                    pairs[parameter] = new
        for optimizer in optimizers if pairs else ():
            repoint(optimizer, pairs)
