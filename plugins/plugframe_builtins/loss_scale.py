"""The loss scale: torch's ``GradScaler``, told when to do what, for any number of optimizers in any order."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from plugframe.errors import OrderError


class LossScale:
    """Scales losses, and has every gradient unscaled by what it was scaled with.

    ``GradScaler`` wants its scale changed (``update``) once all optimizers of an iteration have stepped, and
    nobody says when that is. So it is changed as late as can be, before the next loss is scaled, and gradients
    that still wait for their optimizer then (accumulated ones, another model's) change with it. Scales are powers
    of two, unless a scaler with other factors is given, so that this costs no precision.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._modules: list[weakref.ref[nn.Module]] = []
        # Since the last update, by id: whose gradients are true to size, before their step and after it.
        self._unscaled: dict[int, Optimizer] = {}
        self._stepped: dict[int, Optimizer] = {}
        self._used = False

    def watch(self, module: nn.Module) -> None:
        """Keep the gradients of `module` in step with the scale."""
        self._modules.append(weakref.ref(module))

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to compute gradients of."""
        self._settle()
        self._used = True
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Make the optimizer's gradients true to size, if they are not yet."""
        key = id(optimizer)
        if key not in self._stepped and key not in self._unscaled and _gradients(optimizer):
            self._check_used()
            self._scaler.unscale_(optimizer)
            self._unscaled[key] = optimizer

    def step(self, optimizer: Optimizer, step: Callable[..., Any]) -> Any:
        """Run the optimizer's step on true gradients; leave it out, and return None, if one is not finite."""
        gradients = _gradients(optimizer)
        if not gradients:
            return step()
        self._check_used()
        if id(optimizer) in self._stepped:
            # A second step without a backward between: the scaler would unscale once more.
            return step() if all(bool(gradient.isfinite().all()) for gradient in gradients) else None
        # The scaler calls optimizer.step(), which runs the user's own; what that was given is bound to `step`.
        keywords = step.keywords if isinstance(step, functools.partial) else {}
        result = self._scaler.step(optimizer, **keywords)
        self._unscaled.pop(id(optimizer), None)
        self._stepped[id(optimizer)] = optimizer
        return result

    def state(self) -> dict[str, Any]:
        """Return the scale and how it changes, as plain values."""
        self._settle()
        return self._scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self._settle()
        self._scaler.load_state_dict(state)

    def _check_used(self) -> None:
        if not self._used:
            raise OrderError(
                "The optimizer has gradients, and none of them was scaled: compute them with lite.backward(loss), "
                "not loss.backward()."
            )

    @torch.no_grad()
    def _settle(self) -> None:
        """Let the scale follow what the steps found, and the gradients that wait for a step follow the scale."""
        if not self._stepped and not self._unscaled:
            return
        waiting = self._waiting()
        early = [gradient for optimizer in self._unscaled.values() for gradient in _gradients(optimizer)]
        # Reading the scale waits for the device; with one optimizer nothing is left waiting.
        before = self._scaler.get_scale() if waiting or early else 1.0
        # Given a scale, update() only forgets who has unscaled.
        self._scaler.update(None if self._stepped else before)
        self._stepped.clear()
        self._unscaled.clear()
        if waiting or early:
            after = self._scaler.get_scale()
            for gradient in early:
                gradient.mul_(after)
            for gradient in waiting if after != before else ():
                gradient.mul_(after / before)

    def _waiting(self) -> list[Tensor]:
        """Return the gradients that are still scaled."""
        optimizers = (*self._stepped.values(), *self._unscaled.values())
        done = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        modules = [module for module in (reference() for reference in self._modules) if module is not None]
        found = {id(p): p.grad for module in modules for p in module.parameters() if p.grad is not None}
        return [gradient for key, gradient in found.items() if key not in done]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
