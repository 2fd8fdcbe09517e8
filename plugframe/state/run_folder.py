"""List, remove and rename the checkpoints in the folder of a run, on rank 0."""

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
    """The checkpoints in a folder or at a URL. Only rank 0 calls its methods, except `at`.

    Attributes:
        path: path or URL of the folder.
        pending: name of a checkpoint that may still be written in the background; empty if there is none.
        lock: the lock on the folder.
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
        """Return the path or URL of a name in the folder."""
        return f"{self.path.rstrip('/')}/{name}" if "://" in self.path else os.path.join(self.path, name)

    def acquire(self, *, make: bool) -> bool:
        """Lock the folder for this job, and return whether it succeeded. True for a URL, which cannot be locked."""
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
            return False  # perhaps readable, and not to be changed

    def scan(self) -> tuple[list[str], bool, str]:
        """Return the names of the checkpoints, whether this job may change the folder, and a warning if not."""
        exclusive = self.acquire(make=False)
        names = self._names()
        warning = ""
        if not exclusive and names:
            warning = (
                f"Another job ({self.lock.owner()}) saves into {self.path}: nothing in it is removed or renamed "
                "here, and save() is refused while that job runs."
            )
        return names, exclusive, warning

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
        """Return whether it is left by a save that did not complete."""
        # Decided from the files, never from an error: only this lets `resume` remove something.
        is_unfinished = getattr(self._session.plugins["checkpoint"], "unfinished", None)
        return is_unfinished is not None and is_unfinished(self.at(name)) is True

    def ranked(self) -> list[str]:
        """Return the checkpoints that have the metric, the best first; of equal ones the newest first."""
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
            if value is not None and value == value:  # not NaN
                found.append((sign * value, -step_of(name), name))
        return [name for *_, name in sorted(found)]

    def check_info(self, name: str) -> None:
        """Raise if a checkpoint was saved for another step, and so was renamed."""
        try:
            info = self._session.plugins["checkpoint"].inspect(self.at(name)).info
        except PlugframeError:
            return  # reported when it is loaded
        _metrics(info, self.at(name))
        step = info.get("step", step_of(name))
        if step != step_of(name):
            shown = f"that of step {step}" if type(step) is int and step < 10**12 else "an invalid step"
            raise CheckpointCorruptError(
                f"{self.at(name)} has the wrong name: expected the checkpoint of step {step_of(name)}, found {shown}."
            )

    def prune(self, saved: str) -> str:
        """Remove old checkpoints; return a warning if that fails, since `saved` is complete nevertheless."""
        try:
            if self._keep_last is not None:
                names = self._finished()
                keep = {saved, *names[-self._keep_last :]}
                if self._keep_best is not None:
                    keep.update(self.ranked()[: self._keep_best[2]])
                for name in names:
                    if name not in keep:
                        self._session.hooks.checkpoint_remove(path=self.at(name))
            self._remove_leftovers()
        except Exception as error:  # noqa: BLE001 the save itself has succeeded
            return f"{self.at(saved)} is saved, but an older checkpoint could not be removed: {error}"
        return ""

    def _remove_leftovers(self) -> None:
        """Remove temporary files of killed saves and removals."""
        if "://" in self.path:
            return  # there are no temporary files at URLs
        for name in self._session.hooks.checkpoint_list(folder=self.path):
            draft = _DRAFT.fullmatch(name)
            if draft is not None and draft[1] != self.pending:
                remove_leftovers(self.at(draft[1]))

    def remove_unfinished(self, name: str, exclusive: bool) -> tuple[str, str]:
        """Remove an incomplete checkpoint if this job may; return what was done, and why."""
        text = f"{self.at(name)} is not complete."
        try:
            self._session.plugins["checkpoint"].inspect(self.at(name))
        except PlugframeError as error:
            text = str(error)
        # Checked again right before removing.
        if not exclusive or not self.is_unfinished(name):
            return "skipped", text
        self._session.hooks.checkpoint_remove(path=self.at(name))
        return "removed", text

    def rename_damaged(self, name: str, exclusive: bool) -> str:
        """Rename a damaged checkpoint if this job may; return what was done."""
        if not exclusive:
            return "skipped"
        existing = set(self._session.hooks.checkpoint_list(folder=self.path))
        targets = (f"damaged-{name}{more}" for more in ("", *(f"-{number}" for number in range(2, len(existing) + 3))))
        target = next(target for target in targets if target not in existing)  # earlier damaged checkpoints stay
        self._session.hooks.checkpoint_move(path=self.at(name), target=self.at(target))
        return f"renamed to {target}"


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:012d}.ckpt"


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name."""
    found = _NAME.fullmatch(name)
    assert found is not None
    return int(found[1])


def _metrics(info: Mapping[str, Any], path: str) -> dict[str, float]:
    """Return the metrics of a checkpoint.

    Raises:
        CheckpointCorruptError: if they are invalid.
    """
    metrics = info.get("metrics", {})
    numbers = isinstance(metrics, Mapping) and all(
        isinstance(name, str) and (type(value) is float or (type(value) is int and value.bit_length() < 1024))
        for name, value in metrics.items()
    )
    if not numbers:
        raise CheckpointCorruptError(f"{path}: its metrics are not a dict of numbers.")
    return {name: float(value) for name, value in metrics.items()}
