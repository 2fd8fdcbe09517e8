"""1F1B whose backwards are split in two: gradients of a stage's inputs at once, those of its weights later."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import Schedule1F1B


class ZeroBubbleH1(Schedule1F1B):
    """The schedule ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", 2024).

    The stage before waits for the gradients of this stage's inputs only: they are computed and sent first. Those of the
    weights follow when this rank is about to wait. Stage `n` of `p` postpones them for at most `n` micro-batches, and
    has `p - n` others in flight, as in 1F1B: no stage holds the activations of more than `p`, as many as stage 0.

    Args:
        stage: this rank's stage, a `PipelineStage`.
        n_microbatches: micro-batches of a batch, at least as many as stages.
        options: those of `Schedule1F1B`.
    """

    def __init__(self, stage: Any, n_microbatches: int, **options: Any) -> None:
        super().__init__(stage, n_microbatches, **options)
        self.stage = stage
        #: Micro-batches whose gradients of weights are postponed, each with whether it is the last one.
        self.postponed: deque[tuple[int, bool]] = deque()
        # Schedule1F1B calls these methods of its stage, which belongs to this schedule alone.
        self._backward, stage.backward_one_chunk = stage.backward_one_chunk, self.backward_one_chunk
        self._receive, stage.get_bwd_recv_ops = stage.get_bwd_recv_ops, self.get_bwd_recv_ops
        self._finish, stage.perform_reduce_grad = stage.perform_reduce_grad, self.perform_reduce_grad

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward and backward of a batch."""
        self.postponed.clear()  # left by a step that failed
        return super().step(*args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, last_backward: bool = False) -> None:
        """Compute the gradients of the inputs, and postpone those of the weights."""
        _, inputs = self.stage.fwd_cache[bwd_chunk_id]
        # Nobody waits for the first stage, or for one behind frozen stages; and torch computes the gradients of weights
        # from the graph between a stage's inputs and outputs, which such a stage does not have.
        split = not self.stage.is_first and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
        self._backward(bwd_chunk_id, loss=loss, full_backward=not split, last_backward=last_backward)
        if split:
            self.postponed.append((bwd_chunk_id, last_backward))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """Compute gradients of weights before a wait for the next stage."""
        self._compute_weights(keep=self.stage.stage_index)
        return self._receive(bwd_chunk_id)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Compute the remaining gradients of weights at the end of a step."""
        self._compute_weights(keep=0)
        self._finish(grad_scale_factor)

    def _compute_weights(self, keep: int) -> None:
        while len(self.postponed) > keep:
            number, last = self.postponed.popleft()
            self.stage.backward_weight_one_chunk(number, last_backward=last)
