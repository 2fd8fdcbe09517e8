"""The checks of many wrong plugins in one job: each start of ranks takes long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from plugframe.hooks.world import World
from plugframe.testing.contracts import collective, strategy
from plugframe.testing.contracts.batches import rule_of
from plugframe.testing.contracts.running import one_line
from plugframe.testing.ranks import rank_store, run_ranks

Job = tuple[str, Callable[[World], AbstractContextManager[Any]], Callable[[Any], None]]


def reports_of(suites: Sequence[Any], num_ranks: int, *more: Any) -> dict[str, str]:
    """Run the check `only` of each suite on so many ranks, and return what is to be said, by the plugin's name."""
    jobs: list[Job] = []
    for suite in suites:

        def note(num_ranks: int, make: Any, checks: Sequence[Any], *, of: Any = suite, **rest: Any) -> dict[str, str]:
            jobs.extend((of.spec, make, check) for check in checks if check.__name__ == of.only)
            return {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collective, "run_batch", note)
            patch.setattr(strategy, "run_batch", note)
            super(type(suite), suite).reports(num_ranks, *more)
    reports = run_ranks(num_ranks, _on_rank, jobs, timeout_s=180.0)
    return {spec: next((text for text in (report[spec] for report in reports) if text), "") for spec, _, _ in jobs}


def _on_rank(world: World, jobs: Sequence[Job]) -> dict[str, str]:
    store = rank_store(timeout_s=1200.0)
    found = {}
    for spec, make, check in jobs:
        found[spec] = _report(world, make, check)
        # What a check left behind in the middle of an exchange must not meet the next one's.
        store.set(f"wrong/{spec}/{world.global_rank}", "")
        store.wait([f"wrong/{spec}/{rank}" for rank in range(world.world_size)])
    return found


def _report(world: World, make: Callable[[World], Any], check: Callable[[Any], None]) -> str:
    try:
        with make(world) as made:
            check(made)
    except pytest.fail.Exception as error:
        return error.msg or ""
    except BaseException as error:  # noqa: BLE001 - told as the suite tells it
        return f"{rule_of(check)}: {one_line(error)}"
    return ""
