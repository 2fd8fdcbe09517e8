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
    """Return a name and a version for everything that must be equal on all ranks."""
    import torch

    from plugframe import __version__

    uses = [("plugframe", __version__), ("torch", str(torch.__version__))]
    return uses + [(choice.kind, _version_text(choice)) for choice in plan.all_choices()]


def _version_text(choice: Choice) -> str:
    if choice.entry is not None:
        return f"{choice.name} ({choice.entry.distribution} {choice.entry.version})"
    cls = type(choice.instance)
    return f"{cls.__module__}.{cls.__qualname__} (an object in the code)"


def check_same_plugins(plan: Plan, context: Context) -> None:
    """Verify that all ranks load the same plugin versions. Every rank must call it.

    Raises:
        EnvironmentMismatchError: on all ranks, if their plugins or versions differ; lists the differences.
    """
    import torch

    mine = in_use(plan)
    digest = hashlib.sha256(json.dumps(mine).encode()).digest()
    # Send a 32-byte digest as numbers that every backend supports; the lists are gathered only if digests differ.
    numbers = [int.from_bytes(digest[at : at + 4], "big") >> 1 for at in range(0, 32, 4)]
    sent = torch.tensor(numbers, dtype=torch.int32).to(context.device)
    digests = context.hooks.collective_all_gather(tensor=sent, group=None, sync_grads=False).cpu()
    if bool((digests == digests[0]).all()):
        return
    lists = context.hooks.collective_all_gather_object(obj=mine, group=None)
    raise EnvironmentMismatchError(f"Plugins or versions differ between ranks: {'; '.join(differences(lists))}. {_FIX}")


_FIX = "Install the same packages on every node (`plugframe list-plugins` shows them), and select the same on all."


def differences(lists: Sequence[Sequence[Any]]) -> list[str]:
    """Return a string for each difference between `lists`: ``"strategy a on rank 0, b on rank 1"``."""
    by_rank = [_by_kind(uses) for uses in lists]
    found = []
    for kind in dict.fromkeys(kind for uses in by_rank for kind in uses):
        ranks_by_version: dict[str, list[int]] = {}
        for rank, uses in enumerate(by_rank):
            ranks_by_version.setdefault(uses.get(kind, "none"), []).append(rank)
        if len(ranks_by_version) > 1:
            found.append(
                f"{kind} {', '.join(f'{which} on {ranks_text(ranks)}' for which, ranks in ranks_by_version.items())}"
            )
    return found


def _by_kind(uses: Sequence[Any]) -> dict[str, str]:
    """Group by kind, joining the plugins of kinds that allow several."""
    by_kind: dict[str, list[str]] = {}
    for kind, which in uses:
        by_kind.setdefault(kind, []).append(which)
    return {kind: " and ".join(versions) for kind, versions in by_kind.items()}
