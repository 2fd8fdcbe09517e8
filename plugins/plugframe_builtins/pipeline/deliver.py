"""Give autograd the results of a pipeline, and the gradients of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plugframe.errors import UsageError

#: From the gradients of the results to those of the parameters.
Backward = Callable[[Sequence[Tensor | None]], list[Tensor | None]]


class _Pending:
    """The results of a call of the model, and its backward, which can run once."""

    def __init__(self, tensors: Sequence[Tensor], wanted: Sequence[bool], backward: Backward) -> None:
        self.tensors = tensors
        self.wanted = wanted
        self._backward: Backward | None = backward

    def backward(self, outer: Sequence[Tensor | None]) -> list[Tensor | None]:
        backward, self._backward = self._backward, None
        if backward is None:
            raise UsageError(
                "The result of this call of the model was differentiated before, and under strategy 'pipeline' it can "
                "be once: add the losses up before lite.backward(), or call the model again."
            )
        return backward(outer)


class _Result(torch.autograd.Function):
    """Results that were computed elsewhere, as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, pending: _Pending, _: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.pending = pending
        ctx.set_materialize_grads(False)
        results = tuple(tensor.detach() for tensor in pending.tensors)
        plain = [result for result, wanted in zip(results, pending.wanted, strict=True) if not wanted]
        ctx.mark_non_differentiable(*plain)
        return results

    @staticmethod
    @once_differentiable  # it takes ctx by position only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outer: Tensor | None
    ) -> tuple[Any, ...]:
        return None, None, *ctx.pending.backward(outer)


def deliver(
    tensors: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    backward: Backward,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    """Return `tensors` with a graph to `parameters`.

    Args:
        backward: returns the gradients of `parameters`.
        wanted: which of the tensors can be differentiated; by default all.
    """
    pending = _Pending(tensors, wanted or [True] * len(tensors), backward)
    # A stage without trainable parameters takes part in backward too.
    anchor = torch.zeros((), requires_grad=True)
    results: tuple[Tensor, ...] = _Result.apply(pending, anchor, *parameters)  # type: ignore[no-untyped-call]
    return results
