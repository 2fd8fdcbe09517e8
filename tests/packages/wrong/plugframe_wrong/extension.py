"""Extensions that break one rule each."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import Extension
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class Right(Extension):
    """Counts backwards; breaks no rule."""

    count = 0

    @hookimpl(wrapper=True)
    def strategy_backward(self) -> Any:
        self.count += 1
        return (yield)

    @hookimpl(wrapper=True)
    def precision_forward_context(self) -> Any:
        return (yield)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Provides(Right):
    """Answers a hook in the place of its provider."""

    @hookimpl
    def collective_barrier(self, name: str) -> None:
        pass


class Repeats(Right):
    """Makes every all_reduce twice."""

    context: Context | None = None
    inside = False

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self.context = context

    @hookimpl(wrapper=True)
    def collective_all_reduce(self, tensor: Tensor, op: str, group: Any) -> Any:
        if self.context is not None and not self.inside:
            self.inside = True
            self.context.hooks.collective_all_reduce(tensor=tensor, op=op, group=group)
            self.inside = False
        return (yield)


class Forgets(Right):
    """Forgets to give back what the hook gave."""

    @hookimpl(wrapper=True)
    def accelerator_rng_state(self) -> Any:
        yield


class Swallows(Right):
    """Carries on after an error."""

    @hookimpl(wrapper=True)
    def checkpoint_load(self) -> Any:
        try:
            return (yield)
        except Exception:  # noqa: BLE001
            return None


class Nudges(Right):
    """Adds a little to the weights."""

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1e-3)


class OnceOnly(Right):
    """Serves one run."""

    launched = False

    @hookimpl
    def on_launch(self, context: Context) -> None:
        if self.launched:
            raise RuntimeError("launched already")
        self.launched = True


class Leaves(Right):
    """Sets a variable and leaves it."""

    @hookimpl
    def on_backward(self, loss: Tensor) -> None:
        os.environ["WRONG_EXTENSION"] = "was here"


class Amnesia(Right):
    """Takes no state back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Counts(Extension):
    """Counts backwards, and keeps the count in checkpoints; breaks no rule."""

    count = 0
    rank = 0

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self.rank = context.world.global_rank

    @hookimpl
    def on_backward(self) -> None:
        self.count += 1

    @hookimpl
    def skip_optimizer_step(self) -> bool:
        return False

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": torch.full((2,), float(self.count))}

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Unloaded(Counts):
    """Takes no state back."""

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        pass


class Grows(Counts):
    """Never counts back."""

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        self.count = max(self.count, state["count"])


class Objects(Counts):
    """Saves an object."""

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return {"count": self.count, "self": self}


class Differs(Counts):
    """Saves a tensor that differs between ranks."""

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return {"count": self.count, "rank": torch.tensor(self.rank)}


class Skips(Counts):
    """Leaves out healthy steps."""

    @hookimpl
    def skip_optimizer_step(self) -> bool:
        return self.count % 3 == 0
