"""The checkpoints of a run in one folder: saved when due, kept while worth it, and gone on from."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from plugframe.adopt.optimizer import resumed_at
from plugframe.base.telling import warn_caller
from plugframe.checkpoint.atomic import remove_leftovers
from plugframe.errors import CheckpointCorruptError, CheckpointError, PlugframeError, SettingError
from plugframe.session import Session

_NAME = re.compile(r"step-(\d{12})\.ckpt")
_DRAFT = re.compile(r"\.(step-\d{12}\.ckpt)\.tmp-[0-9a-f]{16}")


class Checkpoints:
    """Made by ``lite.checkpoints(folder, …)``, which says what its settings mean. Every rank must make every call.

    Attributes:
        folder: where they lie, one path each: ``step-000000001200.ckpt``.
        step: that of the checkpoint `resume` went on from; 0 before, and for a new run.
    """

    def __init__(
        self,
        session: Session,
        folder: str,
        *,
        save: Callable[..., Any],
        load: Callable[..., Any],
        keep_last: int | None,
        keep_best: tuple[str, str, int] | None,
        every_s: float | None,
    ) -> None:
        _check(keep_last, keep_best, every_s)
        self.folder = folder
        self.step = 0
        self._session = session
        self._save, self._load = save, load
        self._keep_last, self._keep_best, self._every_s = keep_last, keep_best, every_s
        self._saved_at: float | None = None
        self._pending = ""

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
        wait: bool = True,
    ) -> bool:
        """Save `state` as that of `step` if it is due, and remove what is no longer kept. Every rank must call it.

        Args:
            step: a whole number from 0 on; a later checkpoint has a greater one.
            metrics: what ``keep_best`` may compare, equal on all ranks.
            force: save also where ``every_s`` has not passed since the last one: before the program ends, say.
            wait: False lets the loop go on while the checkpoint is written, where the format can.

        Returns:
            Whether it was saved, the same on all ranks.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**12:
            raise SettingError(f"step={step!r} of a checkpoint must be a whole number from 0 on.")
        told = {name: float(value) for name, value in (metrics or {}).items()}
        if metrics is not None and self._keep_best is not None and self._keep_best[0] not in told:
            raise SettingError(
                f"keep_best compares {self._keep_best[0]!r}, and metrics= has "
                f"{', '.join(map(repr, told)) or 'nothing'}."
            )
        if not force and not self._due():
            return False
        self._saved_at = time.monotonic()
        name = f"step-{step:012d}.ckpt"
        handle = self._save(self._at(name), state, info={"step": step, "metrics": told}, wait=wait)
        if self._session.plan.simulated:
            return True  # nothing was written, so nothing has become too much
        # A checkpoint that is still being written counts from the next save on, which waits for it.
        self._pending = name if handle is not None else ""
        self._agreed(self._prune)
        return True

    def latest(self) -> str | None:
        """Return the path of the newest checkpoint, None if there is none. Every rank must call it."""
        names = self._agreed(self._names)
        return self._at(names[-1]) if names else None

    def best(self) -> str | None:
        """Return the path of the best checkpoint by ``keep_best``, None if none has that metric.

        Every rank must call it.
        """
        if self._keep_best is None:
            raise SettingError("best() compares by keep_best=('val_loss', 'min', 1), say, which was not given.")
        names = self._agreed(self._ranked)
        return self._at(names[0]) if names else None

    def resume(self, state: dict[str, Any], *, strict: bool = True) -> bool:
        """Put the newest whole checkpoint into `state`, if there is any. Every rank must call it.

        A damaged one is set aside as ``damaged-…`` and told of, and the one before it is taken. One that was never
        finished, because its save was killed, is removed and told of.

        Returns:
            Whether a checkpoint was loaded; `step` is its step then.

        Raises:
            CheckpointError: if there are checkpoints and all of them are damaged.
            CheckpointMismatchError: if the newest whole one does not fit `state`.
        """
        num_damaged = 0
        for name in reversed(self._agreed(self._names)):
            try:
                self._agreed(functools.partial(self._check_step, name))
                self._load(self._at(name), state, strict=strict)
            except CheckpointError as error:
                if _is_unfinished(error):
                    what, act = "removed", self._remove
                elif isinstance(error, CheckpointCorruptError):
                    what, act = "set aside", self._set_aside
                    num_damaged += 1
                else:
                    raise
                self._agreed(functools.partial(act, name))
                if self._session.world.global_rank == 0:
                    text = f"{error} It is {what}, and the one before it taken."
                    warn_caller(text)
                continue
            self.step = int(_step(name))
            for value in state.values():
                resumed_at(value, self.step)
            return True
        if num_damaged:
            raise CheckpointError(
                f"All {num_damaged} checkpoints in {self.folder} are damaged and set aside: remove them to start anew."
            )
        return False

    def _at(self, name: str) -> str:
        """Return the path of something in the folder, which may be at a URL."""
        return f"{self.folder.rstrip('/')}/{name}" if "://" in self.folder else os.path.join(self.folder, name)

    # ------------------------------------------------------------------ on rank 0, for all

    def _agreed(self, look: Callable[[], Any]) -> Any:
        """Return what `look` finds on rank 0: what is in the folder may change between two looks."""
        found: Any = None
        if self._session.world.global_rank == 0:
            try:
                found = look()
            except PlugframeError as error:
                found = error
        found = self._session.hooks.collective_broadcast_object(obj=found, src=0, group=None)
        if isinstance(found, PlugframeError):
            raise found
        return found

    def _due(self) -> bool:
        if self._every_s is None:
            return True
        since = time.monotonic() - self._saved_at if self._saved_at is not None else None
        return bool(self._agreed(lambda: since is None or since >= (self._every_s or 0.0)))

    def _names(self) -> list[str]:
        names: list[str] = self._session.hooks.checkpoint_list(folder=self.folder)
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _whole(self) -> list[str]:
        return [name for name in self._names() if name != self._pending]

    def _ranked(self) -> list[str]:
        """Return the checkpoints that have the metric, the best first, of equal ones the newest."""
        assert self._keep_best is not None
        metric, direction, _ = self._keep_best
        sign = 1.0 if direction == "min" else -1.0
        found = []
        for name in self._whole():
            try:
                info = self._session.plugins["checkpoint"].inspect(self._at(name)).info
            except CheckpointError:
                continue  # damaged: it is told of when it is loaded
            value = info.get("metrics", {}).get(metric)
            if value is not None and value == value:  # not a NaN, which is no best of anything
                found.append((sign * value, -_step(name), name))
        return [name for *_, name in sorted(found)]

    def _check_step(self, name: str) -> None:
        """Refuse a checkpoint that was saved as that of another step: it took another's place."""
        try:
            info = self._session.plugins["checkpoint"].inspect(self._at(name)).info
        except PlugframeError:
            return  # what is wrong with it, if anything is, loading it tells
        if info.get("step", _step(name)) != _step(name):
            raise CheckpointCorruptError(
                f"{self._at(name)} has the wrong name: expected the checkpoint of step {_step(name)}, found that of "
                f"step {info['step']}."
            )

    def _prune(self) -> None:
        names = self._whole()
        kept = set(names if self._keep_last is None else names[-self._keep_last :])
        if self._keep_best is not None:
            kept.update(self._ranked()[: self._keep_best[2]])
        for name in names:
            if name not in kept:
                self._remove(name)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what saves and removals that were killed left beside the checkpoints."""
        if "://" in self.folder:
            return  # where nothing lies beside them
        for name in self._session.hooks.checkpoint_list(folder=self.folder):
            draft = _DRAFT.fullmatch(name)
            if draft is not None and draft[1] != self._pending:
                remove_leftovers(self._at(draft[1]))

    def _remove(self, name: str) -> None:
        self._session.hooks.checkpoint_remove(path=self._at(name))

    def _set_aside(self, name: str) -> None:
        self._session.hooks.checkpoint_move(path=self._at(name), target=self._at(f"damaged-{name}"))


def _check(keep_last: Any, keep_best: Any, every_s: Any) -> None:
    if keep_last is not None and (isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1):
        raise SettingError(f"keep_last={keep_last!r} must be a whole number from 1 on, or None for all.")
    if every_s is not None and (isinstance(every_s, bool) or not isinstance(every_s, (int, float)) or every_s <= 0):
        raise SettingError(f"every_s={every_s!r} must be a number of seconds above 0, or None.")
    if keep_best is None:
        return
    whole = isinstance(keep_best, tuple) and len(keep_best) == 3 and isinstance(keep_best[0], str)
    if not whole or keep_best[1] not in ("min", "max") or not isinstance(keep_best[2], int) or keep_best[2] < 1:
        raise SettingError(
            f"keep_best={keep_best!r} must name a metric, 'min' or 'max', and how many: ('val_loss', 'min', 1)."
        )


def _step(name: str) -> int:
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1])


def _is_unfinished(error: CheckpointError) -> bool:
    """Say whether a checkpoint lacks what is written last; the ranks agree on a text, not on a type."""
    return "is not complete" in str(error)
