"""Verify that all ranks of a job load the same plugin versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from plugframe.core.planning.plan import Choice, Plan
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks.context import Context
from plugframe.utils.rank_text import ranks_text

Use = tuple[str, str]


def in_use(plan: Plan) -> list[Use]:
    """Return what must be the same on every rank: what it is, and which one in which version."""
    import torch

    from plugframe import __version__

    uses = [("plugframe", __version__), ("torch", str(torch.__version__))]
    return uses + [(choice.kind, _which(choice)) for choice in plan.all_choices()]


def _which(choice: Choice) -> str:
    if choice.entry is not None:
        return f"{choice.name} ({choice.entry.distribution} {choice.entry.version})"
    cls = type(choice.instance)
    return f"{cls.__module__}.{cls.__qualname__} (an object in the code)"


def check_same_plugins(plan: Plan, context: Context) -> None:
    """Verify that all ranks load the same plugin versions. Every rank must call it.

    Raises:
        EnvironmentMismatchError: on all ranks, if one of them runs something else, with both.
    """
    import torch

    mine = in_use(plan)
    digest = hashlib.sha256(json.dumps(mine).encode()).digest()
    # Thirty-two bytes from each, as numbers that every backend can carry; the lists travel only if they differ.
    words = [int.from_bytes(digest[at : at + 4], "big") >> 1 for at in range(0, 32, 4)]
    sent = torch.tensor(words, dtype=torch.int32).to(context.device)
    everyone = context.hooks.collective_all_gather(tensor=sent, group=None, sync_grads=False).cpu()
    if bool((everyone == everyone[0]).all()):
        return
    lists = context.hooks.collective_all_gather_object(obj=mine, group=None)
    raise EnvironmentMismatchError(f"The ranks do not run the same: {'; '.join(differences(lists))}. {_MEND}")


_MEND = "Install the same packages on every node (`plugframe list-plugins` shows them), and select the same on all."


def differences(lists: Sequence[Sequence[Any]]) -> list[str]:
    """Say of everything that is not the same in all `lists` who has which: ``"strategy a on rank 0, b on rank 1"``."""
    by_rank = [_by_kind(uses) for uses in lists]
    found = []
    for kind in dict.fromkeys(kind for uses in by_rank for kind in uses):
        holders: dict[str, list[int]] = {}
        for rank, uses in enumerate(by_rank):
            holders.setdefault(uses.get(kind, "none"), []).append(rank)
        if len(holders) > 1:
            found.append(f"{kind} {', '.join(f'{which} on {ranks_text(ranks)}' for which, ranks in holders.items())}")
    return found


def _by_kind(uses: Sequence[Any]) -> dict[str, str]:
    """Join what there is of each kind, of which there can be many."""
    by_kind: dict[str, list[str]] = {}
    for kind, which in uses:
        by_kind.setdefault(kind, []).append(which)
    return {kind: " and ".join(all_of_it) for kind, all_of_it in by_kind.items()}
