"""The plan as rows of text, for ``plugframe run --dry-run``."""

from __future__ import annotations

from collections.abc import Iterable

from plugframe.core.config.request import Request
from plugframe.core.planning.plan import Choice, Plan

#: What, its value, and why.
Row = tuple[str, str, str]


def plan_rows(plan: Plan, request: Request | None = None) -> list[Row]:
    """Return a row for every field of a plan, and for the callbacks and settings file of the request."""
    devices = ", ".join(map(str, plan.devices))
    rows = [(kind, choice.origin, choice.reason) for kind, choice in plan.choices.items()]
    rows.insert(1, ("devices", f"{len(plan.devices)} on each node: {devices}", plan.devices_reason))
    rows.insert(2, ("nodes", str(plan.num_nodes), f"{plan.world_size} ranks in all"))
    asked = request.get("mesh") if request is not None else None
    rows += [("strategy", choice.origin, choice.reason) for choice in plan.composed]
    if plan.mesh is not None:
        why = f"asked for in {asked.source}" if asked is not None else "of the strategies"
        rows.append(("mesh", str(plan.mesh), why))
    rows += [("extension", choice.origin, choice.reason) for choice in plan.extensions]
    rows += [("logger", choice.origin, choice.reason) for choice in plan.loggers]
    callbacks = request.get("callbacks") if request is not None else None
    if callbacks is not None:
        rows += [("callback", name, f"asked for in {callbacks.source}") for name in callbacks.value]
    if request is not None and request.file is not None:
        rows.append(("settings file", str(request.file), "of the project around the working directory"))
    return rows + option_rows(plan.all_choices())


def option_rows(choices: Iterable[Choice]) -> list[Row]:
    """Return a row for every given option of the plugins."""
    options = [option for choice in choices for option in choice.options]
    return [(option.key, option.text, f"asked for in {option.source}") for option in options]
