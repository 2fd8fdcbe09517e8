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
from plugframe.errors import UnsupportedError
from plugframe_builtins.deepspeed.fragments import Fragments, Sum, gathered
from plugframe_builtins.deepspeed.marks import forget_shim
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

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let DeepSpeed see its own groups and state in the optimizer."""
        optimizer = self.optimizer
        groups, state = optimizer.param_groups, optimizer.state
        mine = [groups[number] for number in self.used]
        _copy_settings(mine, self._theirs)
        optimizer.param_groups, optimizer.state = self._theirs, self._state
        try:
            yield
        finally:
            self._theirs, self._state = optimizer.param_groups, optimizer.state
            optimizer.param_groups, optimizer.state = groups, state
            _copy_settings(self._theirs, mine)

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

    Attributes:
        deepspeed: DeepSpeed's engine.
        walk: of the last forward, None where parameters are whole.
    """

    def __init__(self, module: nn.Module, initialize: Callable[[nn.Module], Any]) -> None:
        self.module = module
        self._shim = ForwardShim(module)
        self.deepspeed: Any = initialize(self._shim)
        offload = self.deepspeed.optimizer
        offload = getattr(offload, "parameter_offload", offload)
        shards = hasattr(offload, "pre_sub_module_forward_function")
        self.walk: Walk | None = Walk(self._shim, offload) if shards else None

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._shim(call, *args, **kwargs)

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
    ) -> None:
        self.borrowed = borrowed
        self.pending = self.stale_buffers = False
        self._finished = self._touched = False
        before = [{"params": list(borrowed.optimizer.param_groups[number]["params"])} for number in borrowed.used]
        with borrowed.lent():
            super().__init__(module, lambda shim: initialize(shim, borrowed.optimizer))
        self.zero: Stage0 = zero_of(self.deepspeed)
        self.fragments = Fragments(add_up if self.zero.partitioned else _itself)
        self.zero.locate(before, self.fragments)
        trained: list[Any] = self.fragments.parameters()
        self._handles = [parameter.register_post_accumulate_grad_hook(self._touch) for parameter in trained]
        self._has_buffers = any(True for _ in module.buffers())
        self._names, self._parameters = zip(*module.named_parameters(), strict=True)
        self._looks = tuple(map(_LOOK, self._parameters))

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.stale_buffers = self._has_buffers
            self._check_looks()
        return super().__call__(call, *args, **kwargs)

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
        if not self.pending:
            self.zero.begin()
        elif self._finished:
            self.zero.resume()
        self._touched = False
        self.zero.prologue()

    def after_backward(self, *, averages: bool) -> None:
        """Take in what the backward has brought.

        Args:
            averages: whether gradients that every rank holds whole are averaged at once.
        """
        if not self._touched:
            return
        self.pending, self._finished = True, False
        with self.borrowed.lent():
            self.zero.epilogue()
            if not self.zero.partitioned and averages:
                # What is equal on all ranks stays what it is when it is averaged again.
                self.zero.finish()

    def _touch(self, parameter: Tensor) -> None:
        self._touched = True

    def finish(self) -> None:
        """Average what has come together, if that was not done."""
        if self.pending and not self._finished:
            self._finished = True
            with self.borrowed.lent():
                self.zero.finish()

    def clear(self) -> None:
        """Forget all gradients."""
        if self.pending:
            self.pending = self._finished = False
            with self.borrowed.lent():
                self.zero.clear()

    def step(self) -> bool:
        """Update the parameters, and say whether it was done; it is not with gradients that are not finite."""
        self.borrowed.check()
        if not self.pending:
            return True
        self.finish()
        with self.borrowed.lent():
            self.deepspeed.step()
        self.pending = self._finished = False
        return bool(self.deepspeed.was_step_applied())

    def values(self) -> dict[int, Tensor]:
        trained = {id(p): self.fragments.whole(p) for p in self.fragments.parameters()}
        return {**super().values(), **trained}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        with self.borrowed.lent():
            super().close()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _copied(parameter: nn.Parameter) -> Tensor:
    with gathered(parameter) as whole:
        return whole.clone()
