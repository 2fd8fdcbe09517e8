"""Runs that loggers have recorded, read by functions that their packages publish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugframe import _compat
from plugframe.errors import PluginLoadError, SettingError

#: The entry-point group of readers, which are no plugins: ``read(path)`` yields a mapping for each run in a folder,
#: with ``path``, and of ``status``, ``error``, ``jobs``, ``hyperparams`` and ``metrics`` (steps and values by name)
#: what there is.
GROUP = "plugframe_report"
#: Points of a metric that are drawn; of more, the least and the largest of each interval.
MOST_POINTS = 2000


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        path: its folder.
        name: of the folder, as short as it is unique.
        status: ``"running"``, ``"finished"`` or ``"failed"``; empty if unknown.
        error: why it failed.
        jobs: when each of its jobs began and ended, in seconds since 1970, and its first step.
        hyperparams: by name.
        metrics: steps and values, which may be NaN, by name.
        checkpoints: name, step, size, time and metrics of each.
    """

    path: Path
    name: str = ""
    status: str = ""
    error: str = ""
    jobs: list[Mapping[str, Any]] = field(default_factory=list)
    hyperparams: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Return the runs in folders.

    Raises:
        SettingError: for a path that has none, or a file that cannot be read.
        PluginLoadError: if a reader is broken.
    """
    readers = _readers()
    found = {run.path.resolve(): run for path in paths for run in _read(path, readers)}
    for run, name in zip(found.values(), _short(list(found)), strict=True):
        run.name = name
    return list(found.values())


def _readers() -> dict[str, Callable[[Path], Iterable[Mapping[str, Any]]]]:
    found = {}
    for entry in _compat.metadata.entry_points(group=GROUP):
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            raise PluginLoadError(f"The reader {entry.name!r} of runs ({entry.value}) is broken: {error}.") from error
    return found


def _read(path: Path, readers: Mapping[str, Callable[[Path], Iterable[Mapping[str, Any]]]]) -> list[Run]:
    if not path.exists():
        raise SettingError(f"There is no run {str(path)!r}: name the folder of a run, such as runs/version_0.")
    try:
        found = [Run(**about) for read in readers.values() for about in read(path)]
    except (OSError, ValueError) as error:
        raise SettingError(str(error)) from error
    if not found:
        names = ", ".join(map(repr, readers)) or "none"
        raise SettingError(
            f"{str(path)!r} holds no run, nor do its folders. Runs of these loggers can be drawn: {names}; select one "
            "by Lite(loggers=…)."
        )
    return found


def _short(paths: list[Path]) -> list[str]:
    """Return the last part of each path, or as many as tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Return at most `MOST_POINTS` points that look the same: the least and the largest of each interval."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    size = math.ceil(len(steps) / (MOST_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(steps), size):
        places = range(start, min(start + size, len(steps)))
        finite = [place for place in places if math.isfinite(values[place])] or [start]
        ends = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        kept += sorted(ends)
    return [steps[place] for place in kept], [values[place] for place in kept]
