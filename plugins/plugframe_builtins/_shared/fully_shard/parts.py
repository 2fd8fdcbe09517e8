"""Parameters that are sharded with ``fully_shard``, and gathered by a strategy that runs parts of a module itself.

torch gathers the parameters of a module when its forward begins, and reduces gradients when a backward has passed it.
The stages of a pipeline run forwards and backwards of many micro-batches in one call: parameters are gathered once for
all of them, and gradients are reduced once, in the backward of the call's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from plugframe.errors import UnsupportedError
from plugframe_builtins._shared.fully_shard.averaging import Averaging
from plugframe_builtins._shared.fully_shard.engine import Shim
from plugframe_builtins._shared.sharding.gradient_hooks import gradients_before, hooked, run_hooks
from plugframe_builtins._shared.sharding.parameter import as_sharded
from plugframe_builtins._shared.sharding.uneven_evaluation import UnevenEvaluation


class _Group(nn.Module):
    """Modules whose parameters are gathered in one collective; never called itself, so torch's hooks do not run."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.modules_of_group = nn.ModuleList(map(_without_children, modules))


def _without_children(module: nn.Module) -> nn.Module:
    """Return `module`, or one that holds the same parameters and nothing else, if it has children."""
    if not module._modules:
        return module
    bare = nn.Module()
    bare.__dict__["_parameters"] = module._parameters  # the same dict: torch swaps parameters in it
    return bare


class ShardedParts:
    """The parameters of parts of a module: sharded, except while `run` runs a call.

    Args:
        module: the complete module.
        groups: the modules whose direct parameters are sharded, in groups that are gathered together.
        mesh: the axes over which gradients are averaged; the last one shards.
        evaluation: coordinates evaluation over ranks with uneven numbers of batches.
        hooks: the hooks of the job, for collectives.

    Attributes:
        local: whether accumulated gradients are not averaged yet.
        alike: whether a call runs further collectives, so that all ranks must evaluate as many batches.
        parameters: the sharded parameters.
        averaging: of their gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Sequence[nn.Module]],
        mesh: DeviceMesh,
        evaluation: UnevenEvaluation,
        hooks: Any,
    ) -> None:
        self.module = module
        self.local = self.alike = False
        self._mesh, self._hooks = mesh, hooks
        self._made = False
        # In the parameters' dtype: micro-batches add their gradients up in it.
        options: Any = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": _as_they_are()}
        self._groups: list[Any] = [_Group(modules) for modules in groups]
        for group in self._groups:
            fully_shard(group, **options)
        self._root: Any = Shim(nn.ModuleList(self._groups))
        fully_shard(self._root, **options)
        self.averaging = Averaging(self._root)
        self.parameters: list[nn.Parameter] = list(self._root.parameters())
        for parameter in self.parameters:
            as_sharded(parameter)
        self._evaluation = evaluation
        self._number = evaluation.join(self)

    def run(self, call: Callable[[], Any]) -> Any:
        """Return ``call()``, run with gathered parameters. Every rank must call it.

        Gradients that the backward of its result adds to gathered parameters are averaged at the end of it.
        """
        if not (torch.is_grad_enabled() and self.module.training):
            self._evaluation.announce(self._number)
        if torch.is_inference_mode_enabled() and not self._made:
            # Parameters gathered first in inference mode would be unusable in training.
            with torch.inference_mode(False), torch.no_grad():
                return self._run(call)
        return self._run(call)

    def _run(self, call: Callable[[], Any]) -> Any:
        def gathered() -> Any:
            with self.gathered():
                return call()

        try:
            _, sealed = self._root(gathered)
        except BaseException:
            reset = getattr(self._root, "reset_iter_state", None)  # from torch 2.13 on
            if reset is not None:
                reset()
            raise
        self._made = True
        return sealed.content

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the parameters within the context; after the first `run` also outside of one."""
        for group in self._groups:
            group.unshard()
        try:
            yield
        finally:
            for group in self._groups:
                group.reshard()

    @torch.no_grad()
    def agreed(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients of gathered parameters, zero where only other ranks have one: torch reduces them together.

        Every rank must call it, in a backward.
        """
        self.local = not self.averaging.enabled
        if self.local:
            return list(gradients)
        have = [g is not None or p.grad is not None for p, g in zip(parameters, gradients, strict=True)]
        flags = torch.tensor(have, dtype=torch.float32, device=self._mesh.device_type)
        for dim in range(self._mesh.ndim):
            flags = self._hooks.collective_all_reduce(tensor=flags, op="max", group=self._mesh.get_group(dim))
        rows = zip(parameters, gradients, have, flags.tolist(), strict=True)
        return [torch.zeros_like(p) if used and not own else g for p, g, own, used in rows]

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Wrap a backward: hooks of the parameters run on its averaged gradients."""
        held = gradients_before(hooked(self.parameters)) if self.averaging.enabled else {}
        yield
        run_hooks(held)

    def forget(self) -> None:
        """Drop accumulated gradients that are not averaged. Every rank must call it: it gathers."""
        self.local = False
        with self.gathered():
            for parameter in self._root.parameters():
                parameter.grad = None

    def owns(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer updates any of the parameters."""
        own = set(map(id, self.parameters))
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    @torch.no_grad()
    def help(self) -> None:
        """Gather the parameters, as a call on another rank does, and reshard them."""
        if self.alike:
            raise UnsupportedError(
                "Other ranks evaluate more batches than this one, and the experts of a pipeline exchange tokens in "
                "each: evaluate as many batches on every rank (drop_last=True, or batches that the ranks divide)."
            )
        with torch.inference_mode(False), torch.no_grad():
            self._run(lambda: None)

    def order(self) -> Sequence[int]:
        """Return nothing: the order is always the same."""
        return ()


def _as_they_are() -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(cast_forward_inputs=False)
