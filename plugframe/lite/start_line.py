"""The line that a job prints when it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

from plugframe.core.planning.plan import Plan
from plugframe.hooks.variables import VERBOSE


def start_line(plan: Plan, environ: Mapping[str, str] = os.environ) -> str:
    """Return what runs where: ``ddp on 2 × cpu, bf16-mixed``; verbose, every plugin with its package and version."""
    if environ.get(VERBOSE) == "1":
        return plan.line()
    strategy = "+".join([plan.choices["strategy"].name, *(choice.name for choice in plan.composed)])
    number = plan.world_size
    where = f"{number} × {plan.choices['accelerator'].name}" if number > 1 else plan.choices["accelerator"].name
    where += f" on {plan.num_nodes} nodes" if plan.num_nodes > 1 else ""
    where += f" ({plan.mesh})" if plan.mesh is not None else ""
    parts = [f"{strategy} on {where}", plan.choices["precision"].name]
    if plan.simulated:
        parts.append("simulated")
    if plan.extensions:
        parts.append(f"with {', '.join(choice.name for choice in plan.extensions)}")
    if plan.loggers:
        parts.append(f"logged to {', '.join(choice.name for choice in plan.loggers)}")
    return ", ".join(parts)
