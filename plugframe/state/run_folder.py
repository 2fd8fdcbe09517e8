"""The folder of a run's checkpoints, as rank 0 sees it and changes it for all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from plugframe.checkpoint.atomic import remove_leftovers
from plugframe.checkpoint.lock import FolderLock
from plugframe.core.runtime.session import Session
from plugframe.errors import CheckpointCorruptError, CheckpointError, PlugframeError

_NAME = re.compile(r"step-(\d{12})\.ckpt")
_DRAFT = re.compile(r"\.(step-\d{12}\.ckpt)\.tmp-[0-9a-f]{16}")


class RunFolder:
    """What lies in a folder, which may be at a URL; rank 0 calls everything but `at`.

    Attributes:
        path: of the folder.
        pending: the name of a checkpoint that may still be written in the background; empty if there is none.
        lock: holds it for this job.
        saves: whether this job has begun to save into it.
    """

    def __init__(
        self, session: Session, path: str, *, keep_last: int | None, keep_best: tuple[str, str, int] | None
    ) -> None:
        self.path = path
        self.pending = ""
        self.lock = FolderLock(path)
        self.saves = False
        self._session = session
        self._keep_last, self._keep_best = keep_last, keep_best

    def at(self, name: str) -> str:
        """Return the path of something in the folder, which may be at a URL."""
        return f"{self.path.rstrip('/')}/{name}" if "://" in self.path else os.path.join(self.path, name)

    def hold(self, *, make: bool) -> bool:
        """Hold the folder for this job; say whether nobody else does. A URL cannot be held."""
        if "://" in self.path or self._session.plan.simulated:
            return True
        try:
            if make:
                os.makedirs(self.path, exist_ok=True)
            elif not os.path.isdir(self.path):
                return True
            if make and not self.saves:
                self.saves = True
                self._session.on_close(self.lock.release)
            return self.lock.take()
        except OSError as error:
            if make:
                raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}.") from error
            return False  # it can be read perhaps, and nothing in it be changed

    def look(self) -> tuple[list[str], bool, str]:
        """Return the names of the checkpoints, whether this job may change the folder, and what to say if not."""
        alone = self.hold(make=False)
        names = self._names()
        warning = ""
        if not alone and names:
            warning = (
                f"Another job ({self.lock.owner()}) saves into {self.path}: nothing in it is removed or set aside "
                "here, and save() is refused while that job runs."
            )
        return names, alone, warning

    def _names(self) -> list[str]:
        names: list[str] = self._session.hooks.checkpoint_list(folder=self.path)
        return sorted(name for name in names if _NAME.fullmatch(name))

    def newest(self) -> str | None:
        """Return the name of the newest checkpoint whose save has ended, None if there is none."""
        names = [name for name in self._names() if name != self.pending]
        return next((name for name in reversed(names) if not self.is_unfinished(name)), None)

    def _finished(self) -> list[str]:
        """Return the names of the checkpoints whose saves have ended."""
        return [name for name in self._names() if name != self.pending and not self.is_unfinished(name)]

    def is_unfinished(self, name: str) -> bool:
        """Say whether it is what a save left that never made a checkpoint of it."""
        # By what lies there, never by an error: this alone lets `resume` remove something.
        ask = getattr(self._session.plugins["checkpoint"], "unfinished", None)
        return ask is not None and ask(self.at(name)) is True

    def ranked(self) -> list[str]:
        """Return the checkpoints that have the metric, the best first, of equal ones the newest."""
        assert self._keep_best is not None
        metric, direction, _ = self._keep_best
        sign = 1.0 if direction == "min" else -1.0
        found = []
        for name in self._finished():
            try:
                info = self._session.plugins["checkpoint"].inspect(self.at(name)).info
                value = _metrics(info, self.at(name)).get(metric)
            except CheckpointError:
                continue  # damaged: reported when it is loaded
            if value is not None and value == value:  # not a NaN, which is no best of anything
                found.append((sign * value, -step_of(name), name))
        return [name for *_, name in sorted(found)]

    def check_info(self, name: str) -> None:
        """Refuse a checkpoint that was saved as that of another step: it took another's place."""
        try:
            info = self._session.plugins["checkpoint"].inspect(self.at(name)).info
        except PlugframeError:
            return  # what is wrong with it, if anything is, loading it tells
        _metrics(info, self.at(name))
        step = info.get("step", step_of(name))
        if step != step_of(name):
            shown = f"that of step {step}" if type(step) is int and step < 10**12 else "that of no step"
            raise CheckpointCorruptError(
                f"{self.at(name)} has the wrong name: expected the checkpoint of step {step_of(name)}, found {shown}."
            )

    def prune(self, saved: str) -> str:
        """Remove what is no longer kept; return what to say if that fails, since `saved` is there all the same."""
        try:
            if self._keep_last is not None:
                names = self._finished()
                kept = {saved, *names[-self._keep_last :]}
                if self._keep_best is not None:
                    kept.update(self.ranked()[: self._keep_best[2]])
                for name in names:
                    if name not in kept:
                        self._session.hooks.checkpoint_remove(path=self.at(name))
            self._sweep()
        except Exception as error:  # noqa: BLE001 whatever it is, the save has not failed
            return f"{self.at(saved)} is saved, but an older checkpoint that is no longer kept stays: {error}"
        return ""

    def _sweep(self) -> None:
        """Remove what saves and removals that were killed left beside the checkpoints."""
        if "://" in self.path:
            return  # where nothing lies beside them
        for name in self._session.hooks.checkpoint_list(folder=self.path):
            draft = _DRAFT.fullmatch(name)
            if draft is not None and draft[1] != self.pending:
                remove_leftovers(self.at(draft[1]))

    def remove_unfinished(self, name: str, alone: bool) -> tuple[str, str]:
        """Return what was done, and a text that says why."""
        text = f"{self.at(name)} is not complete."
        try:
            self._session.plugins["checkpoint"].inspect(self.at(name))
        except PlugframeError as error:
            text = str(error)
        # Asked again, at the last moment.
        if not alone or not self.is_unfinished(name):
            return "passed over", text
        self._session.hooks.checkpoint_remove(path=self.at(name))
        return "removed", text

    def set_aside(self, name: str, alone: bool) -> str:
        """Rename a damaged checkpoint, if this job is `alone` here; return what was done."""
        if not alone:
            return "passed over"
        there = set(self._session.hooks.checkpoint_list(folder=self.path))
        targets = (f"damaged-{name}{more}" for more in ("", *(f"-{number}" for number in range(2, len(there) + 3))))
        target = next(target for target in targets if target not in there)  # what was set aside before stays as well
        self._session.hooks.checkpoint_move(path=self.at(name), target=self.at(target))
        return "set aside"


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:012d}.ckpt"


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name."""
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1])


def _metrics(info: Mapping[str, Any], path: str) -> dict[str, float]:
    """Return the metrics a checkpoint was saved with.

    Raises:
        CheckpointCorruptError: if they are none.
    """
    metrics = info.get("metrics", {})
    numbers = isinstance(metrics, Mapping) and all(
        isinstance(name, str) and (type(value) is float or (type(value) is int and value.bit_length() < 1024))
        for name, value in metrics.items()
    )
    if not numbers:
        raise CheckpointCorruptError(f"{path}: its metrics are no numbers by name.")
    return {name: float(value) for name, value in metrics.items()}
