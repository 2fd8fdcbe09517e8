"""Run torch's schedules: forward and backward of all micro-batches in one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plugframe.errors import UnsupportedError
from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.checks import keeping_buffers
from plugframe_builtins.pipeline.parameters import Aliases, Aside, total
from plugframe_builtins.pipeline.random_streams import stage_random
from plugframe_builtins.pipeline.schedules import is_class, make_schedule
from plugframe_builtins.pipeline.stage import Meta, StageModule

#: Schedules that are kept, each with the buffers it receives into.
_MOST_SCHEDULES = 8


class Trained(NamedTuple):
    """What a schedule computed on this rank.

    Attributes:
        losses: of the micro-batches, weighed; on the rank of the last stage.
        parameters: those of this rank's stages that require gradients.
        gradients: theirs, in order.
    """

    losses: list[Tensor]
    parameters: list[nn.Parameter]
    gradients: list[Tensor | None]


class Schedules:
    """The schedules of a model's calls.

    Args:
        name: of the schedule, or its class as ``package.module:Class``.
        micro_batches: of a batch, at most.
        module: the user's model.
        stages: this rank's stages.
        axis: the ranks.
        aliases: returns new aliases of this rank's parameters.
        computing: the context in which the stages compute with aliases.
    """

    def __init__(
        self,
        name: str,
        micro_batches: int,
        module: nn.Module,
        stages: Sequence[StageModule],
        axis: Axis,
        aliases: Callable[[], Aliases],
        computing: Callable[[Aliases], AbstractContextManager[Any]],
    ) -> None:
        self._name = name
        self._micro_batches = micro_batches
        self._module = module
        self._stages = stages
        self._axis = axis
        self._aliases = aliases
        self._computing = computing
        self._made: dict[Any, Any] = {}

    def run(
        self, key: Any, boundaries: Sequence[Sequence[Meta]], dtype: torch.dtype, weights: Sequence[float]
    ) -> Trained:
        """Run the schedule over the micro-batches; every rank must call it.

        Args:
            key: of calls that can share a schedule.
            boundaries: what each stage sends to the next.
            dtype: of the loss.
            weights: of the micro-batches' losses.
        """
        schedule = self._made.get(key)
        if schedule is None:
            if self._name == "zero_bubble" or is_class(self._name):
                self._try_out(boundaries, dtype, weights)
            while len(self._made) >= _MOST_SCHEDULES:
                del self._made[next(iter(self._made))]
            schedule = self._made[key] = self._make(self._name, boundaries, dtype, len(weights))
        return self._run(schedule, weights)

    def _make(self, name: str, boundaries: Sequence[Sequence[Meta]], dtype: torch.dtype, count: int) -> Any:
        loss = torch.empty((), dtype=dtype, device="meta", requires_grad=True)
        full = count == self._micro_batches
        return make_schedule(name, self._stages, boundaries, loss, count, self._axis, full)

    def _run(self, schedule: Any, weights: Sequence[float]) -> Trained:
        losses: list[Tensor] = []
        dtype = torch.float32 if self._axis.device.type == "mps" else torch.float64
        target = torch.tensor(weights, dtype=dtype, device=self._axis.device)
        aliases = self._aliases()
        with aliases, self._computing(aliases), Aside(aliases.parameters) as aside:
            self._step(schedule, torch.arange(len(weights)), target, losses)
            gradients = aliases.take_gradients()
        gradients = [total(a, b) for a, b in zip(gradients, aside.added, strict=True)]
        return Trained([each.detach() for each in losses], aliases.parameters, gradients)

    def _step(self, schedule: Any, index: Tensor, target: Tensor, losses: list[Tensor]) -> None:
        for module in self._stages:
            module.failure = None
        try:
            schedule.step(index=index, target=target, losses=losses, return_outputs=False)
        except Exception as error:
            failure = next((module.failure for module in self._stages if module.failure is not None), None)
            if failure is None:
                raise
            raise failure from error  # torch shows the schedule and the shapes

    def _try_out(self, boundaries: Sequence[Sequence[Meta]], dtype: torch.dtype, weights: Sequence[float]) -> None:
        """Compare the gradients of the schedule with those of a plain order, for the first call of its kind.

        torch's zero-bubble schedule computes the gradients of weights from the graph between a stage's inputs and its
        outputs, and loses those of weights that lie off it, such as all weights of a stage whose inputs require no
        gradient (torch 2.13). A class given by the user may do anything.

        Raises:
            UnsupportedError: on all ranks, with a parameter that it lost.
        """
        tried = []
        for name in ("gpipe", self._name):
            with keeping_buffers(self._module), stage_random(self._axis, 0):
                tried.append(self._run(self._make(name, boundaries, dtype, len(weights)), weights))
        plain, other = tried
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        rows = zip(plain.parameters, plain.gradients, other.gradients, strict=True)
        lost = next((names.get(id(p), "a parameter") for p, a, b in rows if _differ(a, b)), None)
        if len(plain.losses) != len(other.losses) or any(map(_differ, plain.losses, other.losses)):
            lost = lost or "the losses"
        found = next((name for name in self._axis.gather_objects(lost) if name is not None), None)
        if found is None:
            return
        if is_class(self._name):
            raise UnsupportedError(
                f"schedule={self._name!r} computes other values than 'gpipe' for {found!r}: report it to its author, "
                "and use schedule='1f1b'."
            )
        raise UnsupportedError(
            f"schedule='zero_bubble' loses gradients of {found!r}: torch computes them from the graph between what "
            "its stage receives and sends, and this parameter lies off it (the stages before are frozen, or it is "
            "applied to inputs of the model). Use schedule='interleaved' or '1f1b'."
        )


def _differ(expected: Tensor | None, found: Tensor | None) -> bool:
    if expected is None or found is None:
        return expected is not found
    scale = float(expected.abs().amax()) if expected.numel() else 0.0
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    return not bool(torch.allclose(expected, found, rtol=10 * tolerance, atol=tolerance * max(scale, 1e-12)))
