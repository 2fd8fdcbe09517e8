"""Local SGD and DiLoCo as strategies."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import Strategy
from plugframe.errors import SettingError
from plugframe.hooks import Engine, hookimpl
from plugframe.hooks.context import Context
from plugframe_localsgd.exchange import average_state, broadcast, means
from plugframe_localsgd.rounds import Round, trained

#: Key of the outer momentum in the optimizer state of a parameter.
_MOMENTUM = "outer_momentum"


class LocalSGD(Strategy):
    """Train a copy of the model on every rank, and average the copies every few optimizer steps.

    Gradients are local and never communicated. Clipping uses the local norm; ranks only compare whether it is finite
    (not with ``error_if_nonfinite=False``). Saving and tear-down end the round, so the saved model is the same on all
    ranks, and training continues with it. Buffers, such as running statistics, are those of rank 0 after each round.

    Stich, "Local SGD Converges Fast and Communicates Little", 2018, arXiv:1805.09767. With an outer optimizer:
    Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023, arXiv:2311.08105.

    Args:
        sync_every: optimizer steps per round.
        outer_lr: learning rate of the outer optimizer, SGD on the change of a round; 1 takes the average.
        outer_momentum: Nesterov momentum of the outer optimizer.
    """

    def __init__(self, *, sync_every: int = 8, outer_lr: float = 1.0, outer_momentum: float = 0.0) -> None:
        if not isinstance(sync_every, int) or isinstance(sync_every, bool) or sync_every < 1:
            raise SettingError(f"sync_every={sync_every!r} must be a number of optimizer steps, 1 or more.")
        if not outer_lr > 0:
            raise SettingError(f"outer_lr={outer_lr!r} must be a number above 0; 1 takes the average.")
        if not 0 <= outer_momentum < 1:
            raise SettingError(f"outer_momentum={outer_momentum!r} must be a number from 0 to below 1.")
        self.sync_every, self.outer_lr, self.outer_momentum = sync_every, outer_lr, outer_momentum
        self._modules: list[weakref.ref[nn.Module]] = []
        #: In the order of set-up, which is the same on all ranks.
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._rounds: MutableMapping[Optimizer, Round] = {}

    @hookimpl
    def strategy_describe(self) -> Sequence[str]:
        outer = "" if self._plain else f", by an outer step of {self.outer_lr:g} with momentum {self.outer_momentum:g}"
        return [f"parameters averaged every {self.sync_every} optimizer steps{outer}"]

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        self._rounds = WeakKeyDictionary()

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Engine:
        super().strategy_setup_module(module)
        broadcast([*module.parameters(), *module.buffers()], self.context.hooks)
        self._modules.append(weakref.ref(module))
        return None

    @hookimpl
    def strategy_setup_optimizers(
        self, module: nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        for optimizer in optimizers:
            self._rounds[optimizer] = Round(lr=self.outer_lr, momentum=self.outer_momentum)
            self._optimizers.append(weakref.ref(optimizer))
        return optimizers

    @hookimpl
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        if self.context.world.world_size == 1:
            return super().strategy_optimizer_step(optimizer, step, closure)  # nothing to average
        current = self._rounds[optimizer]
        if current.steps == 0:
            current.begin(trained(optimizer))
        result = super().strategy_optimizer_step(optimizer, step, closure)
        # Count calls, also those in which a loss scaler skipped the step: the count is equal on all ranks.
        current.steps += 1
        if current.steps == self.sync_every:
            self._end_round(optimizer)
        return result

    @hookimpl
    def strategy_clip_gradients(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        clip_value: float | None,
        max_norm: float | None,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor | None:
        if max_norm is None:
            return super().strategy_clip_gradients(module, parameters, clip_value, None, norm_type, error_if_nonfinite)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients, norm_type)
        if error_if_nonfinite:
            # Raise on all ranks: otherwise the others would wait in the next average.
            wrong = (~norm.isfinite()).float().reshape(1).to(self.context.device)
            if bool(self.context.hooks.collective_all_reduce(tensor=wrong, op="max", group=None)):
                raise RuntimeError(
                    f"The norm of the gradients is not finite on a rank (here: {float(norm)}): the loss or the data of "
                    "that rank has inf or nan. Pass error_if_nonfinite=False to continue anyway."
                )
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    @hookimpl
    def strategy_module_state(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        own = set(map(id, module.parameters()))
        for optimizer in self._alive():
            if any(id(parameter) in own for parameter in trained(optimizer)):
                self._end_round(optimizer)
        return super().strategy_module_state(module, sharded)

    @hookimpl
    def strategy_load_module_state(
        self, module: nn.Module, state: dict[str, Any], strict: bool
    ) -> tuple[list[str], list[str]]:
        result = super().strategy_load_module_state(module, state, strict)
        for current in self._rounds.values():
            current.steps = 0  # the loaded values start a new round
        return result

    @hookimpl
    def strategy_optimizer_state(self, optimizer: Optimizer, sharded: bool) -> dict[str, Any]:
        self._end_round(optimizer)
        if self.context.world.world_size > 1:
            average_state(optimizer, self.context.device, self.context.hooks)
        state = super().strategy_optimizer_state(optimizer, sharded)
        entries = dict(state["state"])
        for index, parameter in _indexed(optimizer).items():
            momentum = self._rounds[optimizer].momentum.get(parameter)
            # Skip zero momentum, so that another strategy's optimizer can load the state.
            if momentum is not None and bool(momentum.any()):
                entries[index] = {**entries.get(index, {}), _MOMENTUM: momentum}
        return {**state, "state": entries}

    @hookimpl
    def strategy_load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        own = {
            n: {key: each for key, each in entries.items() if key != _MOMENTUM} for n, entries in state["state"].items()
        }
        inner = {**state, "state": {index: entries for index, entries in own.items() if entries}}
        super().strategy_load_optimizer_state(optimizer, inner)
        current = self._rounds[optimizer]
        current.steps = 0
        current.momentum.clear()
        for index, parameter in _indexed(optimizer).items():
            momentum = state["state"].get(index, {}).get(_MOMENTUM)
            if momentum is not None:
                current.momentum[parameter] = momentum.to(parameter.device, parameter.dtype, copy=True)

    @hookimpl
    def strategy_teardown(self) -> None:
        try:
            # After an error the other ranks may not reach this average.
            if sys.exc_info()[0] is None:
                for optimizer in self._alive():
                    self._end_round(optimizer)
        finally:
            self._modules.clear()
            self._optimizers.clear()
            self._rounds = {}

    @torch.no_grad()
    def _end_round(self, optimizer: Optimizer) -> None:
        """Average the optimizer's parameters if it has stepped since the last average."""
        current = self._rounds[optimizer]
        if current.steps == 0:
            return
        parameters, hooks = trained(optimizer), self.context.hooks
        current.end(parameters, means(parameters, hooks))
        own = set(map(id, parameters))
        modules = [module for module in (reference() for reference in self._modules) if module is not None]
        buffers = [
            buffer
            for module in modules
            if any(id(parameter) in own for parameter in module.parameters())
            for buffer in module.buffers()
        ]
        broadcast(buffers, hooks)

    def _alive(self) -> list[Optimizer]:
        return [optimizer for optimizer in (reference() for reference in self._optimizers) if optimizer is not None]

    @property
    def _plain(self) -> bool:
        return self.outer_lr == 1 and self.outer_momentum == 0


class DiLoCo(LocalSGD):
    """Local SGD with long rounds and the outer optimizer of DiLoCo. The paper uses rounds of 500 steps.

    Args:
        sync_every: optimizer steps per round.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: Nesterov momentum of the outer optimizer.
    """

    def __init__(self, *, sync_every: int = 50, outer_lr: float = 0.7, outer_momentum: float = 0.9) -> None:
        super().__init__(sync_every=sync_every, outer_lr=outer_lr, outer_momentum=outer_momentum)


def _indexed(optimizer: Optimizer) -> dict[int, nn.Parameter]:
    """Return the optimizer's parameters by their index in its ``state_dict``."""
    return dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
