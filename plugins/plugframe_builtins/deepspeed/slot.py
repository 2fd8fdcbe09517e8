"""The engine slot of a module: DeepSpeed's engine once there is an optimizer, and a substitute before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.errors import OrderError
from plugframe_builtins._shared.data_parallel.engine import Engine as Replica
from plugframe_builtins.deepspeed.engine import Engine, Reader
from plugframe_builtins.deepspeed.guard import Guard
from plugframe_builtins.deepspeed.marks import Marks
from plugframe_builtins.deepspeed.partition import Pieces


class Slot:
    """Run ``call(*args)`` as ``slot(call, *args)``, under DeepSpeed if there is an optimizer.

    A module without an optimizer is not sharded by DeepSpeed; its gradients, if any,
    are averaged as under ``ddp``. If its parameters are sharded already, it only evaluates.

    Args:
        module: the user's module.
        replicate: makes an engine that averages the gradients of a module without optimizer.
        read: makes a reader of a sharded module without optimizer.
        announce: called before an evaluation forward if parameters are sharded.

    Attributes:
        engine: DeepSpeed's, once the module has an optimizer.
        guard: of the module's parameters, once DeepSpeed keeps them or their gradients.
        pieces: this rank's elements before rounding; None if parameters are not sharded.
        number: index among the models whose forward needs all ranks.
        averages: whether backwards average replicated gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        replicate: Callable[[nn.Module], Replica],
        read: Callable[[nn.Module, Guard], Reader],
        announce: Callable[[Slot], None],
    ) -> None:
        self.module = module
        self.marks = Marks(module)
        self.engine: Engine | None = None
        self.guard: Guard | None = None
        self.pieces: Pieces | None = None
        self.averages = True
        self.number = -1
        self._replicate = replicate
        self._replica: Replica | None = None
        self._read = read
        self._reader: Reader | None = None
        self._announce = announce

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        grows = torch.is_grad_enabled()
        if self.shards and not (grows and self.module.training):
            self._announce(self)
        if self.engine is not None:
            return self.engine(call, *args, **kwargs)
        trains = grows and any(parameter.requires_grad for parameter in self.module.parameters())
        if self.pieces is not None:
            return self._evaluate(trains, call, *args, **kwargs)
        if not trains:
            return call(*args, **kwargs)
        if self._replica is None:
            self._replica = self._replicate(self.module)
        with self._replica.synchronizing(self.averages):
            return self._replica(call, *args, **kwargs)

    def _evaluate(self, trains: bool, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if trains:
            raise OrderError(
                f"This {type(self.module).__name__} is sharded and has no optimizer: call lite.setup(model, "
                "optimizer), or run it under torch.no_grad()."
            )
        return self.reader(call, *args, **kwargs)

    @property
    def reader(self) -> Reader:
        """The reader of a sharded module without an optimizer."""
        if self._reader is None:
            assert self.guard is not None  # since the module was sharded
            with self.marks.watching(), self.guard.opened():
                self._reader = self._read(self.module, self.guard)
        return self._reader

    @property
    def shards(self) -> bool:
        """Whether a forward needs all ranks."""
        return self.pieces is not None or (self.engine is not None and self.engine.walk is not None)

    def help(self) -> None:
        """Gather the parameters that another rank's forward gathers."""
        walk = (self.reader if self.engine is None else self.engine).walk
        if walk is not None:
            walk.help()

    def order(self) -> Sequence[int]:
        """Return the order of modules in the last forward."""
        walk = (self.reader if self.engine is None else self.engine).walk
        return [] if walk is None else walk.order()

    def watch(self, stage: int) -> Guard:
        """Return a new guard of the module's current parameters."""
        if self.guard is not None:
            self.guard.close()
        self.guard = Guard(self.module, stage)
        return self.guard

    def drive(self, make: Callable[[Guard], Engine], stage: int) -> Engine:
        """Run the module under a new engine from now on."""
        if self.guard is not None:
            self.guard.close()
        if self._reader is not None:
            self._reader.close()
        self._reader = self._replica = None
        with self.marks.watching():
            self.engine = make(self.watch(stage))
        return self.engine

    def before_backward(self, loss: Tensor) -> None:
        """Prepare for a backward that may reach the module."""
        if self.engine is not None:
            self.engine.before_backward()
        elif self._replica is not None:
            self._replica.averages = self.averages
            self._replica.before_backward()

    def after_backward(self) -> None:
        """Record the gradients of the backward."""
        if self.engine is not None:
            self.engine.after_backward(averages=self.averages)

    def close(self, *, alone: bool) -> None:
        """Remove everything that DeepSpeed added to the module.

        Args:
            alone: whether this is the only rank, which holds all values.
        """
        with ExitStack() as stack:
            if self.guard is not None:
                self.guard.unlock()
            running = self._reader if self.engine is None else self.engine
            full_values = running.values() if alone and running is not None else self._empty()
            if running is not None or self.pieces is not None:
                stack.callback(self.marks.remove, full_values)
            if running is not None:
                running.close()
            if self.guard is not None:
                self.guard.close()
            self._reader = self._replica = None

    def _empty(self) -> dict[int, Tensor]:
        return {id(p): p.new_empty(0) for p in self.module.parameters() if hasattr(p, "ds_id")}
