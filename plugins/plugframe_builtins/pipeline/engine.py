"""The engine of a model that is cut into stages: a call of the model runs all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError
from plugframe.utils.shards import local_of
from plugframe_builtins._shared.fully_shard.parts import ShardedParts
from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.batch_check import BatchCheck
from plugframe_builtins.pipeline.chain import Chain
from plugframe_builtins.pipeline.checks import batch_norms, check_added, check_statistics, keeping_buffers
from plugframe_builtins.pipeline.cut import Cut
from plugframe_builtins.pipeline.cut_check import CutCheck, same_outputs
from plugframe_builtins.pipeline.deliver import deliver
from plugframe_builtins.pipeline.equal_calls import EqualCalls
from plugframe_builtins.pipeline.micro_batches import Micro, cut_batch, merged, refilled, signature, skeleton
from plugframe_builtins.pipeline.outputs import Outputs
from plugframe_builtins.pipeline.parameters import Aliases
from plugframe_builtins.pipeline.random_streams import shared_seed, stage_random
from plugframe_builtins.pipeline.stage import Boundaries, Meta, StageModule
from plugframe_builtins.pipeline.stand_in import Backwards, tensors_of
from plugframe_builtins.pipeline.training import Schedules, Trained

#: Calls of other shapes that are remembered.
_MOST_REMEMBERED = 256


@dataclass(eq=False)
class Plan:
    """What is known of calls of one signature, equal on all ranks.

    Attributes:
        boundaries: what each stage sends to the next.
        output: the result for the whole batch, with tensors on the meta device.
        is_loss: whether the result is a single number.
        random: whether a stage draws random numbers.
        results: see `Boundaries`.
    """

    boundaries: list[list[Meta]]
    output: Any
    is_loss: bool
    random: bool
    results: dict[Any, Any]


class Engine:
    """Run a model over the stages of all ranks. Every rank must call it with the same batch.

    Args:
        module: the user's model; this rank has the parameters of its own stages only.
        cut: the stages.
        axis: the ranks.
        places: the modules with parameters of this rank's stages; see `Aliases`.
        schedule: the schedule's name or class; None for 1f1b if the model returns its loss, else gpipe.
        micro_batches: number of micro-batches of a batch.
        backwards: counts those of this model.
        parts: the sharded parameters of this rank's stages; None if each rank holds its stages' complete ones.
        shapes: see `Boundaries`.
        replicas: None if no stage communicates with ranks that have the same one.
    """

    def __init__(
        self,
        module: nn.Module,
        cut: Cut,
        axis: Axis,
        places: Sequence[tuple[nn.Module, str, int]],
        schedule: str | None,
        micro_batches: int,
        backwards: Backwards,
        parts: ShardedParts | None = None,
        shapes: Mapping[str, nn.Module] | None = None,
        replicas: EqualCalls | None = None,
    ) -> None:
        self._replicas = replicas
        self.cut, self.axis, self.parts = cut, axis, parts
        #: Whether a parameter or a module was added; see `AddedParameters`.
        self.added = False
        self._backwards = backwards
        self._batch_check = BatchCheck(axis)
        self.module = module
        self._norms = batch_norms(module)
        self._parts, self._every = list(module.modules()), list(module.parameters())
        self._places = places
        self._schedule = schedule
        self._micro_batches = micro_batches
        self._boundaries = Boundaries(module, cut, axis.device, shapes or {})
        self._aliases = Aliases(())
        own = range(axis.rank, cut.num_stages, axis.size)
        self._stages = [StageModule(self._boundaries, n, functools.partial(self._parameters, n)) for n in own]
        self._chain = Chain(axis, self._stages, cut.num_stages)
        self._schedules = Schedules(
            schedule or "1f1b", micro_batches, module, self._stages, axis, self._new_aliases, self._computing_with
        )
        self._plans: dict[Any, Plan] = {}
        self._cut_check = CutCheck(type(module).__name__)
        self._outputs = Outputs(axis, (cut.num_stages - 1) % axis.size)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what ``call(*args, **kwargs)`` returns in one process, on every rank."""
        if self.parts is None:
            return self._call(call, args, kwargs)
        return self.parts.run(functools.partial(self._call, call, args, kwargs))

    def _call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.added:
            check_added(self.module, self.cut, self._places)
            self._parts, self._every = list(self.module.modules()), list(self.module.parameters())
            self.added = False
        self._batch_check.compare((args, kwargs))
        micro = cut_batch(args, kwargs, self._micro_batches)
        for tensor in tensors_of((args, kwargs)) if torch.is_grad_enabled() else ():
            if tensor.requires_grad:
                raise UnsupportedError(
                    f"This {self._boundaries.what} is called with a tensor that requires a gradient, which strategy "
                    "'pipeline' does not send back to the inputs: make what computes it a part of the model, or "
                    "detach it."
                )
        if len(micro.calls) > 1:
            check_statistics(self._norms)
        plan = self._plan(call, micro)
        random = stage_random(self.axis, shared_seed()) if plan.random else nullcontext()
        with self._micro(call, micro.calls), random:
            if not self.axis.simulated and self._cut_check.due(len(micro.calls), is_loss=plan.is_loss):
                self._check_cut(plan, call, micro, (args, kwargs))
            if not torch.is_grad_enabled():
                return self._evaluate(plan, len(micro.calls))
            return self._train(plan, len(micro.calls)) if plan.is_loss else self._forward(plan, micro)

    # ------------------------------------------------------------------ the three ways to run

    def _evaluate(self, plan: Plan, count: int) -> Any:
        results, _ = self._chain.forward(plan.boundaries, count)
        if plan.is_loss:
            weight = self._cut_check.weight(count)
            return self._outputs.value(
                plan.output, torch.stack([r * weight for r in results]).sum() if results else None
            )
        return refilled(*self._outputs.share(plan.output, results))

    def _train(self, plan: Plan, count: int) -> Any:
        weights = [self._cut_check.weight(count)] * count
        if self.axis.simulated:
            losses, parameters, gradients = self._simulate(plan, count)
        else:
            losses, parameters, gradients = self._schedules.run(plan, plan.boundaries, plan.output.dtype, weights)
        value = self._outputs.value(plan.output, torch.stack(losses).sum() if losses else None)

        def scaled(outer: Sequence[Tensor | None]) -> list[Tensor | None]:
            self._backwards.count += 1
            return self._agreed(parameters, gradients if outer[0] is None else _multiplied(gradients, outer[0]))

        return deliver([value], parameters, scaled)[0]

    def _simulate(self, plan: Plan, count: int) -> Trained:
        """Run this rank's part of a schedule: torch's own ones ask the other ranks for shapes."""
        aliases = self._new_aliases()
        with aliases, self._computing_with(aliases):
            self._chain.simulate(plan.boundaries, count, count if self._schedule == "gpipe" else self.cut.num_stages)
        return Trained([], aliases.parameters, aliases.take_gradients())

    def _forward(self, plan: Plan, micro: Micro) -> Any:
        if self._schedule not in (None, "gpipe"):
            raise UnsupportedError(
                f"schedule={self._schedule!r} runs backwards between forwards, and needs the loss for that: have the "
                f"model return it, as in loss = model(x, y), or use schedule='gpipe' (this {self._boundaries.what} "
                "returns other outputs)."
            )
        count = len(micro.calls)
        aliases = self._new_aliases()
        with aliases, self._computing_with(aliases):
            results, tape = self._chain.forward(plan.boundaries, count)
        with torch.no_grad():
            structure, outputs = self._outputs.share(plan.output, results)

        def backward(outer: Sequence[Tensor | None]) -> list[Tensor | None]:
            self._backwards.count += 1
            parts = _parts(outer, count, micro.size)
            with nullcontext() if self.parts is None else self.parts.gathered(), aliases:
                self._chain.backward(tape, plan.boundaries, count, parts)
            return self._agreed(aliases.parameters, aliases.take_gradients())

        wanted = [each.requires_grad for each in tensors_of(plan.output)]
        return refilled(structure, deliver(outputs, aliases.parameters, backward, wanted))

    # ------------------------------------------------------------------ what is known of a call

    def _plan(self, call: Callable[..., Any], micro: Micro) -> Plan:
        grad = torch.is_grad_enabled()
        name = getattr(getattr(call, "func", call), "__qualname__", "")
        autocast = torch.is_autocast_enabled(self.axis.device.type)
        training = tuple([part.training for part in self._parts])
        with torch._C.DisableTorchFunctionSubclass():
            # Gradients are sent back only as far as a stage that needs them.
            trained = tuple([parameter.requires_grad for parameter in self._every]) if grad else ()
        key = (name, grad, training, trained, autocast, len(micro.calls), signature(micro.calls[0]))
        plan = self._plans.get(key)
        if self._replicas is not None and not self._replicas.agree(plan is not None, len(micro.calls)):
            plan = None
        if plan is None:
            if len(self._plans) >= _MOST_REMEMBERED:
                self._plans.clear()
            with self._micro(call, micro.calls):
                plan = self._plans[key] = self._make_plan(micro)
        self._boundaries.results = plan.results
        for module in self._stages:
            module.sends = plan.boundaries[module.stage] if module.stage < len(plan.boundaries) else None
        return plan

    def _make_plan(self, micro: Micro) -> Plan:
        """Run the stages one after the other, on a micro-batch of examples, to see what they send."""
        boundaries: list[list[Meta]] = []
        random, output = False, None
        results: dict[Any, Any] = {}
        self._boundaries.results = results
        own = {module.stage: module for module in self._stages}
        for stage in range(self.cut.num_stages):
            found: Any = None
            if stage in own:
                found = self._look(own[stage], boundaries[-1] if stage else [], micro)
            elif self.axis.simulated:
                found = self._look_at_shapes(stage)
            found = self.axis.broadcast_object(found, stage % self.axis.size)
            if isinstance(found, str):
                raise UnsupportedError(f"Stage {stage}, on rank {self.axis.ranks[stage % self.axis.size]}: {found}")
            metas, output, drew, seen = found
            random |= drew
            results |= seen
            boundaries.append(metas)
        is_loss = isinstance(output, Tensor) and not output.dim()
        if not is_loss:
            output = skeleton(output, micro.size, len(micro.calls))
        return Plan(boundaries[:-1], output, is_loss, random, results)

    def _look(self, module: StageModule, metas: Sequence[Meta], micro: Micro) -> Any:
        device = self.axis.device
        module.sends = None
        noting = self._boundaries.seeing()
        with keeping_buffers(self.module), stage_random(self.axis, 0) as stream, noting as seen:
            inputs = [_example(meta).to(device).requires_grad_(meta.requires_grad) for meta in metas]
            try:
                ended, result = module.compute(0, inputs)
                if ended:
                    return [], map_tensors(_on_meta, result), stream.drew(), seen
                return [Meta.of(tensor) for tensor in result], None, stream.drew(), seen
            except Exception as error:
                # The other ranks wait for this stage.
                self.axis.broadcast_object(f"{type(error).__name__}: {error}", self.axis.rank)
                raise

    def _look_at_shapes(self, stage: int) -> Any:
        """Return what `_look` would on a rank that does not exist."""
        args, kwargs = self._stages[0].calls[0]
        call = self._stages[0].call
        assert call is not None
        run = functools.partial(call, *args, **kwargs)
        try:
            with keeping_buffers(self.module):
                ended, result = self._boundaries.run(stage, run, (), simulated=True)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"Stage {stage} of this {self._boundaries.what} cannot be simulated, its shapes depend on values: run "
                f"it on real ranks, on the CPU if need be. {error}"
            ) from error
        grad = torch.is_grad_enabled()

        def shape(tensor: Tensor) -> Tensor:
            wanted = grad and tensor.is_floating_point()
            return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta", requires_grad=wanted)

        made = map_tensors(shape, result)
        return ([], made, False, {}) if ended else ([Meta.of(tensor) for tensor in made], None, False, {})

    def _check_cut(self, plan: Plan, call: Callable[..., Any], micro: Micro, whole: Any) -> None:
        """Compare the result of the whole batch with those of the micro-batches, without dropout."""
        modes = {part: part.training for part in self._parts} if plan.random else {}
        found: list[list[Any]] = []
        with torch.no_grad(), keeping_buffers(self.module):
            for part in modes:
                part.training = False
            try:
                for calls in ([whole], micro.calls):
                    each = self._plan(call, Micro(list(calls), micro.size))
                    with self._micro(call, calls):
                        found.append(self._chain.forward(each.boundaries, len(calls))[0])
            finally:
                for part, mode in modes.items():
                    part.training = mode
        low, last = self._low_precision(plan), (self.cut.num_stages - 1) % self.axis.size
        if plan.is_loss:
            values = self.axis.broadcast_object([float(value) for results in found for value in results], last)
            self._cut_check.compare_losses(values[0], values[1:], low=low)
        else:
            same = not found[0] or same_outputs(*map(merged, found), low=low)
            if not self.axis.broadcast_object(same, last):
                self._cut_check.refuse(len(micro.calls))
        self._plan(call, micro)

    def _low_precision(self, plan: Plan) -> bool:
        dtypes = {meta.dtype for metas in plan.boundaries for meta in metas if meta.dtype.is_floating_point}
        return bool(dtypes & {torch.bfloat16, torch.float16}) or torch.is_autocast_enabled(self.axis.device.type)

    # ------------------------------------------------------------------ helpers

    def parameters(self) -> list[Tensor]:
        """Return the parameters of this rank's stages."""
        return [module._parameters[name] for module, name, _ in self._places]  # type: ignore[misc]

    def _agreed(self, parameters: Sequence[Tensor], gradients: list[Tensor | None]) -> list[Tensor | None]:
        return gradients if self.parts is None else self.parts.agreed(parameters, gradients)

    def _new_aliases(self) -> Aliases:
        return Aliases(self._places)

    def _parameters(self, stage: int) -> Sequence[Tensor]:
        return self._aliases.of_stage(stage)

    @contextmanager
    def _computing_with(self, aliases: Aliases) -> Iterator[None]:
        before, self._aliases = self._aliases, aliases
        try:
            yield
        finally:
            self._aliases = before

    @contextmanager
    def _micro(self, call: Callable[..., Any], calls: Sequence[Any]) -> Iterator[None]:
        before = [(module.call, module.calls) for module in self._stages]
        for module in self._stages:
            module.call, module.calls = call, calls
        try:
            yield
        finally:
            for module, (held, others) in zip(self._stages, before, strict=True):
                module.call, module.calls = held, others


def _example(meta: Meta) -> Tensor:
    """Return numbers that are no special case, of a generator of their own; zeros where they may be indices."""
    if not meta.dtype.is_floating_point:
        return torch.zeros(meta.shape, dtype=meta.dtype)
    return torch.rand(meta.shape, generator=torch.Generator().manual_seed(0)).to(meta.dtype)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)


def _multiplied(gradients: Sequence[Tensor | None], outer: Tensor) -> list[Tensor | None]:
    held = [gradient for gradient in gradients if gradient is not None]
    for gradient in held:
        local_of(gradient).mul_(outer.to(gradient.device, gradient.dtype))
    return list(gradients)


def _parts(outer: Sequence[Tensor | None], count: int, size: int) -> list[list[Tensor | None]]:
    """Return the gradients of the outputs for each micro-batch."""
    if count == 1:
        return [list(outer)]

    def part(gradient: Tensor | None, number: int) -> Tensor | None:
        if gradient is None:
            return None
        return gradient[number * size : (number + 1) * size] if gradient.dim() else gradient / count

    return [[part(gradient, number) for gradient in outer] for number in range(count)]
