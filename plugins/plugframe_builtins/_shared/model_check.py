"""Check that all ranks set up the same model, before its tensors are sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from torch import nn

from plugframe.deferred.module import Deferred
from plugframe.errors import CollectiveMismatchError


def check_same_model(module: nn.Module, hooks: Any, values: Mapping[str, Deferred] | None = None) -> None:
    """Compare names, shapes and dtypes over ranks: torch hangs or mixes up values where they differ.

    Args:
        values: of deferred tensors, if each rank reads its own shards of files: the files are compared too.

    Raises:
        CollectiveMismatchError: on all ranks, with the first difference.
    """
    mine = _describe(module, values or {})
    digest = hashlib.sha256("\n".join(mine).encode()).hexdigest()
    digests = hooks.collective_all_gather_object(obj=digest, group=None)
    odd = next((rank for rank, other in enumerate(digests) if other != digests[0]), None)
    if odd is None:
        return
    everyone = hooks.collective_all_gather_object(obj=mine, group=None)
    pairs = zip_longest(everyone[0], everyone[odd], fillvalue="nothing more")
    first, other = next((a, b) for a, b in pairs if a != b)
    raise CollectiveMismatchError(
        f"The ranks set up different models: {type(module).__qualname__} has {first} on rank 0, and {other} on "
        f"rank {odd}. Build the same model on every rank."
    )


def _describe(module: nn.Module, values: Mapping[str, Deferred]) -> list[str]:
    lines = []
    for name, parameter in module.named_parameters():
        kind = "parameter" if parameter.requires_grad else "frozen parameter"
        digest = values[name].digest() if name in values else None
        read = f" read from a file with digest {digest}" if digest else ""
        lines.append(f"{kind} {name!r} {tuple(parameter.shape)} {parameter.dtype}{read}")
    lines += [f"buffer {name!r} {tuple(buffer.shape)} {buffer.dtype}" for name, buffer in module.named_buffers()]
    return lines
