"""What the strategy keeps beside a module: DeepSpeed's engine over a shim, driven step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import ForwardShim
from plugframe.errors import OrderError, UnsupportedError
from plugframe_builtins.ddp.engine import Registrations
from plugframe_builtins.deepspeed.agreement import Agreement
from plugframe_builtins.deepspeed.fragments import Fragments, Sum, gathered
from plugframe_builtins.deepspeed.guard import Guard, is_guarded
from plugframe_builtins.deepspeed.marks import forget_shim
from plugframe_builtins.deepspeed.trial import own_lists
from plugframe_builtins.deepspeed.walk import Walk
from plugframe_builtins.deepspeed.zero import Stage0, zero_of

Group = dict[str, Any]
_LOOK = attrgetter("requires_grad", "dtype")


class Borrowed:
    """An optimizer whose groups hold the user's parameters, and DeepSpeed's only while DeepSpeed is at work.

    Hyper-parameters are one: what a scheduler or the script writes into a group holds for DeepSpeed's as well.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._number = len(optimizer.param_groups)
        # DeepSpeed cannot have a group without anything to train.
        self.used = [n for n, g in enumerate(optimizer.param_groups) if any(p.requires_grad for p in g["params"])]
        self._theirs: list[Group] = [
            {**g, "params": list(g["params"])} for n, g in enumerate(optimizer.param_groups) if n in self.used
        ]
        self._state: Any = type(optimizer.state)(*([dict] if hasattr(optimizer.state, "default_factory") else []))
        self._lists = [(own, list(own)) for own in own_lists(optimizer)]
        self._handles = [optimizer.register_step_pre_hook(self._point)] if self._lists else []

    def _point(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Put what DeepSpeed has in the groups now into lists of the optimizer's own."""
        for own, _ in self._lists:
            own[:] = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let DeepSpeed see its own groups and state in the optimizer."""
        optimizer = self.optimizer
        groups, state = optimizer.param_groups, optimizer.state
        all_of_them = list(groups)
        mine = [groups[number] for number in self.used]
        _copy_settings(mine, self._theirs)
        # In place: an optimizer inside this one may have the same list.
        groups[:] = self._theirs
        optimizer.state = self._state
        try:
            yield
        finally:
            self._theirs, self._state = list(optimizer.param_groups), optimizer.state
            groups[:] = all_of_them
            optimizer.param_groups, optimizer.state = groups, state
            _copy_settings(self._theirs, mine)
            for own, before in self._lists:
                own[:] = before

    def refuse_states(self) -> None:
        """Have ``state_dict()`` and ``load_state_dict()`` refuse, as the state is in shards, by flat tensor."""
        name = type(self.optimizer).__name__

        def refuse_saving(optimizer: Optimizer) -> None:
            raise UnsupportedError(
                f"{name}.state_dict() under strategy 'deepspeed' would hold no state: DeepSpeed keeps it. "
                "Save it with lite.save(path, {'optimizer': optimizer}) on every rank."
            )

        def refuse_loading(optimizer: Optimizer, state: Any) -> None:
            raise UnsupportedError(
                f"{name}.load_state_dict() under strategy 'deepspeed' would not reach the shards of the state: call it "
                "before lite.setup(), or use lite.load()."
            )

        for way in ("__reduce_ex__", "__deepcopy__"):
            vars(self.optimizer)[way] = lambda _: refuse_saving(self.optimizer)
        if not hasattr(self.optimizer, "_optimizer_state_dict_pre_hooks"):
            return  # it has not called torch's __init__, and has a way of its own
        self._handles.append(self.optimizer.register_state_dict_pre_hook(refuse_saving))
        self._handles.append(self.optimizer.register_load_state_dict_pre_hook(refuse_loading))

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Refuse groups that were added later.

        Raises:
            UnsupportedError: saying when to add them.
        """
        number = len(self.optimizer.param_groups)
        if number != self._number:
            raise UnsupportedError(
                f"This {type(self.optimizer).__name__} has {number} parameter groups, and had {self._number} when it "
                "was set up: strategy 'deepspeed' takes no groups afterwards. Add them before lite.setup()."
            )

    @property
    def state(self) -> Any:
        """DeepSpeed's state, by flat tensor."""
        return self._state


def _copy_settings(source: Sequence[Group], target: Sequence[Group]) -> None:
    for theirs, mine in zip(source, target, strict=True):
        mine.update({key: value for key, value in theirs.items() if key != "params"})


class Reader:
    """``reader(call, *args)`` runs ``call(*args)`` on a module in parts, for its result alone.

    Args:
        module: the user's.
        initialize: ``initialize(shim)`` returns DeepSpeed's engine.
        guard: of the module's parameters; open while it runs.
        agreement: verifies that ranks that train run the same parts; None if there is one rank.

    Attributes:
        deepspeed: DeepSpeed's engine.
        walk: of the last forward, None where parameters are whole.
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
        """Return the values of all parameters in parts, by id. Every rank must call it."""
        return {id(p): _copied(p) for p in self.module.parameters() if hasattr(p, "ds_id")}

    def close(self) -> None:
        """Take away DeepSpeed's hooks."""
        if self.walk is not None:
            self.walk.close()
        self.deepspeed.destroy()
        forget_shim(self._shim)


class Engine(Reader):
    """``engine(call, *args)`` runs ``call(*args)`` so that `before_backward` and `step` find what they need.

    Args:
        module: the user's.
        borrowed: its optimizer.
        initialize: ``initialize(shim, optimizer)`` returns DeepSpeed's engine.
        add_up: adds a tensor up over all ranks.
        guard: of the module's parameters.
        agreement: as of `Reader`.
        registrations: counts what is registered in any module.

    Attributes:
        zero: DeepSpeed's optimizer.
        pending: whether there are gradients that no step has used.
        stale_buffers: whether a forward may have changed the buffers since they were equal.
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
        self._touched: set[int] = set()
        before = [{"params": list(borrowed.optimizer.param_groups[number]["params"])} for number in borrowed.used]
        # Ahead of DeepSpeed's own hooks, which take gradients away.
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
        self._has_buffers = any(True for _ in module.buffers())
        self._names, self._parameters = zip(*module.named_parameters(), strict=True)
        self._looks = tuple(map(_LOOK, self._parameters))
        self._places = [(p, p.data_ptr(), p.data) for p in trained] if self.zero.views else []
        borrowed.refuse_states()
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

    def _check_registered(self) -> None:
        """Refuse parameters that DeepSpeed has never seen.

        Raises:
            UnsupportedError: naming one.
        """
        known = set(map(id, self._parameters))
        # A model that was set up by itself has an engine that has seen them.
        new = {n: p for n, p in self.module.named_parameters() if id(p) not in known and not is_guarded(p)}
        # In stage 3 DeepSpeed walks over frozen ones too.
        name = next((name for name, p in new.items() if p.requires_grad or self.walk is not None), None)
        if name is not None:
            raise UnsupportedError(
                f"Parameter {name!r} was added or replaced after lite.setup(), and strategy 'deepspeed' would neither "
                "average its gradient nor update it: change the model before lite.setup()."
            )
        self._strangers = bool(new)
        self._registered = self._registrations.count

    def relink(self) -> None:
        """Put values that the script has assigned as ``parameter.data`` where DeepSpeed looks for them.

        Raises:
            UnsupportedError: if they have another shape or dtype.
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
        """Say whether `optimizer` is the engine's."""
        return self.borrowed.optimizer is optimizer

    # ------------------------------------------------------------------ gradients

    def before_backward(self) -> None:
        """Get ready for a backward that may come to the model."""
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
        """Take in what the backward has brought.

        Args:
            averages: whether gradients that every rank holds whole are averaged at once.
        """
        self._works = False
        if self.walk is not None:
            self.walk.works = False
        if self._touched:
            self._check_looks()
            self._mixed = self._mixed or self._stepped
            self.pending, self._finished = True, False
            with self.borrowed.lent():
                self.zero.epilogue(self._touched)
                if not self.zero.partitioned and averages:
                    # What is equal on all ranks stays what it is when it is averaged again.
                    self.zero.finish()
        self._show()

    def _show(self) -> None:
        """Say whether there are gradients that the parameters do not show."""
        if self.zero.partitioned:
            if self.pending and not self.guard.pending:
                self.guard.seen = False
            self.guard.holds, self.guard.pending = self.pending or self._stepped, self.pending
        self.guard.lock()

    def _settle(self) -> None:
        """Forget what the script has set to None by hand."""
        if self.pending and self.guard.settled(self.fragments.parameters()):
            self.clear()
        elif self._stepped and self.guard.seen:
            self._stepped = False  # it keeps gradients by itself
        self.guard.forgotten.clear()

    def _touch(self, parameter: Tensor) -> None:
        self._touched.add(id(parameter))
        if not self.zero.partitioned:
            return
        if not self._works:
            raise OrderError(
                f"A backward outside of lite.backward() has come to {self.guard.name(parameter)}, whose gradient "
                "strategy 'deepspeed' would lose: call lite.backward(loss)."
            )
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UnsupportedError(
                f"{self.guard.name(parameter)} has a sparse gradient, and strategy 'deepspeed' averages dense ones "
                "alone: use sparse=False, or strategy='ddp'."
            )

    def finish(self) -> None:
        """Average what has come together, if that was not done."""
        self._settle()
        if self.pending and not self._finished:
            self._finished = True
            self.guard.unlock()
            with self.borrowed.lent():
                self.zero.finish()
            self.guard.lock()

    def clear(self) -> None:
        """Forget all gradients."""
        self.guard.forgotten.clear()
        self._stepped = self._mixed = False
        if self.pending:
            self.pending = self._finished = False
            self.guard.unlock()
            with self.borrowed.lent():
                self.zero.clear()
        self._show()

    def step(self) -> bool:
        """Update the parameters, and say whether it was done; it is not with gradients that are not finite."""
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
        if self.walk is not None:
            self.walk.end()
        self.finish()
        self.guard.unlock()
        self.relink()
        self.zero.follow()
        with self.borrowed.lent():
            self.deepspeed.step()
        self.pending = self._finished = False
        self._stepped = self.zero.partitioned
        self.guard.seen = False
        self._show()
        return bool(self.deepspeed.was_step_applied())

    def _check_unseen(self) -> None:
        """Refuse a step on gradients that are the script's own.

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
        trained = {id(p): self.fragments.whole(p) for p in self.fragments.parameters()}
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
    with gathered(parameter) as whole:
        return whole.clone()
