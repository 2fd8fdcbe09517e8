"""Training step methods of `Lite`: backward, accumulation, clipping, and tensor placement."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.adopt import state_of
from plugframe.adopt.accumulation import Accumulation
from plugframe.adopt.optimizer import is_default
from plugframe.base import Precision, Strategy
from plugframe.errors import OrderError, SettingError, UnsupportedError
from plugframe.lite import checks, collectives, raw_scripts
from plugframe.lite.accumulate import sum_over_ranks
from plugframe.lite.metrics import weight_number
from plugframe.lite.pretrained import deferred_reading
from plugframe.lite.zero_weight import without_gradients
from plugframe.utils.logging import warn_caller

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite


def backward(
    lite: Lite,
    tensor: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    *,
    model: nn.Module | None,
    batch: object,
    reduction: str,
    weight: Any,
) -> None:
    """Compute gradients of the loss of this rank's batch; see `Lite.backward`."""
    job = lite._job_state
    if job.plain_backward and job.accumulation is None and weight is None and reduction == "mean":
        checks.check_loss(tensor, set_up=True)
        job.in_backward = True
        try:
            tensor.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            job.in_backward = False
        return
    _backward(lite, tensor, args, kwargs, model=model, batch=batch, reduction=reduction, weight=weight)
    job.plain_backward = _is_plain(lite)


def _is_plain(lite: Lite) -> bool:
    """Return whether backwards have nothing to weigh, scale, record or communicate."""
    hooks = lite._hooks
    return (
        lite._job_state.alone
        and hooks.on_backward is None
        and is_default(hooks, "strategy_backward", Strategy)
        and is_default(hooks, "precision_backward", Precision)
        and is_default(hooks, "precision_finish_backward", Precision)
    )


def _backward(
    lite: Lite,
    tensor: Tensor,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    *,
    model: nn.Module | None,
    batch: object,
    reduction: str,
    weight: Any,
) -> None:
    checks.check_loss(tensor, set_up=bool(lite._modules))
    if reduction not in ("mean", "sum"):
        raise SettingError(f"backward(reduction={reduction!r}): it is 'mean' or 'sum'.")
    tokens = None if weight is None else weight_number("backward", weight)
    if model is None and len(lite._modules) == 1:
        model = lite._modules[0]()
    hooks, phase = lite._hooks, lite._job_state
    if not phase.backward_called:
        raw_scripts.check_scaled_twice(lite, tensor)
    weights, scale = phase.weights, 1.0
    handles: list[Any] = []
    accumulation = None if phase.accumulation is None else _accumulation_of(lite, model)
    counted = tokens is not None or (accumulation is not None and accumulation.total is not None)
    if counted and reduction == "sum":
        raise SettingError("backward(): a weight makes a mean of the losses, and reduction='sum' their sum: pass one.")
    if weights.uneven:
        # A weight counts in place of the number of samples; a batch that repeats samples counts nothing.
        scale, handles = weights.weigh(tensor, batch, "sum" if counted else reduction)
    if accumulation is not None:
        scale = _scale_of_micro_batch(lite, accumulation, tensor, tokens, scale, reduction)
    elif tokens is not None:
        scale = _scale_of_tokens(lite, tokens * scale)
    if reduction == "sum":
        scale *= hooks.strategy_data_shard()[1]
    if not scale and not torch.isfinite(tensor).all():
        tensor, zeroed = without_gradients(tensor)
        handles += zeroed
    elif scale != 1.0:
        tensor = tensor * scale
    weights.model_called = weights.trains = True
    weights.unmarked = False
    weights.num_backwards += 1
    phase.in_backward = phase.backward_called = True
    phase.num_backwards += not phase.no_sync
    try:
        hooks.strategy_backward(loss=tensor, module=model, args=args, kwargs=kwargs)
    finally:
        phase.in_backward = False
        for handle in handles:
            handle.remove()
        hooks.precision_finish_backward()
    if accumulation is not None and tokens is not None:
        _rescale(lite, accumulation)
    if hooks.on_backward is not None:
        hooks.on_backward(loss=tensor)


def _accumulation_of(lite: Lite, model: nn.Module | None) -> Accumulation | None:
    """Return the accumulation that a loss is part of, None if there is none."""
    accumulation = lite._job_state.accumulation
    if accumulation is None or accumulation.ended:
        return None
    others = model is None and _others(lite, accumulation)
    if others:
        gc.collect()  # one that the script has dropped may be in a cycle
        others = _others(lite, accumulation)
    return accumulation if accumulation.takes(model, others=others) else None


def _others(lite: Lite, accumulation: Accumulation) -> bool:
    """Return whether models that are not accumulated train."""
    others = (each for each in lite._living() if all(each is not own for own in accumulation.models))
    return any(parameter.requires_grad for each in others for parameter in each.parameters())


def _scale_of_tokens(lite: Lite, tokens: float) -> float:
    """Return the factor of a mean over `tokens`, so that the mean over ranks is that over all tokens."""
    if lite._job_state.no_sync:
        raise OrderError(
            "backward(weight=…) in no_backward_sync() knows nothing of the other micro-batches: use "
            "`for batch in lite.accumulate(loader, model, steps=…):`."
        )
    total = sum_over_ranks(lite, tokens)
    if not total:
        raise SettingError("backward(weight=0) on all ranks: there is no mean.")
    return tokens * lite.world_size / total


def _scale_of_micro_batch(
    lite: Lite, accumulation: Accumulation, loss: Tensor, tokens: float | None, scale: float, reduction: str
) -> float:
    """Return the factor of the loss of a micro-batch."""
    if accumulation.total is not None:
        if tokens is not None:
            raise SettingError("backward(weight=…) in accumulate(weight=…): pass one of them.")
        accumulation.on_backward(weighted=False)
        return scale * accumulation.weight * lite.world_size / accumulation.total
    accumulation.on_backward(weighted=tokens is not None)
    if tokens is not None:
        total = functools.partial(sum_over_ranks, lite)
        return accumulation.weighted_factor(tokens * scale, total, lite.world_size)
    _warn_divided(lite, loss, accumulation.of)
    return scale if reduction == "sum" else scale / accumulation.of


def _warn_divided(lite: Lite, loss: Tensor, number: int) -> None:
    """Warn once if the script divides its loss by the number of micro-batches too."""
    job, node = lite._job_state, loss.grad_fn
    if job.warned_divided or number == 1 or node is None or type(node).__name__ != "DivBackward0":
        return
    divisor = getattr(node, "_saved_other", None)
    if isinstance(divisor, Tensor) and divisor.numel() == 1 and divisor.device.type == "cpu" and divisor == number:
        job.warned_divided = True
        if lite.is_global_zero:
            warn_caller(
                f"This loss is divided by {number}, and lite.accumulate() divides it by its {number} micro-batches: "
                "leave that out of the script."
            )


def _rescale(lite: Lite, accumulation: Accumulation) -> None:
    """After the last micro-batch, divide the gradients by the sum of all weights."""
    factor = accumulation.rescale(functools.partial(sum_over_ranks, lite))
    if factor is None:
        return
    scale = lite._hooks.strategy_scale_gradients
    if scale is None:
        raise UnsupportedError(
            f"strategy {lite.plan.choices['strategy'].name!r} cannot scale gradients, as backward(weight=…) in "
            "lite.accumulate() needs: count before, with lite.accumulate(..., weight=function of the batch)."
        )
    for model in accumulation.models:
        scale(module=model, factor=factor)


def batch_weight(lite: Lite) -> float:
    """Return the weight of the current batch; see `Lite.batch_weight`."""
    weights = lite._job_state.weights
    if not weights.uneven:
        return 1.0
    weights.on_weight_requested()
    return weights.current()


def mean_loss(lite: Lite, loss: Any) -> Any:
    """Return the mean over ranks of a closure's loss, each weighing as its batch; what is no number stays."""
    if isinstance(loss, Tensor):
        return lite._hooks.collective_all_reduce(tensor=loss.detach() * lite.batch_weight, op="mean", group=None)
    if isinstance(loss, float):
        value = torch.tensor(loss * lite.batch_weight, dtype=torch.float64)
        return lite._hooks.collective_all_reduce(tensor=value, op="mean", group=None).item()
    return loss


def skip_vote(lite: Lite) -> Callable[[Optimizer], bool] | None:
    """Return a function that asks all extensions on all ranks whether to skip a step; None if none would answer."""
    hooks = lite._hooks
    if hooks.skip_optimizer_step is None:
        return None

    def vote(optimizer: Optimizer) -> bool:
        skips = any(hooks.skip_optimizer_step(optimizer=optimizer))
        if lite.world_size > 1:
            mine = torch.tensor(int(skips))
            skips = bool(hooks.collective_all_reduce(tensor=mine, op="max", group=None))
        return skips

    return vote


def no_backward_sync(lite: Lite, module: nn.Module, *, enabled: bool) -> AbstractContextManager[object]:
    """Return a context in which gradients accumulate without synchronisation."""
    checks.check_set_up(module, "no_backward_sync", lite._hooks)
    engine = state_of(module).engine
    return cast(
        "AbstractContextManager[object]",
        lite._hooks.strategy_no_sync(module=module, engine=engine, enabled=bool(enabled)),
    )


def clip_gradients(
    lite: Lite,
    module: nn.Module,
    optimizer: Optimizer,
    *,
    clip_val: float | None,
    max_norm: float | None,
    norm_type: float,
    error_if_nonfinite: bool,
) -> Tensor | None:
    """Clip the gradients of `optimizer`'s parameters; see `Lite.clip_gradients`."""
    checks.check_limits(clip_val, max_norm)
    checks.check_set_up(module, "clip_gradients", lite._hooks)
    checks.check_set_up(optimizer, "clip_gradients", lite._hooks)
    checks.check_holds(module, optimizer, "clip_gradients")
    if lite._job_state.accumulation is not None:
        lite._job_state.accumulation.on_step(optimizer, "clip_gradients")
    skips = lite._hooks.precision_unscale(optimizer=optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return cast(
        "Tensor | None",
        lite._hooks.strategy_clip_gradients(
            module=module,
            parameters=parameters,
            clip_value=clip_val,
            max_norm=max_norm,
            norm_type=float(norm_type),
            error_if_nonfinite=error_if_nonfinite and not skips,
        ),
    )


def autocast(lite: Lite) -> AbstractContextManager[object]:
    """Return the context the precision runs a forward in."""
    lite._started("autocast")
    return cast("AbstractContextManager[object]", lite._hooks.precision_forward_context())


def to_device(lite: Lite, obj: Any) -> Any:
    """Return `obj` on this rank's device."""
    context = lite._started("to_device")
    if isinstance(obj, nn.Module):
        return obj.to(context.device)
    moved = lite._hooks.accelerator_move_batch(batch=obj, device=context.device)
    # Accelerators may assume that batches are on the CPU or the device; here data can be on any device.
    return collectives.on_device(moved, context.device)


def init_module(lite: Lite, *, empty_init: bool | None) -> AbstractContextManager[None]:
    """Return a context in which a module is built on this rank's device, in the precision's dtype."""
    context = lite._started("init_module")
    stack = ExitStack()
    stack.enter_context(lite._hooks.precision_init_context())
    return _building(stack, lite._hooks.strategy_init_context(empty_init=empty_init), context.device)


def init_tensor(lite: Lite) -> AbstractContextManager[None]:
    """Return a context in which tensors are created on this rank's device, in the precision's dtype."""
    context = lite._started("init_tensor")
    stack = ExitStack()
    stack.enter_context(lite._hooks.precision_init_context())
    return _entered_last(stack, context.device)


@contextmanager
def _building(stack: ExitStack, context: AbstractContextManager[Any], device: torch.device) -> Iterator[None]:
    with stack, context, deferred_reading(device):
        yield


@contextmanager
def _entered_last(stack: ExitStack, context: AbstractContextManager[Any]) -> Iterator[None]:
    with stack, context:
        yield
