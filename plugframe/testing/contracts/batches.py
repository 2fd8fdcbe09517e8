"""Run many checks in one job, with a report for each; a failed check does not stop the others."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from plugframe.errors import UnsupportedError
from plugframe.hooks.world import World
from plugframe.testing.contracts.running import one_line
from plugframe.testing.ranks import RanksFailed, rank_store, run_ranks

Check = Callable[[Any], None]
_C = TypeVar("_C", bound=Check)

#: Number of failed checks after which the others are not run: each may have waited for its timeout.
MAX_FAILURES = 5
_SKIPPED = "skipped: "


def rule(text: str) -> Callable[[_C], _C]:
    """Assign a check to the rule that is reported for its unexpected errors."""

    def mark(check: _C) -> _C:
        check.rule = text  # type: ignore[attr-defined]
        return check

    return mark


def rule_of(check: Check) -> str:
    """Return the rule of a check."""
    text: str = getattr(check, "rule", check.__name__)
    return text


def run_batch(
    num_ranks: int,
    make: Callable[[World], AbstractContextManager[Any]],
    checks: Sequence[Check],
    *,
    timeout_s: float = 120.0,
) -> dict[str, str]:
    """Run every ``check(made)`` on every rank of one job, and return a report for each, by its name.

    After a failed check the ranks may be out of step: a new job runs the remaining checks.

    Args:
        make: a context manager over the rank's `World`; it builds the argument of the checks.
        timeout_s: limit of one job.
    """
    found: dict[str, str] = {}
    waiting = list(checks)
    failures = 0
    while waiting:
        if failures == MAX_FAILURES:
            found |= {check.__name__: f"{_SKIPPED}{failures} checks failed before it." for check in waiting}
            break
        with tempfile.TemporaryDirectory(prefix="plugframe-contract-") as folder:
            died = ""
            try:
                run_ranks(num_ranks, _on_rank, make, waiting, folder, timeout_s=timeout_s)
            except RanksFailed as error:
                died = str(error)
            done = _read(Path(folder), num_ranks, waiting, died)
        found |= done
        waiting = [check for check in waiting if check.__name__ not in done]
        failures += any(text and not text.startswith(_SKIPPED) for text in done.values())
    return found


def tell(report: str) -> None:
    """Fail or skip the test according to the report of its check; an empty one passes."""
    if report.startswith(_SKIPPED):
        pytest.skip(report.removeprefix(_SKIPPED))
    if report:
        pytest.fail(report, pytrace=False)


def _read(folder: Path, num_ranks: int, checks: Sequence[Check], died: str) -> dict[str, str]:
    """Return the reports of the checks up to the first that failed."""
    found: dict[str, str] = {}
    for check in checks:
        paths = [folder / f"{check.__name__}.{rank}" for rank in range(num_ranks)]
        texts = {rank: path.read_text(encoding="utf-8") for rank, path in enumerate(paths) if path.exists()}
        said = {rank: text for rank, text in texts.items() if text}
        if said:
            rank, text = min(said.items())
            where = f" (on rank {rank} of {num_ranks})" if num_ranks > 1 and not text.startswith(_SKIPPED) else ""
            first, newline, rest = text.partition("\n")
            found[check.__name__] = f"{first}{where}{newline}{rest}"
        elif len(texts) < num_ranks:
            # The first check without all reports is the one in which the ranks died.
            found[check.__name__] = f"{rule_of(check)}: the ranks died or timed out.\n{died}"
        else:
            found[check.__name__] = ""
        if found[check.__name__] and not found[check.__name__].startswith(_SKIPPED):
            return found
    return found


def _on_rank(world: World, make: Callable[[World], Any], checks: Sequence[Check], folder: str) -> None:
    # Longer than the timeout of the job, so that the rank that hangs is reported, and not those that wait for it.
    store = rank_store(timeout_s=1200.0)
    skipped = ""
    try:
        with make(world) as made:
            for number, check in enumerate(checks):
                report = _report(check, made)
                Path(folder, f"{check.__name__}.{world.global_rank}").write_text(report, encoding="utf-8")
                passed = not report or report.startswith(_SKIPPED)
                store.set(f"check/{number}/{world.global_rank}", "passed" if passed else "failed")
                if any(store.get(f"check/{number}/{rank}") != b"passed" for rank in range(world.world_size)):
                    return  # the next collective would pair with one of another check
    except UnsupportedError as error:
        skipped = f"{_SKIPPED}It is not supported here: {error}"
    if skipped:
        for check in checks:
            Path(folder, f"{check.__name__}.{world.global_rank}").write_text(skipped, encoding="utf-8")


def _report(check: Check, made: Any) -> str:
    try:
        check(made)
    except pytest.fail.Exception as error:
        return error.msg or check.__name__
    except pytest.skip.Exception as error:
        return f"{_SKIPPED}{error.msg}"
    except BaseException as error:  # noqa: BLE001 - reported under the check's name
        return f"{rule_of(check)}: {one_line(error)}\n{traceback.format_exc()}"
    return ""
