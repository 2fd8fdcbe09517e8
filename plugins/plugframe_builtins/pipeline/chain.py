"""All forwards, then all backwards: the order of autograd, for evaluation and for models that return outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.stage import Meta, StageModule
from plugframe_builtins.pipeline.stand_in import tensors_of

#: Inputs and outputs of a stage for one micro-batch.
Tape = dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]]


class Chain:
    """Send micro-batches through the stages of this rank.

    Args:
        axis: the ranks of the pipeline; stage `n` is on rank ``n % size``.
        stages: this rank's stages, in order.
        num_stages: number of all stages.
    """

    def __init__(self, axis: Axis, stages: Sequence[StageModule], num_stages: int) -> None:
        self._axis = axis
        self._stages = stages
        self._num_stages = num_stages

    def forward(self, boundaries: Sequence[Sequence[Meta]], count: int) -> tuple[list[Any], Tape]:
        """Run all forwards; every rank must call it.

        Returns:
            The results of the user's forward, on the rank of the last stage, and what `backward` needs.
        """
        results: list[Any] = []
        tape: Tape = {}
        sent: list[tuple[Any, Tensor]] = []
        grad = torch.is_grad_enabled()
        for module in self._stages:
            stage = module.stage
            for number in range(count):
                inputs = self._received(boundaries[stage - 1], stage - 1, grad) if stage else []
                ended, result = module.compute(number, inputs)
                outputs = tensors_of(result)
                if ended:
                    results.append(result)
                else:
                    sent += [self._send(each.detach(), stage + 1) for each in outputs]
                if grad:
                    tape[stage, number] = (inputs, outputs)
        _wait(sent)
        return results, tape

    def backward(
        self, tape: Tape, boundaries: Sequence[Sequence[Meta]], count: int, gradients: Sequence[Sequence[Tensor | None]]
    ) -> None:
        """Run all backwards: gradients add to those of the leaves. Every rank must call it.

        Args:
            gradients: of the tensors in the results, for each micro-batch; used on the rank of the last stage.
        """
        sent: list[tuple[Any, Tensor]] = []
        for module in reversed(self._stages):
            for number in range(count):
                sent += self._backward_of(tape.pop((module.stage, number)), module.stage, boundaries, gradients, number)
        _wait(sent)

    def simulate(self, boundaries: Sequence[Sequence[Meta]], count: int, most: int) -> None:
        """Run forwards and backwards of this rank without the others, with as many in flight as a schedule has.

        Args:
            most: the number of micro-batches between forward and backward.
        """
        for module in self._stages:
            stage, waiting = module.stage, list[tuple[list[Tensor], list[Tensor]]]()
            for number in range(count):
                inputs = self._received(boundaries[stage - 1], stage - 1, grad=True) if stage else []
                outputs = tensors_of(module.compute(number, inputs)[1])
                for each in outputs:
                    self._send(each.detach(), stage + 1)
                waiting.append((inputs, outputs))
                if len(waiting) == most:
                    self._backward_of(waiting.pop(0), stage, boundaries, (), number)
            while waiting:
                self._backward_of(waiting.pop(0), stage, boundaries, (), 0)

    def _backward_of(
        self,
        run: tuple[list[Tensor], list[Tensor]],
        stage: int,
        boundaries: Sequence[Sequence[Meta]],
        gradients: Sequence[Sequence[Tensor | None]],
        number: int,
    ) -> list[tuple[Any, Tensor]]:
        """Run the backward of a micro-batch, and send the gradients of what was received."""
        inputs, outputs = run
        if stage == self._num_stages - 1:
            wanted = list(gradients[number])
        else:
            wanted = self._gradients(boundaries[stage], stage + 1)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, wanted, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        sent = []
        for tensor in inputs:
            if tensor.requires_grad:
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous()
                sent.append(self._send(gradient, stage - 1))
        return sent

    def _received(self, metas: Sequence[Meta], stage: int, grad: bool) -> list[Tensor]:
        made = [self._receive(meta, stage) for meta in metas]
        return [t.requires_grad_(grad and meta.requires_grad) for t, meta in zip(made, metas, strict=True)]

    def _gradients(self, metas: Sequence[Meta], stage: int) -> list[Tensor | None]:
        return [self._receive(meta, stage) if meta.requires_grad else None for meta in metas]

    def _rank(self, stage: int) -> int:
        return self._axis.ranks[stage % self._axis.size]

    def _receive(self, meta: Meta, stage: int) -> Tensor:
        tensor = torch.empty(meta.shape, dtype=meta.dtype, device=self._axis.device)
        dist.recv(tensor, src=self._rank(stage), group=self._axis.group)
        return tensor

    def _send(self, tensor: Tensor, stage: int) -> tuple[Any, Tensor]:
        return dist.isend(tensor, dst=self._rank(stage), group=self._axis.group), tensor


def _wait(sent: Sequence[tuple[Any, Tensor]]) -> None:
    for work, _ in sent:
        work.wait()
