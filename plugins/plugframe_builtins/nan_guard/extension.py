"""An extension that guards optimizer steps: one flag for losses, one norm for gradients, agreed by all ranks."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe import hookimpl
from plugframe.base import Extension, warn_caller
from plugframe.hooks.context import Context
from plugframe_builtins.nan_guard import plugin


class NaNGuard(Extension):
    """Skip a step on all ranks if a loss or a gradient is inf or NaN on any; request a stop after many in a row.

    Under a loss scaler only losses count: it skips steps whose gradients overflow, and lowers its scale.

    Args:
        action: ``"skip"``, or ``"raise"`` for a FloatingPointError on all ranks.
        max_in_a_row: skipped steps in a row after which ``lite.should_stop`` is True.

    Attributes:
        num_skipped: skipped steps so far, those before the checkpoint the run was resumed from included.
        num_in_a_row: skipped steps since the last one that was made.
    """

    def __init__(self, *, action: str = "skip", max_in_a_row: int = 10) -> None:
        plugin.validate(self, action=action, max_in_a_row=max_in_a_row)
        self.action, self.max_in_a_row = action, max_in_a_row
        self.num_skipped = self.num_in_a_row = 0
        self._modules: list[weakref.ref[nn.Module]] = []
        self._bad_loss: Tensor | None = None

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context, self._modules, self._bad_loss = context, [], None
        self.num_skipped = self.num_in_a_row = 0

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        self._modules.append(weakref.ref(module))

    @hookimpl
    def on_backward(self, loss: Tensor) -> None:
        bad = (~loss.detach().isfinite()).any()  # read at the step: no synchronisation with the device here
        self._bad_loss = bad if self._bad_loss is None else bad | self._bad_loss

    @hookimpl
    def skip_optimizer_step(self, optimizer: Optimizer) -> bool:
        hooks, device = self._context.hooks, self._context.device
        bad = torch.zeros((), device=device) if self._bad_loss is None else self._bad_loss.to(device).float()
        mine, self._bad_loss = bad, None
        if not hooks.precision_unscale(optimizer=optimizer):
            bad = torch.maximum(bad, (~self._norm(optimizer).isfinite()).to(device).float())
        if not bool(hooks.collective_all_reduce(tensor=bad, op="max", group=None)):
            self.num_in_a_row = 0
            return False
        self.num_skipped += 1
        self.num_in_a_row += 1
        found = self._finding(bool(mine))
        if self.action == "raise":
            raise FloatingPointError(
                f"{found}: the optimizer step is not made (extension 'nan-guard', action='raise')."
            )
        if self._context.world.global_rank == 0:
            warn_caller(f"{found}: step skipped, {self.num_in_a_row} in a row.")
        if self.num_in_a_row >= self.max_in_a_row:
            self._context.request_stop(f"{self.num_in_a_row} steps in a row had a loss or gradient that is not finite")
        return True

    def _finding(self, bad_loss: bool) -> str:
        """Return what is not finite, and on which ranks. Every rank must call it."""
        losses = self._context.hooks.collective_all_gather_object(obj=bad_loss, group=None)
        ranks = [rank for rank, bad in enumerate(losses) if bad]
        if not ranks:
            return "A gradient is not finite"
        where = f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if len(losses) > 1 else ""
        return f"The loss is not finite{where}"

    def _norm(self, optimizer: Optimizer) -> Tensor:
        """Return the largest magnitude of the optimizer's gradients, under every strategy the same on all ranks."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        wanted = set(map(id, parameters))
        modules = [module for module in (reference() for reference in self._modules) if module is not None]
        owner = next((m for m in modules if any(id(p) in wanted for p in m.parameters())), nn.Module())
        limits = {"clip_value": None, "max_norm": math.inf, "norm_type": math.inf, "error_if_nonfinite": False}
        norm: Tensor = self._context.hooks.strategy_clip_gradients(module=owner, parameters=parameters, **limits)
        return norm

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]
