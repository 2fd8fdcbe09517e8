"""Loggers that break one rule each: lines of JSON in a file."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from plugframe.base import Logger
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class Right(Logger):
    """Breaks none."""

    def __init__(self, folder: str | os.PathLike[str] = "runs") -> None:
        self.folder = Path(folder)
        self.path: Path | None = None
        self.lines: list[Any] = []

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{uuid4().hex}.jsonl"
        self.path.touch()
        self.calls = 0

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        if context.world.global_rank == 0:
            self.open()

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        number = self.next_step(step)
        self.lines += [(number, name, value) for name, value in metrics.items()]

    @hookimpl
    def logger_run_id(self) -> str | None:
        return None if self.path is None else self.path.stem

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        if self.path is not None:
            self.path = self.folder / f"{state['run_id']}.jsonl"
        super().logger_load_state(state)

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        lines, self.lines = self.lines, []
        if self.path is None:
            return
        if lines:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)
        if error is not None:
            Path(f"{self.path}.failed").touch()


class Drops(Right):
    """Writes whole tens of lines."""

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        self.lines = self.lines[: len(self.lines) // 10 * 10] if len(self.lines) > 10 else self.lines
        super().logger_teardown(error)


class FromOne(Right):
    """Counts from 1."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        super().logger_log(metrics, self.next_step(None) + 1 if step is None else step)


class EveryRank(Right):
    """Opens a file on every rank."""

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        self.open()


class Early(Right):
    """Makes its folder when it is constructed."""

    def __init__(self, folder: str | os.PathLike[str] = "runs") -> None:
        super().__init__(folder)
        self.folder.mkdir(parents=True, exist_ok=True)


class OneFile(Right):
    """Writes every run to one file."""

    def open(self) -> None:
        super().open()
        self.path = self.folder / "all.jsonl"


class Twice(Right):
    """Insists that a tear-down comes after a set-up."""

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        if self.path is None:
            raise RuntimeError("never set up")
        super().logger_teardown(error)


class Open(Right):
    """Keeps its file open."""

    def open(self) -> None:
        super().open()
        self.lock = os.open(str(self.path), os.O_RDONLY)


class Old(Right):
    """Breaks none: a logger of the first contract, whose tear-down takes no error."""

    @hookimpl
    def logger_teardown(self) -> None:  # type: ignore[override]
        super().logger_teardown()


class LosesOne(Right):
    """Drops the second metric of a call."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        super().logger_log(dict(list(metrics.items())[:1] + list(metrics.items())[2:]), step)


class Swaps(Right):
    """Keeps the highest step, also for a metric that is logged late."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        last = max((number for number, _, _ in self.lines), default=0)
        super().logger_log(metrics, step if step is None else max(step, last))


class Backwards(Right):
    """Writes what it has kept from its end."""

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        self.lines.reverse()
        super().logger_teardown(error)


class Rounds(Right):
    """Keeps four bytes of eight."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        four = {name: struct.unpack("f", struct.pack("f", value))[0] for name, value in metrics.items()}
        super().logger_log(four, step)


class Prints(Right):
    """Keeps a value as it would print it."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        super().logger_log({name: float(f"{value:.6g}") for name, value in metrics.items()}, step)


class Finite(Right):
    """Leaves NaN out."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        super().logger_log({name: value for name, value in metrics.items() if value == value}, step)


class Waits(Right):
    """Keeps the row of the last step, which may grow, and forgets it."""

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        last = self.lines[-1][0] if self.lines else 0
        self.lines = [line for line in self.lines if line[0] != last or len(self.lines) > 16]
        super().logger_teardown(error)


class Gives(Right):
    """Writes nothing after an error."""

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        self.lines = self.lines if error is None else []
        super().logger_teardown(error)


class Cheerful(Right):
    """Records every run as one that ended well."""

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        super().logger_teardown()


class Mute(Right):
    """Takes hyperparameters, and does nothing with them."""

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, Any]) -> None:
        pass


class Discards(Right):
    """Takes artifacts, and does nothing with them."""

    @hookimpl
    def logger_log_artifact(self, name: str, value: Any, step: int | None) -> None:
        pass


class Nags(Right):
    """Warns of every artifact."""

    @hookimpl
    def logger_log_artifact(self, name: str, value: Any, step: int | None) -> None:
        self._not_stored = frozenset()
        super().logger_log_artifact(name, value, step)


class Overwrites(Right):
    """Begins the file of a run anew that it is to continue."""

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        super().logger_load_state(state)
        if self.path is not None:
            self.path.write_text("")


class Renames(Right):
    """Gives every job an id of its own."""

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        pass
