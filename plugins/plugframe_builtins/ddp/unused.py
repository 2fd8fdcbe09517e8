"""A parameter that got no gradient on a rank, for which the others wait."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from plugframe.errors import CollectiveMismatchError

_TORCHS = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")


def without_gradient(names: Sequence[str]) -> CollectiveMismatchError:
    """Return the error for parameters without a gradient on this rank."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return CollectiveMismatchError(
        f"Parameter {names[0]!r}{more} got no gradient on rank {dist.get_rank()}, and strategy 'ddp' waits for that of "
        "every rank: let the loss of every rank depend on it, freeze it with requires_grad_(False), or type "
        "--strategy.find-unused-parameters."
    )


def torchs_missing(error: RuntimeError, module: nn.Module) -> list[str]:
    """Return the names of the parameters that torch found without a gradient at the next forward, if it is that."""
    found = _TORCHS.search(str(error))
    if found is None or "Expected to have finished reduction" not in str(error):
        return []
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    numbers = [int(number) for number in found.group(1).split()]
    return [trained[number] for number in numbers if number < len(trained)]
