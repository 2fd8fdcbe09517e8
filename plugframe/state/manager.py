"""Manage the checkpoints of a run in one folder: save when due, remove old ones, resume."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from plugframe.adopt.optimizer import set_num_steps
from plugframe.checkpoint.error_codes import Packed, pack_error, unpack_error
from plugframe.core.runtime.session import Session
from plugframe.errors import CheckpointCorruptError, CheckpointError, PlugframeError, SettingError
from plugframe.state.run_folder import RunFolder, name_of, step_of
from plugframe.utils.logging import warn_caller


class CheckpointManager:
    """Manages the checkpoints of a run; returned by ``lite.checkpoints(folder, …)``. Every rank must make every call.

    Attributes:
        folder: folder of the checkpoints, which are named like ``step-000000001200.ckpt``.
        step: step of the checkpoint that `resume` loaded; 0 before, and for a new run.
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
        self._keep_best, self._every_s = keep_best, every_s
        self._saved_at: float | None = None
        self._files = RunFolder(session, folder, keep_last=keep_last, keep_best=keep_best)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
        wait: bool = True,
    ) -> bool:
        """Save `state` if a checkpoint is due, and remove old checkpoints. Every rank must call it.

        Args:
            step: an integer of at least 0, increasing from checkpoint to checkpoint.
            metrics: values for ``keep_best``, equal on all ranks.
            force: save even if ``every_s`` has not passed since the last checkpoint, for example at the end.
            wait: False returns while the checkpoint is written in the background, if the format supports it.

        Returns:
            Whether it was saved, the same on all ranks.

        Raises:
            CheckpointError: if saving failed, or if another job saves into this folder; nothing is written then.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**12:
            raise SettingError(f"step={step!r} of a checkpoint must be an integer of at least 0.")
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if metrics is not None and self._keep_best is not None and self._keep_best[0] not in values:
            raise SettingError(
                f"keep_best compares {self._keep_best[0]!r}, and metrics= has "
                f"{', '.join(map(repr, values)) or 'nothing'}."
            )
        if not self._on_rank_0(functools.partial(self._may_save, force)):
            return False
        self._saved_at = time.monotonic()
        name = name_of(step)
        handle = self._save(self._files.at(name), state, info={"step": step, "metrics": values}, wait=wait)
        if self._session.plan.simulated:
            return True  # nothing was written, so nothing is to be removed
        # A checkpoint that is still being written counts from the next save on, which waits for it.
        self._files.pending = name if handle is not None else ""
        problem = self._on_rank_0(functools.partial(self._files.prune, name))
        if problem:
            self._warn(problem)
        return True

    def latest(self) -> str | None:
        """Return the path of the newest checkpoint, None if there is none. Every rank must call it."""
        name = self._on_rank_0(self._files.newest)
        return self._files.at(name) if name else None

    def best(self) -> str | None:
        """Return the path of the best checkpoint by ``keep_best``, None if none has that metric.

        Every rank must call it.
        """
        if self._keep_best is None:
            raise SettingError("best() needs keep_best=, for example keep_best=('val_loss', 'min', 1).")
        names = self._on_rank_0(self._files.ranked)
        return self._files.at(names[0]) if names else None

    def resume(self, state: dict[str, Any], *, strict: bool = True, rng: bool = True) -> bool:
        """Load the newest intact checkpoint into `state`, if there is one. Every rank must call it.

        A damaged checkpoint is renamed to ``damaged-…`` with a warning, and the one before it is loaded. Files of a
        save that was killed before it wrote a manifest are removed with a warning; nothing else is ever removed. While
        another job saves into the folder, both are skipped and remain.

        Args:
            rng: whether to restore the random generators; see ``lite.load``.

        Returns:
            Whether a checkpoint was loaded; `step` is its step then.

        Raises:
            CheckpointError: if there are checkpoints and all of them are damaged.
            CheckpointMismatchError: if the newest intact one does not match `state`.
        """
        try:
            return self._resume(state, strict=strict, rng=rng)
        finally:
            if not self._files.saves:
                self._files.lock.release()  # a job that only reads does not block others

    def _resume(self, state: dict[str, Any], *, strict: bool, rng: bool) -> bool:
        num_damaged = 0
        names, exclusive, warning = self._on_rank_0(self._files.scan)
        if warning:
            self._warn(warning)
        for name in reversed(names):
            if self._on_rank_0(functools.partial(self._files.is_unfinished, name)):
                done, text = self._on_rank_0(functools.partial(self._files.remove_unfinished, name, exclusive))
                self._warn(f"{text} It is {done}, and the checkpoint before it is loaded.")
                continue
            try:
                self._on_rank_0(functools.partial(self._files.check_info, name))
                self._load(self._files.at(name), state, strict=strict, rng=rng)
            except CheckpointCorruptError as error:
                num_damaged += 1
                done = self._on_rank_0(functools.partial(self._files.rename_damaged, name, exclusive))
                self._warn(f"{error} It is {done}, and the checkpoint before it is loaded.")
                continue
            self.step = step_of(name)
            for value in state.values():
                set_num_steps(value, self.step)
            return True
        if num_damaged:
            raise CheckpointError(
                f"All {num_damaged} checkpoints in {self.folder} are damaged and renamed to damaged-…: "
                "remove them to start over."
            )
        return False

    def _warn(self, text: str) -> None:
        if self._session.world.global_rank == 0:
            warn_caller(text)

    # ------------------------------------------------------------------ on rank 0

    def _on_rank_0(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 and return its result on all ranks: ranks may see different files."""
        result: Any = None
        packed: Packed = None
        failure: PlugframeError | None = None
        if self._session.world.global_rank == 0:
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 the other ranks wait for the result
                failure, packed = self._convert_error(error)
        result, packed = self._session.hooks.collective_broadcast_object(obj=(result, packed), src=0, group=None)
        if packed is not None:
            raise failure or unpack_error(packed)
        return result

    def _convert_error(self, error: Exception) -> tuple[PlugframeError, Packed]:
        """Return the error for rank 0, and its packed form for the others."""
        if isinstance(error, CheckpointError):
            return error, pack_error(error)
        if isinstance(error, PlugframeError):
            return error, pack_error(CheckpointError(str(error)))
        failure = CheckpointError(f"cannot manage the checkpoints in {self.folder}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure, pack_error(failure)

    def _may_save(self, force: bool) -> bool:
        """Return whether a checkpoint is due; lock the folder if so.

        Raises:
            CheckpointError: if another job has locked it.
        """
        since = None if self._saved_at is None else time.monotonic() - self._saved_at
        if not force and since is not None and self._every_s is not None and since < self._every_s:
            return False
        if not self._files.acquire(make=True):
            owner = self._files.lock.owner()
            raise CheckpointError(
                f"lite.checkpoints({self.folder!r}): another job ({owner}) saves into this folder, and "
                "nothing was written: give each job its own folder, or end the other one."
            )
        return True


def _check(keep_last: Any, keep_best: Any, every_s: Any) -> None:
    if keep_last is not None and (isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1):
        raise SettingError(f"keep_last={keep_last!r} must be an integer of at least 1, or None for all.")
    if every_s is not None and (isinstance(every_s, bool) or not isinstance(every_s, (int, float)) or every_s <= 0):
        raise SettingError(f"every_s={every_s!r} must be a number of seconds above 0, or None.")
    if keep_best is None:
        return
    valid = isinstance(keep_best, tuple) and len(keep_best) == 3 and isinstance(keep_best[0], str)
    if not valid or keep_best[1] not in ("min", "max") or not isinstance(keep_best[2], int) or keep_best[2] < 1:
        raise SettingError(
            f"keep_best={keep_best!r} must be (metric, 'min' or 'max', number to keep), such as ('val_loss', 'min', 1)."
        )
