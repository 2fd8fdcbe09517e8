"""DeepSpeed's engine of a module, over a shim, driven step by step."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import ForwardShim, warn_caller
from plugframe.errors import OrderError, UnsupportedError
from plugframe.utils.buffers import replicated_buffers
from plugframe.utils.registrations import Registrations
from plugframe_builtins.deepspeed.agreement import Agreement, Trace
from plugframe_builtins.deepspeed.borrowed import Borrowed
from plugframe_builtins.deepspeed.fragments import Fragments, Sum, extent, gathered
from plugframe_builtins.deepspeed.guard import Guard, is_guarded
from plugframe_builtins.deepspeed.marks import forget_shim
from plugframe_builtins.deepspeed.walk import Walk
from plugframe_builtins.deepspeed.zero import Stage0, zero_of

_LOOK = attrgetter("requires_grad", "dtype")


class Reader:
    """Run ``call(*args)`` on a sharded module as ``reader(call, *args)``, without training.

    Args:
        module: the user's module.
        initialize: ``initialize(shim)`` returns DeepSpeed's engine.
        guard: of the module's parameters; open during the call.
        agreement: verifies that training ranks run the same modules; None for a single rank.

    Attributes:
        deepspeed: DeepSpeed's engine.
        walk: the last forward's order of modules, None if parameters are replicated.
    """

    def __init__(
        self, module: nn.Module, initialize: Callable[[nn.Module], Any], guard: Guard, agreement: Agreement | None
    ) -> None:
        self.module = module
        self.guard = guard
        self._shim = ForwardShim(module)
        self.deepspeed: Any = initialize(self._shim)
        offload = self.deepspeed.optimizer
        offload = getattr(offload, "parameter_offload", offload)
        shards = hasattr(offload, "pre_sub_module_forward_function")
        self.walk: Walk | None = Walk(self._shim, offload, agreement) if shards else None

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.guard.unlock()
        try:
            return self._shim(call, *args, **kwargs)
        finally:
            self.guard.lock()

    def values(self) -> dict[int, Tensor]:
        """Return the full values of all sharded parameters, by id. Every rank must call it."""
        return {id(p): _copied(p) for p in self.module.parameters() if hasattr(p, "ds_id")}

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        if self.walk is not None:
            self.walk.close()
        self.deepspeed.destroy()
        forget_shim(self._shim)


class Engine(Reader):
    """Run ``call(*args)`` as ``engine(call, *args)``, recorded for `before_backward` and `step`.

    Args:
        module: the user's module.
        borrowed: its optimizer.
        initialize: ``initialize(shim, optimizer)`` returns DeepSpeed's engine.
        add_up: sums a tensor over all ranks.
        guard: of the module's parameters.
        agreement: as in `Reader`.
        registrations: counts registrations in any module.

    Attributes:
        zero: DeepSpeed's optimizer.
        pending: whether there are gradients that no step has used yet.
        stale_buffers: whether a forward may have changed buffers since the last broadcast.
    """

    def __init__(
        self,
        module: nn.Module,
        borrowed: Borrowed,
        *,
        initialize: Callable[[nn.Module, Optimizer], Any],
        add_up: Sum,
        guard: Guard,
        agreement: Agreement | None,
        registrations: Registrations,
    ) -> None:
        self.borrowed = borrowed
        self.pending = self.stale_buffers = False
        self._finished = self._works = self._stepped = self._mixed = False
        self._touched: dict[int, None] = {}  # in the order of accumulation
        # Parameters with gradients, since the last step and since set-up.
        self._reached: frozenset[int] = frozenset()
        self._ever_reached: frozenset[int] = frozenset()
        self._warned_unreached = False
        before = [{"params": list(borrowed.optimizer.param_groups[number]["params"])} for number in borrowed.used]
        # Before DeepSpeed's own hooks, which take gradients away.
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._touch)
            for group in before
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        with borrowed.lent():
            super().__init__(module, lambda shim: initialize(shim, borrowed.optimizer), guard, agreement)
        self.zero: Stage0 = zero_of(self.deepspeed)
        self.fragments = Fragments(add_up if self.zero.partitioned else _itself)
        self.zero.locate(before, self.fragments)
        trained = self.fragments.parameters()
        self._trained = frozenset(map(id, trained))
        self._has_buffers = bool(replicated_buffers(module))
        self._names, self._parameters = zip(*module.named_parameters(), strict=True)
        self._looks = tuple(map(_LOOK, self._parameters))
        self._places = [(p, p.data_ptr(), p.data) for p in trained] if self.zero.views else []
        borrowed.refuse_states()
        numel = sum(extent(parameter)[0] for parameter in trained)
        self._trace = self._make_trace(agreement, numel) if numel > self.zero.bucket_size else None
        self._registrations = registrations
        self._registered = registrations.count
        self._strangers = False

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._registered != self._registrations.count or self._strangers:
            self._check_registered()
        self.relink()
        self.guard.unlock()
        self.zero.complete_values()
        if torch.is_grad_enabled():
            self.stale_buffers = self._has_buffers
        return super().__call__(call, *args, **kwargs)

    def _make_trace(self, agreement: Agreement | None, numel: int) -> Trace | None:
        remedy = (
            "Gradients of a model that is larger than reduce_bucket_size are averaged in the order in which they "
            "are computed: "
            f"use DeepSpeed(reduce_bucket_size={numel})."
        )
        return None if agreement is None else Trace(lambda place, before: agreement(place, before, remedy))

    def _compare(self) -> None:
        """Verify that all ranks have gradients of the same parameters, if some are averaged already."""
        if self._trace is not None:
            order = {key: place for place, key in enumerate(self._touched)}
            digest = zlib.crc32(repr([order.get(id(p)) for p in self._parameters]).encode())
            self._trace.record(f"a backward with gradients of {len(order)} parameters (order {digest:08x})")

    def _check_registered(self) -> None:
        """Raise if parameters were registered after set-up.

        Raises:
            UnsupportedError: naming a parameter.
        """
        known = set(map(id, self._parameters))
        # A nested model that was set up separately has its own engine.
        new = {n: p for n, p in self.module.named_parameters() if id(p) not in known and not is_guarded(p)}
        # In stage 3 DeepSpeed iterates over frozen parameters too.
        name = next((name for name, p in new.items() if p.requires_grad or self.walk is not None), None)
        if name is not None:
            raise UnsupportedError(
                f"Parameter {name!r} was added or replaced after lite.setup(), and strategy 'deepspeed' would neither "
                "average its gradient nor update it: change the model before lite.setup()."
            )
        self._strangers = bool(new)
        self._registered = self._registrations.count

    def relink(self) -> None:
        """Copy values assigned to ``parameter.data`` into DeepSpeed's storage.

        Raises:
            UnsupportedError: if their shape or dtype differs.
        """
        for parameter, pointer, place in self._places:
            if parameter.data_ptr() != pointer:
                if parameter.shape != place.shape or parameter.dtype != place.dtype:
                    raise UnsupportedError(
                        f"{self.guard.name(parameter)} was {tuple(place.shape)}, {place.dtype} at lite.setup() and is "
                        f"{tuple(parameter.shape)}, {parameter.dtype} now: resize and convert before lite.setup()."
                    )
                place.copy_(parameter.data)
                parameter.data = place

    def _check_looks(self) -> None:
        looks = tuple(map(_LOOK, self._parameters))
        if looks != self._looks:
            pairs = zip(self._names, looks, self._looks, strict=True)
            name = next(name for name, now, before in pairs if now != before)
            raise UnsupportedError(
                f"Parameter {name!r} was frozen, thawed or converted after lite.setup(), and DeepSpeed has laid it out "
                "as it was: do it before, or use strategy='ddp' or 'fsdp'."
            )

    def owns(self, optimizer: Optimizer) -> bool:
        """Return whether `optimizer` is the engine's."""
        return self.borrowed.optimizer is optimizer

    # ------------------------------------------------------------------ gradients

    def before_backward(self) -> None:
        """Prepare for a backward that may reach the model."""
        self.guard.unlock()
        self._settle()
        if not self.pending:
            self.zero.begin()
        elif self._finished:
            self.zero.resume()
        self._touched.clear()
        self._works = True
        if self.walk is not None:
            self.walk.works = True
        self.zero.prologue()

    def after_backward(self, *, averages: bool) -> None:
        """Record the gradients of the backward.

        Args:
            averages: whether replicated gradients are averaged at once.
        """
        self._works = False
        if self.walk is not None:
            self.walk.works = False
        if self._touched:
            # The common case costs nothing: every parameter has a gradient.
            full = len(self._touched) == len(self._trained)
            self._reached = self._trained if full else self._reached | self._touched.keys()
            self._check_looks()
            self._mixed = self._mixed or self._stepped
            self.pending, self._finished = True, False
            with self.borrowed.lent():
                self._compare()
                self.zero.epilogue(self._touched.keys())
                if not self.zero.partitioned and averages:
                    # Averaging gradients that are equal on all ranks again does not change them.
                    self.zero.finish()
        self._show()

    def _show(self) -> None:
        """Record whether there are gradients that the parameters do not show."""
        if self.zero.partitioned:
            if self.pending and not self.guard.pending:
                self.guard.seen = False
            self.guard.holds, self.guard.pending = self.pending or self._stepped, self.pending
        self.guard.lock()

    def _settle(self) -> None:
        """Drop gradients that the script has set to None."""
        if self.pending and self.guard.settled(self.fragments.parameters()):
            self.clear()
        elif self._stepped and self.guard.seen:
            self._stepped = False  # this stage keeps gradients in the parameters
        self.guard.forgotten.clear()

    def _touch(self, parameter: Tensor) -> None:
        self._touched[id(parameter)] = None
        if not self.zero.partitioned:
            return
        if not self._works:
            raise OrderError(
                f"A backward outside of lite.backward() has reached {self.guard.name(parameter)}, whose gradient "
                "strategy 'deepspeed' would lose: call lite.backward(loss)."
            )
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UnsupportedError(
                f"{self.guard.name(parameter)} has a sparse gradient, and strategy 'deepspeed' averages dense ones "
                "alone: use sparse=False, or strategy='ddp'."
            )

    def finish(self) -> None:
        """Average the accumulated gradients, unless that was done."""
        self._settle()
        if self.pending and not self._finished:
            self._finished = True
            self.guard.unlock()
            with self.borrowed.lent():
                self.zero.finish()
            self.guard.lock()

    def clear(self) -> None:
        """Drop all gradients."""
        self.guard.forgotten.clear()
        self._stepped = self._mixed = False
        self._reached = frozenset()
        if self.pending:
            self.pending = self._finished = False
            self.guard.unlock()
            with self.borrowed.lent():
                self.zero.clear()
        self._show()

    def step(self, *, skips: bool = False) -> bool:
        """Update the parameters unless gradients are not finite; return whether it did.

        Args:
            skips: whether to drop the gradients instead of updating parameters.
        """
        self.borrowed.check()
        self._settle()
        if not self.pending:
            self._check_unseen()
            return True
        if self._mixed and self.zero.partitioned:
            raise OrderError(
                f"{type(self.borrowed.optimizer).__name__}.step() without zero_grad() since the step before: in torch "
                "gradients would add up, and strategy 'deepspeed' forgets them in a step. Call optimizer.zero_grad()."
            )
        self._check_looks()
        if self.zero.partitioned and len(self._reached) < len(self._trained) and not self._warned_unreached:
            self._warn_unreached()
        if self._ever_reached is not self._trained:
            self._ever_reached = self._trained if self._reached is self._trained else self._ever_reached | self._reached
        self._reached = frozenset()
        if self._trace is not None:
            self._trace.end()
        if self.walk is not None:
            self.walk.end()
        self.finish()
        self.guard.unlock()
        self.relink()
        self.zero.follow()
        with self.borrowed.lent():
            if skips:
                self.zero.clear()
            else:
                self.deepspeed.step()
        self.pending = self._finished = False
        self._stepped = self.zero.partitioned
        self.guard.seen = False
        self._show()
        return not skips and bool(self.deepspeed.was_step_applied())

    def _warn_unreached(self) -> None:
        """Warn once for parameters without a gradient that the step changes all the same."""
        optimizer = self.borrowed.optimizer
        decayed = {id(p) for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
        keeps_momentum = any(group.get("momentum") or "betas" in group for group in optimizer.param_groups)
        moving = self._ever_reached if keeps_momentum else set()
        found = [
            name
            for name, parameter in zip(self._names, self._parameters, strict=True)
            if id(parameter) not in self._reached and id(parameter) in decayed | moving
        ]
        if found:
            self._warned_unreached = True
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            warn_caller(
                f"Parameter {found[0]!r}{more} got no gradient on this rank in a step. If that is so on all ranks, "
                "torch would leave it as it is, and strategy 'deepspeed' steps on a gradient of zero: weight decay and "
                "momentum change it. Freeze it before lite.setup(), or use strategy='ddp' or 'fsdp'."
            )

    def _check_unseen(self) -> None:
        """Raise before a step on gradients that the script assigned.

        Raises:
            OrderError: naming a parameter.
        """
        if not self.zero.partitioned or self._stepped:
            return
        with self.guard.opened():
            found = next((p for p in self.fragments.parameters() if p.grad is not None), None)
        if found is not None:
            raise OrderError(
                f"{self.guard.name(found)} has a gradient that did not come from lite.backward(), and strategy "
                "'deepspeed' steps with those alone: call lite.backward(loss), or use strategy='ddp'."
            )

    def values(self) -> dict[int, Tensor]:
        trained = {id(p): self.fragments.full(p) for p in self.fragments.parameters()}
        return {**super().values(), **trained}

    def close(self) -> None:
        self.guard.unlock()
        for handle in self._handles:
            handle.remove()
        with self.borrowed.lent():
            super().close()
        self.borrowed.close()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _copied(parameter: nn.Parameter) -> Tensor:
    with gathered(parameter) as full:
        return full.clone()
