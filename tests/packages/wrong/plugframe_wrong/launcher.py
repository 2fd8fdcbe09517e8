"""Launchers that break one rule each."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
from collections.abc import Callable
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


class Loses(Right):
    """Gives the ranks its own variables alone."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        return self.start(replace(job, environ={}))


class Strips(Right):
    """Gives the ranks no variable that is empty, and one line of each other."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        kept = {name: value.split("\n")[0] for name, value in job.environ.items() if value}
        return self.start(replace(job, environ=kept))


class Miscounts(Right):
    """Gives every rank the place of the first on its node."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        if job.function is None or job.function.__name__ != "report":
            return self.start(job)
        return self.start(replace(job, function=functools.partial(_as_first, job.function)))


class One(Right):
    """Reports every failure with the exit code 1."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        try:
            return self.start(job)
        except RankFailedError as error:
            raise RankFailedError(error.report) from None


class Nameless(Right):
    """Reports no rank but the first."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        try:
            return self.start(job)
        except RankFailedError as error:
            raise RankFailedError(error.report.replace("rank 1", "rank 0"), exit_code=error.exit_code) from None


class Abandons(Right):
    """Returns as soon as rank 0 has ended, and leaves the others."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        if getattr(job.function, "__name__", "") != "report":
            return self.start(job)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        context = multiprocessing.get_context("fork")
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        ranks = []
        for rank in range(job.num_processes):
            size = str(job.num_processes)
            place = dict(zip(names, (str(rank), str(rank), size, size, "127.0.0.1", port), strict=True))
            ranks.append(context.Process(target=_placed, args=({**job.environ, **place}, job.function, job.args)))
            ranks[-1].start()
        ranks[0].join()
        return None


class Deaf(Right):
    """Ignores the folder for the output of the ranks."""

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        return self.start(replace(job, log_dir=None))


def _as_first(function: Callable[..., Any], *args: Any) -> Any:
    os.environ["LOCAL_RANK"] = "0"
    return function(*args)


def _placed(variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    function(*args)
