"""Inside the loop: backward, accumulation, clipping, and where tensors are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.adopt import state_of
from plugframe.errors import SettingError
from plugframe.lite import checks, collectives
from plugframe.lite.core import Core

T = TypeVar("T")


class Loop(Core):
    """What a training step calls."""

    def backward(
        self,
        tensor: Tensor,
        *args: Any,
        model: nn.Module | None = None,
        batch: Any = None,
        reduction: Literal["mean", "sum"] = "mean",
        **kwargs: Any,
    ) -> None:
        """Compute gradients, in place of ``tensor.backward(*args, **kwargs)``. Every rank must call it.

        The gradients that the ranks end with are those of one process on the batches of all of them, for the loss
        that `reduction` says, and true to size under a loss scaler too. A batch that ranks share unevenly weighs by its
        samples, whenever it was read: it is known by the tensors that a model was called with, and a loss may add up
        several batches.

        Args:
            tensor: the loss of this rank's batch; 0-d, or any shape with ``gradient=``.
            model: the module the loss belongs to, where several were set up and the strategy wants to know; the
                only one that was set up is known without.
            batch: what the loader gave, any part of it that has tensors; needed only where batches are read ahead
                and models are called with new tensors that were made from them.
            reduction: "mean" of the samples, or "sum": then the gradients are those of the sum over the batches of
                all ranks. A loss that is divided by a number all ranks have in common (of tokens, after
                ``lite.all_reduce``) is a sum.

        Raises:
            OrderError: if batches are uneven between ranks and there is no telling which of them the loss is of.
        """
        checks.check_loss(tensor, set_up=bool(self._modules))
        if reduction not in ("mean", "sum"):
            raise SettingError(f"backward(reduction={reduction!r}): it is 'mean' or 'sum'.")
        if model is None and len(self._modules) == 1:
            model = self._modules[0]()
        weights, scale = self._phase.weights, 1.0
        handles: list[Any] = []
        if weights.uneven:
            scale, handles = weights.weigh(tensor, batch, reduction)
        if reduction == "sum":
            scale *= self._hooks.strategy_data_shard()[1]
        if scale != 1.0:
            tensor = tensor * scale
        weights.model_called = weights.trains = True
        weights.unmarked = False
        weights.num_backwards += 1
        phase = self._phase
        phase.in_backward = phase.backward_called = True
        phase.num_backwards += not phase.no_sync
        try:
            self._hooks.strategy_backward(loss=tensor, module=model, args=args, kwargs=kwargs)
        finally:
            phase.in_backward = False
            for handle in handles:
                handle.remove()
            self._hooks.precision_finish_backward()
        if self._hooks.on_backward is not None:
            self._hooks.on_backward(loss=tensor)

    @property
    def batch_weight(self) -> float:
        """What the batch at hand weighs against those of the other ranks: samples × ranks / all samples.

        It is 1 but for a last batch that ranks share unevenly, and 0 for one a rank was given only to keep step.
        `backward` multiplies the loss by it; the mean over ranks of ``loss * lite.batch_weight`` is the mean over
        all samples. At hand is the batch that a model was called with, or the one that was read since.

        Raises:
            OrderError: if batches were read ahead, and there is no telling which is meant.
        """
        weights = self._phase.weights
        if not weights.uneven:
            return 1.0
        weights.on_weight_requested()
        return weights.current()

    def _mean_loss(self, loss: Any) -> Any:
        """Return the mean over ranks of a closure's loss, each weighing as its batch; what is no number stays."""
        if isinstance(loss, Tensor):
            return self._hooks.collective_all_reduce(tensor=loss.detach() * self.batch_weight, op="mean", group=None)
        if isinstance(loss, float):
            value = torch.tensor(loss * self.batch_weight, dtype=torch.float64)
            return self._hooks.collective_all_reduce(tensor=value, op="mean", group=None).item()
        return loss

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context in which gradients are accumulated but not exchanged: for all but the last micro-batch.

        Forward and backward of the micro-batch both belong inside.
        """
        checks.check_set_up(module, "no_backward_sync", self._hooks)
        engine = state_of(module).engine
        return cast(
            "AbstractContextManager[Any]",
            self._hooks.strategy_no_sync(module=module, engine=engine, enabled=bool(enabled)),
        )

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of `optimizer`'s parameters, by value or by total norm. Every rank must call it.

        Under a loss scaler a step with non-finite gradients is skipped by itself, and they are no error here.

        Returns:
            For ``max_norm`` the total norm before clipping, a 0-d tensor, equal on all ranks; else None.

        Raises:
            RuntimeError: if the norm is not finite and `error_if_nonfinite`, on all ranks.
        """
        checks.check_limits(clip_val, max_norm)
        checks.check_set_up(module, "clip_gradients", self._hooks)
        checks.check_set_up(optimizer, "clip_gradients", self._hooks)
        checks.check_holds(module, optimizer, "clip_gradients")
        skips = self._hooks.precision_unscale(optimizer=optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return cast(
            "Tensor | None",
            self._hooks.strategy_clip_gradients(
                module=module,
                parameters=parameters,
                clip_value=clip_val,
                max_norm=max_norm,
                norm_type=float(norm_type),
                error_if_nonfinite=error_if_nonfinite and not skips,
            ),
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context the precision runs a forward in, for code outside of a module."""
        self._started("autocast")
        return cast("AbstractContextManager[Any]", self._hooks.precision_forward_context())

    def to_device(self, obj: T) -> T:
        """Return `obj` (a module, a tensor, or any nesting of tensors) on this rank's device."""
        context = self._started("to_device")
        if isinstance(obj, nn.Module):
            return obj.to(context.device)
        moved = self._hooks.accelerator_move_batch(batch=obj, device=context.device)
        # An accelerator may trust batches to be where they belong; here anything can come from anywhere.
        return cast("T", collectives.on_device(moved, context.device))

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Return a context in which a module is built on this rank's device, in the precision's dtype.

        Args:
            empty_init: True builds big parameters and buffers without storage. They get their values when the
                module is set up, one after the other, and exactly those an eager build would have given them; a
                strategy that spreads parameters over the ranks never holds the whole model. What changes
                parameters belongs inside the context too: afterwards only `setup` may touch them.
        """
        self._started("init_module")
        stack = ExitStack()
        stack.enter_context(self._hooks.precision_init_context())
        return _entered_last(stack, self._hooks.strategy_init_context(empty_init=empty_init))

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors are created on this rank's device, in the precision's dtype."""
        context = self._started("init_tensor")
        stack = ExitStack()
        stack.enter_context(self._hooks.precision_init_context())
        return _entered_last(stack, context.device)


@contextmanager
def _entered_last(stack: ExitStack, context: AbstractContextManager[Any]) -> Iterator[None]:
    with stack, context:
        yield
