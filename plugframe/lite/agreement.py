"""Decisions of a script that all ranks must take alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plugframe.errors import CollectiveMismatchError, SettingError, closest
from plugframe.utils.rank_text import ranks_text

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

_WAYS = ("any", "all", "rank_zero")


def agree(lite: Lite, flag: Any, how: str) -> bool:
    """Return the decision of all ranks; see `Lite.agree`."""
    lite._started("agree")
    if how not in _WAYS:
        raise SettingError(f"agree(how={how!r}): it is 'any', 'all' or 'rank_zero'.{closest(str(how), _WAYS)}")
    try:
        # Of a container the truth is whether it is empty, which is not what a script means.
        mine: Any = None if hasattr(flag, "__len__") and not hasattr(flag, "shape") else bool(flag)
    except (TypeError, ValueError, RuntimeError):
        mine = None
    lite._job_state.weights.communicated = True
    everyone = lite._hooks.collective_all_gather_object(obj=(mine, how), group=None)
    if mine is None:
        raise SettingError(f"agree() takes a bool, a number or a tensor of one element, got {type(flag).__name__}.")
    refused = [rank for rank, (each, _) in enumerate(everyone) if each is None]
    if refused:
        raise CollectiveMismatchError(f"agree() got no bool on {ranks_text(refused)}.")
    others = [rank for rank, (_, each) in enumerate(everyone) if each != everyone[0][1]]
    if others:
        raise CollectiveMismatchError(
            f"agree(how={everyone[0][1]!r}) on rank 0 meets how={everyone[others[0]][1]!r} on {ranks_text(others)}: "
            "pass the same."
        )
    flags: list[bool] = [each for each, _ in everyone]
    return {"any": any(flags), "all": all(flags), "rank_zero": flags[0]}[how]
