"""Track parameters replaced at set-up, and update optimizers that were made with the old ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.errors import SettingError
from plugframe.utils.references import repoint


class ReplacedParameters:
    """Maps replaced parameters to new ones, while the old ones are referenced, for example by an optimizer."""

    def __init__(self) -> None:
        # By id, since tensors compare by value. The weak reference detects an id that was reused.
        self._replaced: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor] | None, str]] = {}

    def record(self, before: Mapping[str, nn.Parameter], module: nn.Module) -> None:
        """Record the parameters of `module` that differ from those in `before`, by name."""
        now = dict(module.named_parameters(remove_duplicate=False))
        current = set(map(id, now.values()))
        self._replaced = {key: each for key, each in self._replaced.items() if each[0]() is not None}
        for name, old in before.items():
            if id(old) not in current:
                new = now.get(name)
                self._replaced[id(old)] = (weakref.ref(old), None if new is None else weakref.ref(new), name)

    def update_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Replace the old parameters in optimizers by the new ones, in place.

        Raises:
            SettingError: if an optimizer updates a parameter that was removed, or replaced by one without gradients.
        """
        if not self._replaced:
            return
        optimizers = list(optimizers)
        pairs: dict[Any, Any] = {}
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                old, new_reference, name = self._replaced.get(id(parameter), (None, None, ""))
                if old is None or id(old()) != id(parameter):
                    continue
                new = None if new_reference is None else new_reference()
                trains = getattr(new, "requires_grad", False)
                if parameter.requires_grad and not trains:
                    what = "no longer exists" if new is None else "is no longer trainable"
                    raise SettingError(
                        f"Set-up has replaced parameter {name!r}, which this {type(optimizer).__name__} updates, and "
                        f"it {what}: call lite.setup_module(model) first, then make the optimizer with the model's "
                        "new parameters, and call lite.setup_optimizers(optimizer)."
                    )
                if new is not None:
                    pairs[parameter] = new
        for optimizer in optimizers if pairs else ():
            repoint(optimizer, pairs)
