"""The order in which a forward gathers a sharded module's submodules, replayable by a rank without a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from plugframe.errors import UnsupportedError
from plugframe_builtins.deepspeed.agreement import Agreement, Trace
from plugframe_builtins.deepspeed.library import library


class Walk:
    """Record the order in which a forward gathers and frees submodules, and replay it.

    Args:
        shim: wraps the module, set up by DeepSpeed.
        offload: DeepSpeed's parameter offload, which gathers and frees.
        agreement: verifies that training ranks run the same submodules; None for a single rank.

    Attributes:
        works: whether ``lite.backward`` is running.
    """

    def __init__(self, shim: nn.Module, offload: Any, agreement: Agreement | None = None) -> None:
        self._shim = shim
        self._module: Any = shim.module
        self._offload = offload
        self._agreement = agreement
        self._steps: list[tuple[nn.Module, bool]] = []
        self._handles: list[Any] = []
        self._partitions: list[tuple[Any, Callable[..., Any]]] = []
        self._running = self.works = False
        self._sharded: set[int] = set()
        self._parts = self._compared()
        self._trace = Trace(self._agree)
        for part in shim.modules():
            # Before DeepSpeed's own hook, which gathers.
            self._handles.append(part.register_forward_pre_hook(self._come, prepend=True))
            self._handles.append(part.register_forward_hook(self._go))
        self._pre_backward = offload.pre_sub_module_backward_function
        offload.pre_sub_module_backward_function = self._come_back
        self._keep_small_ones()
        if not self._parts:
            self._forget_order()

    def _keep_small_ones(self) -> None:
        """Make DeepSpeed keep small parameters gathered in the first step too, in which it would free all."""
        coordinator = self._offload.get_param_coordinator()
        release = coordinator.release_sub_module
        releasing = False

        def release_sub_module(*args: Any, **kwargs: Any) -> None:
            nonlocal releasing
            releasing = True
            try:
                release(*args, **kwargs)
            finally:
                releasing = False

        def kept(partition: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: None if releasing else partition(*args, **kwargs)

        coordinator.release_sub_module = release_sub_module
        for parameter in self._shim.parameters():
            small: Any = parameter
            if getattr(small, "ds_persist", False):
                self._partitions.append((small, small.partition))
                small.partition = kept(small.partition)

    def _compared(self) -> dict[int, str]:
        """Return the submodules whose order must agree over ranks, with their names, by id.

        All of them if any has parameters to gather: DeepSpeed also prefetches in the order of all.
        """
        found: dict[int, str] = {}
        is_leaf: Callable[[nn.Module], bool] = library("utils").z3_leaf_module
        for name, part in self._shim.named_modules():
            if hasattr(part, "ds_id") and part is not self._shim:
                own: list[Any] = list(part.parameters(recurse=is_leaf(part)))
                sharded = any(hasattr(p, "ds_id") and not getattr(p, "ds_persist", False) for p in own)
                if sharded:
                    self._sharded.add(id(part))
                numel = sum(getattr(p, "ds_numel", 0) for p in own)
                called = name.removeprefix("module").lstrip(".") or "the model"
                found[id(part)] = f"{called!r} ({type(part).__name__}, {numel} elements)"
        return found if self._sharded else {}

    def _forget_order(self) -> None:
        """Disable DeepSpeed's own comparison of orders, as there is nothing to gather."""
        coordinator = self._offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        coordinator.reset_step = lambda: None

    def _come(self, part: nn.Module, args: Any) -> None:
        if part is self._shim:
            self._steps.clear()
            self._running = True
        if self._running:
            self._steps.append((part, True))
        # Evaluation may be uneven, and ranks announce its forwards.
        trains = torch.is_grad_enabled() and self._module.training
        if trains and id(part) in self._parts and self._agreement is not None:
            self._trace.record(self._parts[id(part)])

    def _go(self, part: nn.Module, args: Any, result: Any) -> None:
        if self._running:
            self._steps.append((part, False))
        if part is self._shim:
            self._running = False

    def _come_back(self, part: nn.Module) -> None:
        if id(part) in self._parts:
            if not self.works and id(part) in self._sharded:
                raise UnsupportedError(
                    "A backward outside of lite.backward(), as of torch.autograd.grad(), reached "
                    f"{self._parts[id(part)]}, which strategy 'deepspeed' (stage 3) gathers for lite.backward() alone: "
                    "use stage=2, or a param_persistence_threshold of as many elements, which keeps it complete."
                )
            if self.works and self._agreement is not None:
                self._trace.record(f"the backward of {self._parts[id(part)]}")
        self._pre_backward(part)

    def _agree(self, place: str, before: str | None) -> None:
        assert self._agreement is not None
        self._agreement(
            place,
            before,
            "Strategy 'deepspeed' (stage 3) gathers each submodule from all ranks: use stage=2, a "
            "param_persistence_threshold of as many elements as the submodule has, or before lite.setup() "
            "deepspeed.utils.set_z3_leaf_modules(model, [TheBlock]), which gathers the complete block.",
        )

    def end(self) -> None:
        """End a step."""
        if self._agreement is not None:
            self._trace.end()

    @torch.no_grad()
    def help(self) -> None:
        """Gather and free the parameters that another rank's forward gathers."""
        running: list[Any] = library("runtime.zero.parameter_offload").FWD_MODULE_STACK
        self._steps = self._steps or list(_assumed(self._shim))
        self._offload.get_param_coordinator().reset_step()
        come: Callable[[nn.Module], None] = self._offload.pre_sub_module_forward_function
        go: Callable[[nn.Module], None] = self._offload.post_sub_module_forward_function
        for part, comes in self._steps:
            if comes:
                come(part)
            else:
                running.pop()
                go(part)

    def order(self) -> list[int]:
        """Return the order of submodules in the last forward."""
        number = {id(part): position for position, part in enumerate(self._shim.modules())}
        return [number[id(part)] for part, comes in self._steps if comes]

    def close(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        del self._offload.pre_sub_module_backward_function
        coordinator = self._offload.get_param_coordinator()
        del coordinator.release_sub_module
        vars(coordinator).pop("reset_step", None)
        for parameter, partition in self._partitions:
            parameter.partition = partition


def _assumed(part: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return the order of a forward that runs every submodule in order of construction."""
    inner = [step for child in part.children() for step in _assumed(child)]
    if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
        return inner
    return [(part, True), *inner, (part, False)]
