"""The base class of strategies: a single rank, nothing sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.checkpoint.stored import materialize
from plugframe.deferred.module import deferring, materialize_module
from plugframe.errors import UnsupportedError
from plugframe.hooks import Engine, Plugin, StrategySpec, hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.expanded import load_expanded


class ForwardShim(nn.Module):
    """A module that holds the user's module and runs the call passed to its forward.

    An engine that must wrap a module (DDP, DeepSpeed) wraps this one, and users keep their own unwrapped:
    ``engine(call, *args)`` runs ``call(*args)``, with `call` the user's own forward, hooks included.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train(module.training)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    def train(self, mode: bool = True) -> ForwardShim:
        """Set the mode of the shim only: the user sets that of the module."""
        self.training = mode
        return self


class Strategy(StrategySpec):
    """Base class of strategies: override hooks and mark them with ``@hookimpl``."""

    context: Context

    @hookimpl
    def strategy_describe(self) -> Sequence[str]:
        return ()

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        self.context = context

    @hookimpl
    def strategy_teardown(self) -> None:
        pass

    @hookimpl
    def strategy_compose(self) -> Any:
        return self

    @hookimpl
    def strategy_lead(self, base: Plugin) -> bool:
        return False

    @hookimpl
    def strategy_parallelize(self, module: nn.Module) -> None:
        raise UnsupportedError(f"{type(self).__name__} does not work beside another strategy.")

    @hookimpl
    def strategy_init_context(self, empty_init: bool | None) -> AbstractContextManager[Any]:
        # Parameters are created on their final device, if requested without storage until set-up.
        return deferring(self.context.device) if empty_init else self.context.device

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Engine:
        materialize_module(module, self.context.device)
        return None

    @hookimpl
    def strategy_setup_optimizers(
        self, module: nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        return optimizers

    @hookimpl
    def strategy_setup_module_and_optimizers(
        self, module: nn.Module, optimizers: Sequence[Optimizer]
    ) -> tuple[Engine, Sequence[Optimizer]]:
        engine = self.strategy_setup_module(module)
        return engine, self.strategy_setup_optimizers(module, optimizers)

    @hookimpl
    def strategy_data_shard(self) -> tuple[int, int]:
        return self.context.world.global_rank, self.context.world.world_size

    @hookimpl
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        return next(iterator, exhausted)

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.context.hooks.precision_backward(loss=loss, args=args, kwargs=kwargs)

    @hookimpl
    def strategy_gather_later(
        self, values: Sequence[float], look: Callable[[Sequence[Sequence[float]]], None]
    ) -> Callable[[], Sequence[Sequence[float]]] | None:
        later: Callable[[], Sequence[Sequence[float]]] | None
        later = self.context.hooks.collective_gather_later(values=values)
        return later

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: Engine, enabled: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    @hookimpl
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        return self.context.hooks.precision_optimizer_step(optimizer=optimizer, step=step, closure=closure)

    @hookimpl
    def strategy_zero_grad(self, owner: nn.Module | Optimizer) -> None:
        pass

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
        parameters = [parameter for parameter in parameters if parameter.numel()]  # torch fails on empty tensors
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)
            return None
        assert max_norm is not None
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    @hookimpl
    def strategy_module_state(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        return module.state_dict()

    @hookimpl
    def strategy_load_module_state(
        self, module: nn.Module, state: dict[str, Any], strict: bool
    ) -> tuple[list[str], list[str]]:
        loaded = load_expanded(module, state)
        rest = {key: value for key, value in state.items() if key not in loaded} if loaded else state
        result = module.load_state_dict(materialize(rest), strict=False)
        return [key for key in result.missing_keys if key not in loaded], list(result.unexpected_keys)

    @hookimpl
    def strategy_optimizer_state(self, optimizer: Optimizer, sharded: bool) -> dict[str, Any]:
        return optimizer.state_dict()

    @hookimpl
    def strategy_load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(materialize(state))
