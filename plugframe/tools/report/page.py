"""The page: a template, the style and the script in it, and the runs as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plugframe import __version__
from plugframe.tools.report.runs import Run, thinned

_HERE = Path(__file__).parent
#: Groups of plots by words in the names of their metrics, in the order of the page; others come first.
GROUPS = {"Throughput and memory": ("_per_s", "mfu", "memory")}


def page(runs: Sequence[Run]) -> str:
    """Return the page as text, with nothing to load from elsewhere."""
    data = {"version": __version__, "runs": [_run(run) for run in runs], "groups": _groups(runs)}
    # What ends a script element, or begins a comment in one, is written as an escape.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"style": _file("report.css"), "script": _file("report.js"), "data": text}
    template = _file("report.html")
    for name, part in parts.items():
        template = template.replace(f"/* {name} */", part, 1)
    return template


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    found: dict[str, list[str]] = {"Metrics": [], **{group: [] for group in GROUPS}}
    for name in names:
        group = next((g for g, words in GROUPS.items() if any(word in name.lower() for word in words)), "Metrics")
        found[group].append(name)
    return [{"title": title, "metrics": metrics} for title, metrics in found.items() if metrics]


def _run(run: Run) -> dict[str, Any]:
    metrics = {}
    for name, (steps, values) in run.metrics.items():
        shown = thinned(steps, values)
        finite = [value for value in values if math.isfinite(value)]
        metrics[name] = {
            "steps": shown[0],
            "values": [_number(value) for value in shown[1]],
            "count": len(steps),
            "last": _number(values[-1]),
            "min": min(finite, default=None),
            "max": max(finite, default=None),
        }
    restarts = [job["first_step"] for job in run.jobs[1:] if isinstance(job.get("first_step"), int)]
    return {
        "name": run.name,
        "status": run.status,
        "error": run.error,
        "rows": len({step for steps, _ in run.metrics.values() for step in steps}),
        "seconds": _seconds(run.jobs),
        "num_restarts": max(len(run.jobs) - 1, 0),
        "restarts": restarts,
        "hyperparams": {name: value if isinstance(value, str) else json.dumps(value) for name, value in _params(run)},
        "checkpoints": [{**each, "metrics": _finite(each["metrics"])} for each in run.checkpoints],
        "metrics": metrics,
    }


def _params(run: Run) -> list[tuple[str, Any]]:
    return sorted(run.hyperparams.items())


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    return {str(n): _number(v) for n, v in metrics.items() if isinstance(v, (int, float))}


def _number(value: float) -> float | str:
    """Return a number that JSON has, or a word for one that it has not."""
    return value if math.isfinite(value) else str(value)


def _seconds(jobs: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time in which the jobs of a run ran; None if that is not known."""
    spans = [(job.get("begun"), job.get("ended")) for job in jobs]
    known = [end - begin for begin, end in spans if isinstance(begin, (int, float)) and isinstance(end, (int, float))]
    return sum(known) if known else None
