"""A common interface to DeepSpeed's optimizers: accumulation, averaging and storage of gradients.

DeepSpeed counts backwards to decide when a gradient is complete; here the step decides. Until then
every backward counts as one of several (`prologue`, `epilogue`), and `finish` averages the accumulated gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from plugframe.errors import OrderError
from plugframe_builtins.deepspeed.flat import follow, sort_bucket
from plugframe_builtins.deepspeed.fragments import Fragment, Fragments, linked
from plugframe_builtins.deepspeed.library import library


class Stage0:
    """Everything is replicated; gradients are those of the parameters.

    Attributes:
        loss_scale: factor of the gradients.
        offloads: whether the optimizer's state is on the host or a disk.
    """

    loss_scale = 1.0
    offloads = False

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def begin(self) -> None:
        """Run before the first backward since gradients were cleared."""

    def prologue(self) -> None:
        """Run before a backward."""

    def epilogue(self, touched: Set[int]) -> None:
        """Run after a backward that reached the model.

        Args:
            touched: ids of parameters that got a gradient. Those of other ranks may differ.
        """

    def finish(self) -> None:
        """Average the gradients over the ranks."""
        self.engine.buffered_allreduce_fallback()

    def resume(self) -> None:
        """Run before a backward that adds to finished gradients."""

    def clear(self) -> None:
        """Drop all gradients."""
        self.engine.zero_grad()

    def gradients(self) -> list[Tensor]:
        """Return this rank's finished gradients; all of them, in this stage."""
        found = [parameter.grad for parameter in self.engine.module.parameters()]
        return [gradient for gradient in found if gradient is not None]

    def scale_state(self) -> dict[str, Any]:
        """Return the loss scale and its growth counters, as plain values; empty without a loss scale."""
        return {}

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `scale_state`, saved with a loss scale."""

    #: Whether gradients are sharded.
    partitioned = False
    #: Whether parameters are views of DeepSpeed's gathered storage, until their ``data`` is assigned.
    views = False

    @property
    def bucket_size(self) -> float:
        """Number of elements of gradients that accumulate before any are averaged."""
        return float("inf")

    def follow(self) -> None:
        """Copy the script's changes of parameters into DeepSpeed's weights."""

    def complete_values(self) -> None:
        """Gather small parameters that DeepSpeed keeps gathered, so that no forward needs to."""

    def locate(self, groups: Sequence[Mapping[str, Any]], fragments: Fragments) -> None:
        """Find the fragments of the parameters in `groups`, the optimizer's original groups."""
        for parameter in _trained(groups):
            fragments.add(parameter, Fragment(parameter, 0, 0, parameter.numel()))

    def publish(self) -> None:
        """Copy the fragments into the module's parameters."""


class _Scaled(Stage0):
    """Gradients may be multiplied by a dynamic loss scale."""

    zero: Any

    @property
    def loss_scale(self) -> float:  # type: ignore[override]
        return float(self.zero.loss_scale)

    def scale_state(self) -> dict[str, Any]:
        scaler = self.zero.loss_scaler
        return {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)} if scaler.dynamic else {}

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        if self.zero.loss_scaler.dynamic:
            for name in _SCALE:
                if name in state:
                    setattr(self.zero.loss_scaler, name, state[name])


_CLIPPED = (
    "A backward came after lite.clip_gradients() and before the step, which offloading does not allow: clip after the "
    "last backward."
)
#: The state of DeepSpeed's dynamic loss scale.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Stage1And2(_Scaled):
    """Sharded optimizer state, and in stage 2 sharded gradients."""

    partitioned = views = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.zero = engine.optimizer
        self.offloads = bool(self.zero.cpu_offload)
        self.reduces_in_step = not self.zero.partition_gradients
        self.zero.unregister_grad_acc_post_hooks()
        self._kept: list[Tensor] = []
        self._finished = False

    def begin(self) -> None:
        if self.offloads:  # an unused parameter leaves old values
            for flat in self.zero.single_partition_of_fp32_groups:
                flat.grad.zero_()

    def prologue(self) -> None:
        self.zero.clear_backward_seen_flag()
        self.zero.backward_prologue()
        self.zero.enter_backward()
        self.engine.set_gradient_accumulation_boundary(False)

    def epilogue(self, touched: Set[int]) -> None:
        if not self.reduces_in_step:
            self._complete(touched)
        self.engine.allreduce_gradients()
        self.zero.backward_epilogue()
        self.zero.exit_backward()

    @property
    def bucket_size(self) -> float:
        # Stage 1 averages at the end, in group order.
        return float("inf") if self.reduces_in_step else float(self.zero.reduce_bucket_size)

    def _complete(self, touched: Set[int]) -> None:
        """Make all ranks reduce the same gradients in one order: parameters unused on a rank count as zeros."""
        zero = self.zero
        zero.setup_buckets()
        for number, group in enumerate(zero.bit16_groups):
            for parameter in group:
                if id(parameter) not in touched:
                    parameter.grad = torch.zeros_like(parameter)
                    zero.reduce_independent_p_g_buckets_and_remove_grads(parameter, number)
        for bucket in zero.ipg_buckets.values():
            sort_bucket(bucket, contiguous=zero.contiguous_gradients)

    def _fill(self) -> None:
        zero = self.zero
        for parameter in (parameter for group in zero.bit16_groups for parameter in group):
            if zero.get_gradient_for_reduction(parameter) is None:
                if zero.use_grad_accum_attribute:
                    parameter.grad_accum = torch.zeros_like(parameter, dtype=zero.gradient_accumulation_dtype)
                else:
                    parameter.grad = torch.zeros_like(parameter)

    def follow(self) -> None:
        zero = self.zero
        wholes, groups = zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group
        for pieces, group, weights in zip(wholes, groups, self._flats(), strict=True):
            follow(pieces[torch.distributed.get_rank(group)], weights)

    def finish(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        if self.reduces_in_step:
            self._fill()
            self.engine.allreduce_gradients()
        else:
            self.zero.finalize_gradient_accumulation_boundary()
        for gradient, kept in zip(self.gradients(), self._kept, strict=False):
            gradient.add_(kept)
        self._kept.clear()

    def resume(self) -> None:
        if self.offloads:
            raise OrderError(_CLIPPED)
        self._kept = [gradient.clone() for gradient in self.gradients()]
        self._forget()

    def clear(self) -> None:
        self._kept.clear()
        self.zero.zero_grad()
        self.zero.micro_step_id = -1
        if self.offloads:
            self.zero.reset_cpu_buffers()
        self._forget()

    def _forget(self) -> None:
        for kept in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    def gradients(self) -> list[Tensor]:
        if self.offloads:
            return [flat.grad for flat in self.zero.single_partition_of_fp32_groups]
        return [piece for pieces in self.zero.averaged_gradients.values() for piece in pieces or ()]

    def locate(self, groups: Sequence[Mapping[str, Any]], fragments: Fragments) -> None:
        for group, flat in zip(groups, self._flats(), strict=True):
            for parameter in _trained([group]):
                fragments.add(parameter, linked(parameter, flat))

    def _flats(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def publish(self) -> None:
        self.zero.update_lp_params()


class Bf16(Stage1And2):
    """Stage 1 with parameters in bfloat16 and gradients in float32."""

    def __init__(self, engine: Any) -> None:
        Stage0.__init__(self, engine)
        self.zero = engine.optimizer
        self.zero.unregister_grad_acc_post_hooks()

    @property
    def loss_scale(self) -> float:  # type: ignore[override]
        return 1.0

    def scale_state(self) -> dict[str, Any]:
        return {}

    def load_scale_state(self, state: Mapping[str, Any]) -> None:
        pass

    @property
    def bucket_size(self) -> float:
        return float("inf")

    def begin(self) -> None:
        pass

    def epilogue(self, touched: Set[int]) -> None:
        self.zero.backward_epilogue()
        self.zero.exit_backward()

    def follow(self) -> None:
        zero = self.zero
        groups = zero.real_dp_process_group
        for pieces, group, weights in zip(zero.bf16_partitioned_groups, groups, self._flats(), strict=True):
            follow(pieces[torch.distributed.get_rank(group)], weights)

    def finish(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.buffered_allreduce_fallback()

    def resume(self) -> None:
        # Averaging gradients that are equal on all ranks again does not change them.
        pass

    def clear(self) -> None:
        self.zero.clear_lp_grads(set_to_none=True)
        self.zero.clear_hp_grads()

    def gradients(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_gradient_flat_partition)

    def _flats(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_flat_partition)


class Stage3(_Scaled):
    """Sharded parameters too: a submodule is gathered when it runs."""

    partitioned = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.zero = engine.optimizer
        self.offloads = bool(self.zero.offload_optimizer)
        self.zero.unregister_grad_acc_post_hooks()

    @property
    def swaps(self) -> bool:
        """Whether the optimizer's state is on a disk."""
        return bool(self.zero.swap_optimizer)

    def begin(self) -> None:
        # An unused parameter leaves old values.
        self.zero.grad_partitions_flat_buffer.zero_()
        for flat in self.zero.fp32_partitioned_groups_flat if self.offloads else ():
            if flat.grad is not None:
                flat.grad.zero_()

    def prologue(self) -> None:
        self.zero.clear_backward_seen_flag()
        # 0 would overwrite the buffers, which must not happen at a parameter's first use in one of several backwards.
        self.zero.micro_step_id = 1
        self.zero.backward_prologue()
        self.zero.enter_backward()
        self.engine.set_gradient_accumulation_boundary(False)

    def epilogue(self, touched: Set[int]) -> None:
        self._complete(touched)
        self.engine.allreduce_gradients()
        self.zero.backward_epilogue()
        self.zero.exit_backward()

    @property
    def bucket_size(self) -> float:
        return float(self.zero.reduce_bucket_size)

    def _complete(self, touched: Set[int]) -> None:
        """Make all ranks reduce the same gradients: parameters unused on a rank count as zeros."""
        zero = self.zero
        brought = {id(parameter) for bucket in zero.ipg_buckets.values() for parameter in bucket.params}
        for parameter in (parameter for group in zero.fp16_groups for parameter in group):
            if parameter.requires_grad and id(parameter) not in touched and id(parameter) not in brought:
                values = parameter.data
                # torch requires a gradient of the values' shape; these take no memory.
                parameter.data = values.new_zeros(()).expand(parameter.ds_shape)
                parameter.grad = torch.zeros(parameter.ds_shape, dtype=values.dtype, device=values.device)
                parameter.data = values
                zero.reduce_ready_partitions_and_remove_grads(parameter)

    def follow(self) -> None:
        pairs = zip(self.zero.fp16_partitioned_groups_flat, self.zero.fp32_partitioned_groups_flat, strict=True)
        for piece, weights in pairs:
            if piece is not None and piece.numel() == weights.numel() and piece is not weights:
                follow(piece, weights)

    def complete_values(self) -> None:
        kept = self.zero.persistent_parameters
        missing = library("runtime.zero.partition_parameters").ZeroParamStatus.NOT_AVAILABLE
        gone = [parameter for parameter in kept if parameter.ds_status is missing]
        if gone:
            with torch.inference_mode(False), torch.no_grad():
                gone[0].all_gather(gone)

    def finish(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.zero.finalize_gradient_accumulation_boundary()

    def resume(self) -> None:
        if self.offloads:
            raise OrderError(_CLIPPED)

    def clear(self) -> None:
        self.zero.zero_grad()
        if self.offloads:
            self.zero.reset_cpu_buffers()

    def gradients(self) -> list[Tensor]:
        if self.offloads:
            return [flat.grad for flat in self.zero.fp32_partitioned_groups_flat]
        return [piece for pieces in self.zero.averaged_gradients.values() for piece in pieces or ()]

    def locate(self, groups: Sequence[Mapping[str, Any]], fragments: Fragments) -> None:
        for parameter in _trained(groups):
            group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            offset = length * parameter.ds_zero_partition_rank
            numel = max(0, min(length, parameter.ds_numel - offset))
            flat = self.zero.fp32_partitioned_groups_flat[group]
            fragments.add(parameter, Fragment(flat, start, offset if numel else 0, numel))


def zero_of(engine: Any) -> Stage0:
    """Return the adapter of an engine's optimizer."""
    if not engine.zero_optimization():
        return Stage0(engine)
    if engine.zero_optimization_partition_weights():
        return Stage3(engine)
    return (
        Bf16(engine)
        if isinstance(engine.optimizer, library("runtime.bf16_optimizer").BF16_Optimizer)
        else Stage1And2(engine)
    )


def _trained(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
