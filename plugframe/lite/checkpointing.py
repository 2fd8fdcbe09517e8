"""Keeping state: save and load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from plugframe.adopt import state_of
from plugframe.hooks.checkpoint import SaveHandle
from plugframe.lite.core import Core
from plugframe.state import saving
from plugframe.state.full import whole_state
from plugframe.state.manager import CheckpointManager
from plugframe.state.parameter_names import Names, names_of
from plugframe.state.tree import Filter


class Keeping(Core):
    """What goes to disk and comes back."""

    def save(
        self,
        path: Any,
        state: Any,
        filter: Mapping[str, Filter] | None = None,
        *,
        wait: bool = True,
    ) -> SaveHandle | None:
        """Write `state` at `path`; a crash at any instant leaves what was there whole. Every rank must call it.

        Args:
            path: where; a mapping here and a path second (``torch.save``'s order) is understood too.
            state: objects with a ``state_dict``, tensors, plain values, and dicts and lists of those.
            filter: for a key of `state`, which entries of that object are saved: ``f(name, value) -> bool``.
            wait: False lets a checkpoint plugin that can save in the background.

        Raises:
            CheckpointError: on all ranks; what was at `path` before is still there.
        """
        self._started("save")
        return self._save(path, state, filter=filter, wait=wait)

    def _save(self, path: Any, state: Any, *, filter: Any = None, info: Any = None, wait: bool) -> SaveHandle | None:
        return saving.save(
            self._session,
            path,
            state,
            filters=filter,
            loaders=self._loaders,
            naming=self._naming,
            wait=wait,
            info=info,
        )

    def load(
        self,
        path: Any,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        trusted: bool = False,
        rng: bool = True,
    ) -> dict[str, Any]:
        """Put what lies at `path` into the objects of `state`, and its plain values into the dict itself.

        Every rank must call it. Everything is checked before the first value is written.

        Args:
            state: as it was given to `save`; None returns the content instead.
            strict: whether every key must be there and have a place.
            weights_only: taken for scripts that pass it, and without effect: only `trusted` lets a file run code.
            trusted: let a file or folder that another tool wrote with pickle run the code in it; never needed, and
                without effect, for what plugframe wrote.
            rng: whether to restore the states of the random generators. Those of another version of Python, NumPy or
                torch may not fit the generators here, and are refused; False goes on without them.

        Returns:
            What has no place in `state`.

        Raises:
            CheckpointCorruptError: if it is not what was written.
            CheckpointMismatchError: listing every missing and unexpected key and wrong shape.
        """
        self._started("load")
        return saving.load(
            self._session,
            path,
            state,
            strict=strict,
            loaders=self._loaders,
            naming=self._naming,
            trusted=trusted,
            rng=rng,
        )

    def state_dict(self, obj: nn.Module | Optimizer, *, all_ranks: bool = False) -> dict[str, Any]:
        """Return the state of a module or an optimizer as a plain process reads it. Every rank must call it.

        Under every strategy: complete tensors, copies on the CPU, under the user's own keys. It is what
        ``torch.save(lite.state_dict(model), path)`` may write on rank 0, and what ``load_state_dict`` of a plain
        module or optimizer takes.

        Args:
            all_ranks: whether every rank gets it; else ranks above 0 get an empty dict.

        Raises:
            SettingError: for another type of object.
        """
        self._started("state_dict")
        return whole_state(self._session, obj, all_ranks=all_ranks, naming=self._naming)

    def checkpoints(
        self,
        folder: Any,
        *,
        keep_last: int | None = 3,
        keep_best: tuple[str, str, int] | None = None,
        every_s: float | None = None,
    ) -> CheckpointManager:
        """Return a keeper of this run's checkpoints: what to save when, what to keep, where to go on from.

        ::

            kept = lite.checkpoints("runs/a", keep_last=3, keep_best=("val_loss", "min", 1), every_s=600)
            state = {"model": model, "optimizer": optimizer}
            kept.resume(state)                                   # the newest whole one, if there is any
            for step in range(kept.step + 1, steps + 1):
                ...
                kept.save(step, state, {"val_loss": loss}, force=lite.should_stop)

        Every rank must make every call of it.

        Args:
            folder: of the run; made when something is saved.
            keep_last: how many of the newest to keep; None keeps all.
            keep_best: a metric, ``"min"`` or ``"max"``, and how many of the best to keep besides.
            every_s: seconds that must have passed since the last one; None saves at every call.
        """
        self._started("checkpoints")
        return CheckpointManager(
            self._session,
            saving.checked_path(folder),
            save=self._save,
            load=self.load,
            keep_last=keep_last,
            keep_best=keep_best,
            every_s=every_s,
        )

    @property
    def should_stop(self) -> bool:
        """Whether any rank was sent SIGTERM or SIGUSR1: leave the loop, save and end. Every rank must ask.

        All ranks get the same answer at the same question, so that all leave the loop at the same batch. From the
        first question on these signals no longer end the process; SIGINT and SIGKILL do.
        """
        self._started("should_stop")
        return self._preemption.should_stop(self._hooks)

    def requeue(self) -> bool:
        """Have the scheduler start this job again once it ends; say whether there is one that can.

        Every rank must call it; one of them asks.
        """
        self._started("requeue")
        asked = self._hooks.environment_requeue() if self.is_global_zero else None
        return bool(self._hooks.collective_broadcast_object(obj=asked, src=0, group=None))

    def load_raw(
        self, path: Any, obj: Any, strict: bool = True, *, weights_only: bool | None = None, trusted: bool = False
    ) -> None:
        """Put the bare ``state_dict`` that lies at `path` into `obj`. Every rank must call it. See `load`."""
        self._started("load_raw")
        saving.load_raw(self._session, path, obj, strict=strict, naming=self._naming, trusted=trusted)

    def _naming(self, optimizer: Optimizer) -> Names | None:
        """Return the names of the optimizer's parameters: now, or when it was set up if the strategy hides them."""
        found = names_of(optimizer, self._living())
        return found or getattr(state_of(optimizer), "names", None)
