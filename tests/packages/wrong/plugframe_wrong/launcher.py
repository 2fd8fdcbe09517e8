"""Launchers that break one rule each."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from plugframe.base import Launcher
from plugframe.errors import RankFailedError
from plugframe.hooks import Job, hookimpl
from plugframe.launch import supervise


class Right(Launcher):
    """Breaks none."""

    def start(self, job: Job) -> Any:
        return supervise(job, start_method="fork")

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        return self.start(job)


class OnlyOne(Right):
    """Starts one rank, however many were asked for."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        return self.start(replace(job, num_processes=1))


class NoResult(Right):
    """Keeps what the function returned."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        self.start(job)


class Swallows(Right):
    """Says nothing of a rank that failed."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        try:
            return self.start(job)
        except RankFailedError:
            return None


class Leaves(Right):
    """Leaves the job's variables in its own process."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        os.environ.update(job.environ)
        return self.start(job)


class Stumbles(Right):
    """Stumbles over a function that is of no module."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        if "<locals>" in getattr(job.function, "__qualname__", ""):
            raise AttributeError("cannot pickle a local object")
        return self.start(job)
