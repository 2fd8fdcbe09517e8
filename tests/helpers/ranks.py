"""Real ranks for the tests, see `plugframe.testing.ranks`; and the hooks of plugins without a job around them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from plugframe.hooks import KINDS
from plugframe.testing.ranks import RanksFailed, rank_store, run_checks, run_ranks

__all__ = ["RanksFailed", "hooks_of", "rank_store", "run_checks", "run_ranks"]


def hooks_of(*plugins: Any, **others: Callable[..., Any]) -> SimpleNamespace:
    """Return the hooks of `plugins` as a `Context` has them: by name, arguments by keyword only."""
    hooks = {}
    for plugin in plugins:
        for name in dir(plugin):
            if name.partition("_")[0] in KINDS:
                hooks[name] = _by_keyword(getattr(plugin, name))
    return SimpleNamespace(**{**hooks, **others})


def _by_keyword(method: Callable[..., Any]) -> Callable[..., Any]:
    def hook(**kwargs: Any) -> Any:
        return method(**kwargs)

    return hook
