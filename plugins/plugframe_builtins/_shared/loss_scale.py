"""Loss scaling with torch's ``GradScaler``, with gradients unscaled after every backward."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from plugframe.base import is_gathered
from plugframe.errors import OrderError
from plugframe.hooks import no_step
from plugframe.utils.registrations import Registrations


class LossScale:
    """Scale losses, and unscale every gradient at the end of the backward.

    A script may clip, log, accumulate or apply gradients as without a scaler. Gradients of earlier
    backwards are scaled while a new one adds to them. Scales are powers of two, unless a scaler with other factors is
    given, so this is lossless. Nothing here synchronises with the device, except the check for overflow at a step, as
    in torch.

    The scale is updated as late as possible: before the first loss after a step. ``GradScaler.update`` belongs
    after the steps of all optimizers of an iteration, and no call marks that point.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._leaves = _Leaves()
        # Scale of the gradients in the running backward, None outside of one.
        self._scale: Tensor | None = None
        self._used = self._stepped = self._known = False
        # Since the last update: ``GradScaler`` tracks optimizers by id.
        self._checked: list[Any] = []
        # Largest values of the last backward's gradients, where unknown code may step on them.
        self._largest: list[Tensor] = []
        # Parameters with their version counters after the last backward.
        self._versions: list[tuple[Tensor, int]] = []

    def watch(self, module: nn.Module) -> None:
        """Unscale the gradients of `module`."""
        self._leaves.add_module(module)

    def watch_optimizer(self, optimizer: Optimizer) -> None:
        """Unscale the gradients of parameters in `optimizer`, also those outside of any module."""
        self._leaves.add_optimizer(optimizer)
        self._known = True

    def close(self) -> None:
        """Remove all hooks."""
        self._leaves.close()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the scaled loss."""
        self.finish()
        self._settle()
        self._used = True
        scaled = self._scaler.scale(loss)
        self._scale = self._scaler.scale(loss.new_ones((), dtype=torch.float32)).detach()
        self._leaves.look(loss)
        self._leaves.put_hooks_behind(self._divided)
        _multiply(self._leaves.gradients(), self._scale)
        return scaled

    def finish(self) -> None:
        """Unscale gradients after a backward."""
        scale, self._scale = self._scale, None
        if scale is None:
            return
        self._leaves.settle()
        gradients = self._leaves.gradients()
        _multiply(gradients, scale.reciprocal())
        self._largest = [] if self._known else _largest(gradients)
        self._versions = self._leaves.versions()

    def unscale(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the optimizer's unscaled gradients.

        Raises:
            OrderError: if there are gradients, but no loss was scaled.
        """
        self.finish()
        gradients = _gradients(optimizer)
        if gradients and not self._used:
            raise OrderError(
                "The optimizer has gradients, and none of them was scaled: compute them with lite.backward(loss), "
                "not loss.backward()."
            )
        return gradients

    def step(self, optimizer: Optimizer, step: Callable[..., Any]) -> Any:
        """Run the optimizer's step; skip it and return None if a gradient is not finite."""
        gradients = self.unscale(optimizer)
        if not gradients:
            return step()
        self._stepped = True
        # Steps that unscale on the device (fused optimizers), and sharded gradients, which torch checks over all
        # ranks, take torch's own path.
        fused, skipped = getattr(optimizer, "_step_supports_amp_scaling", False), step is no_step
        if (fused and not skipped) or any(map(_is_shard, gradients)):
            if any(each is optimizer for each in self._checked):
                self._update()  # a second step between two losses, which torch's scaler refuses
            self._checked.append(optimizer)
            _multiply(gradients, self._scaler.scale(torch.ones((), device=gradients[0].device)))
            # The scaler calls optimizer.step(), which runs the user's own; what that was given is bound to `step`.
            keywords = step.keywords if isinstance(step, functools.partial) else {}
            result = self._scaler.step(optimizer, **keywords)
            if fused and skipped:  # no kernel has unscaled them
                _multiply(gradients, self._scaler.scale(torch.ones((), device=gradients[0].device)).reciprocal())
            return result
        return self._scaler.step(self._look_at(_largest(gradients), step))

    def state(self) -> dict[str, Any]:
        """Return the scaler's state as plain values."""
        self._settle()
        return self._scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state of `state`."""
        self._settle()
        self._scaler.load_state_dict(state)

    def _divided(self, gradient: Tensor) -> Tensor | None:
        return None if self._scale is None else gradient * self._scale.reciprocal()

    def _look_at(self, largest: list[Tensor], step: Callable[..., Any] | None = None) -> Any:
        """Let the scaler check for non-finite values; return the object it records them for."""
        stand_ins = [torch.empty_like(each) for each in largest]
        for stand_in, each in zip(stand_ins, largest, strict=True):
            stand_in.grad = each  # the scaler divides these, not the gradients
        holder = SimpleNamespace(param_groups=[{"params": stand_ins}], step=step)
        self._scaler.unscale_(holder)  # type: ignore[arg-type]
        self._checked.append(holder)
        return holder

    @torch.no_grad()
    def _settle(self) -> None:
        """Update the scale from the overflows of the last steps.

        Raises:
            OrderError: if gradients overflowed, and code outside of lite stepped on them.
        """
        if not self._stepped:
            self._check_other_steps()
        elif self._checked:
            self._update()
        self._stepped = False
        self._versions = [(parameter, parameter._version) for parameter, _ in self._versions]

    def _check_other_steps(self) -> None:
        """Raise if other code changed the weights: a manual step, or an optimizer that was not set up."""
        if all(parameter._version == version for parameter, version in self._versions):
            return
        self._known = False
        if not self._largest:
            return
        if not all(bool(each.isfinite().all()) for each in self._largest):
            raise OrderError(
                f"Gradients overflowed float16 at loss scale {self._scaler.get_scale():g}, and an optimizer that "
                "was not set up stepped on them: set the optimizer up with lite.setup(model, optimizer), which leaves "
                "such a step out; or use precision='bf16-mixed'."
            )
        self._look_at(self._largest)
        self._update()

    def _update(self) -> None:
        self._scaler.update()
        self._checked.clear()


def _largest(gradients: list[Tensor]) -> list[Tensor]:
    """Return the largest value of each gradient, one tensor per device: finite if all values are."""
    norms: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        local = _local(gradient) if _is_shard(gradient) else gradient.detach()
        values = local.coalesce().values() if local.is_sparse else local
        if values.numel():
            norms.setdefault(values.device, []).append(torch.linalg.vector_norm(values, float("inf")).float())
    return [torch.stack(each) for each in norms.values()]


class _Leaves:
    """The tensors whose gradients are unscaled: parameters, and further leaves of losses."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[nn.Module]] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._registrations = Registrations()
        self._end = self._registrations.watch()
        self._seen = -1
        self._known: list[Tensor] = []
        self._ids: set[int] = set()
        self._others: list[weakref.ref[Tensor]] = []
        self._hooked: set[int] = set()
        self._looks = 0
        self._always = False
        # Whether the known parameters are those that the modules have outside of a forward.
        self._settled = False

    def add_module(self, module: nn.Module) -> None:
        self._modules.append(weakref.ref(module))
        self._seen = -1

    def add_optimizer(self, optimizer: Optimizer) -> None:
        self._optimizers.append(weakref.ref(optimizer))
        self._seen = -1

    def close(self) -> None:
        self._end()
        self._known.clear()
        self._modules.clear()
        self._optimizers.clear()

    def look(self, loss: Tensor) -> None:
        """Find leaves outside of modules and optimizers: an input, or a weight of the loss.

        The graph is walked at the first few losses, then ever more rarely, and always once some were found.
        """
        self._others = [each for each in self._others if each() is not None]
        self._looks += 1
        if not self._always and self._looks & (self._looks - 1):
            return
        self._refresh()
        known = self._ids | {id(each()) for each in self._others}
        for leaf in _leaves_of(loss):
            if id(leaf) not in known:
                self._always = True
                self._others.append(weakref.ref(leaf))

    def put_hooks_behind(self, divide: Callable[[Tensor], Tensor | None]) -> None:
        """Run the user's tensor hooks after unscaling."""
        for leaf in self._all():
            # Private: torch cannot insert a hook before others, nor list them (torch 2.13).
            if id(leaf) in self._hooked or _is_shard(leaf) or is_gathered(leaf):
                continue
            if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
                register: Any = leaf.register_hook
                handle = register(divide)
                hooks: Any = leaf._backward_hooks
                before = [(key, hook) for key, hook in hooks.items() if key != handle.id]
                ours = hooks[handle.id]
                hooks.clear()  # in place: the user's handles refer to this dict
                hooks.update([(handle.id, ours), *before])
                self._hooked.add(id(leaf))

    def gradients(self) -> list[Tensor]:
        """Return the gradients that no hook unscales."""
        return [leaf.grad for leaf in self._all() if leaf.grad is not None and id(leaf) not in self._hooked]

    def versions(self) -> list[tuple[Tensor, int]]:
        """Return the parameters with their version counters."""
        self._refresh()
        return [(leaf, leaf._version) for leaf in self._known if not leaf.is_inference()]

    def _all(self) -> Iterator[Tensor]:
        self._refresh()
        yield from self._known
        for reference in self._others:
            leaf = reference()
            if leaf is not None:
                yield leaf

    def _refresh(self) -> None:
        if self._seen == self._registrations.count:  # walking the modules is slow
            return
        found = self._walk()
        # A module that a strategy shards holds gathered parameters until its backward has ended: what was known before,
        # the shards among it, stays until then.
        found.update((id(p), p) for p in self._known)
        self._keep(found)
        self._settled = False

    def settle(self) -> None:
        """Find the parameters again, after a backward, if they may have changed since the last one."""
        if not self._settled or self._seen != self._registrations.count:
            self._keep(self._walk())
            self._settled = True

    def _walk(self) -> dict[int, Tensor]:
        modules = [module for module in (each() for each in self._modules) if module is not None]
        optimizers = [optimizer for optimizer in (each() for each in self._optimizers) if optimizer is not None]
        found: dict[int, Tensor] = {id(p): p for module in modules for p in module.parameters()}
        found.update((id(p), p) for optimizer in optimizers for p in _parameters(optimizer))
        return found

    def _keep(self, found: dict[int, Tensor]) -> None:
        self._seen = self._registrations.count
        self._known, self._ids = list(found.values()), set(found)
        self._hooked &= self._ids | {id(each()) for each in self._others}


def _leaves_of(loss: Tensor) -> Iterator[Tensor]:
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not is_gathered(variable):
            yield variable
        stack += [following for following, _ in node.next_functions]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for p in _parameters(optimizer) if p.grad is not None]


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _local(shard: Any) -> Tensor:
    with torch.no_grad():  # autograd would make a copy
        return shard.to_local()  # type: ignore[no-any-return]


@torch.no_grad()
def _multiply(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, many at once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        local = _local(gradient) if _is_shard(gradient) else gradient
        if local.is_sparse:
            local.mul_(factor.to(local.device))
        elif local.numel():
            by_device.setdefault(local.device, []).append(local)
    for device, each in by_device.items():
        # Undocumented, but torch.nn.utils.clip_grad_norm_ multiplies with it (torch 2.13).
        torch._foreach_mul_(each, factor.to(device))  # pyright: ignore[reportPrivateImportUsage]
