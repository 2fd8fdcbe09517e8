"""Loggers that break one rule each: lines of JSON in a file."""

from __future__ import annotations

import json
import os
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
    def logger_teardown(self) -> None:
        lines, self.lines = self.lines, []
        if lines and self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)


class Drops(Right):
    """Writes whole tens of lines."""

    @hookimpl
    def logger_teardown(self) -> None:
        self.lines = self.lines[: len(self.lines) // 10 * 10] if len(self.lines) > 10 else self.lines
        super().logger_teardown()


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
    def logger_teardown(self) -> None:
        if self.path is None:
            raise RuntimeError("never set up")
        super().logger_teardown()


class Open(Right):
    """Keeps its file open."""

    def open(self) -> None:
        super().open()
        self.lock = os.open(str(self.path), os.O_RDONLY)
