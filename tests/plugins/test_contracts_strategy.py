"""Every built-in strategy passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contract_classes import of_builtins
from plugframe.testing import StrategyContract

PLAN = {"enter": "colwise", "leave": "rowwise"}

#: Variants of one implementation, which hardly differ on one rank: these run on two ranks only.
VARIANTS = ("stage_1", "stage_2", "stage_1_offload", "stage_2_offload", "stage_3_offload")

#: Checks of the suite that a pipeline refuses by name on two ranks: a model whose modules are called in another order
#: than they are defined in, without a cut of its own, and ranks with different batches.
REFUSED_BY_A_PIPELINE = {
    "models_train_together": "The forward of this Tied calls 'first', of stage 1, before the modules of stage 0",
    "running_statistics_are_equal": "Ranks 0 and 1 call the model with different batches",
}


def _reports_of_a_pipeline(self: Any, num_ranks: int, folder: Path) -> dict[str, str]:
    """Return the reports of the suite; a check in `REFUSED_BY_A_PIPELINE` passes if it is refused with that message."""
    found = dict(StrategyContract.reports(self, num_ranks, folder))
    for check, message in REFUSED_BY_A_PIPELINE.items() if num_ranks > 1 else ():
        found[check] = "" if message in found[check] else f"{check} is not refused with {message!r}: {found[check]}"
    return found


globals().update(
    of_builtins(
        "strategy",
        StrategyContract,
        tensor_parallel={"options": {"plan": PLAN}},
        pipeline={"options": {"split": ["leave"]}, "reports": _reports_of_a_pipeline},
        # Of models without experts; those with experts have tests of their own.
        expert={"options": {"plan": {}}, "num_ranks": (2,)},
        # Offloading to disks needs libaio.
        deepspeed_stage_3_offload_nvme={"options": {"nvme_path": tempfile.gettempdir()}, "num_ranks": ()},
        **{f"deepspeed_{variant}": {"num_ranks": (2,)} for variant in VARIANTS},
    )
)


class Sequences(nn.Module):
    """Sums over a sequence: (n, 3, 6) to (n, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.tanh(self.enter(x)).sum(1))
        return out


def distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return a loss that is not the suite's."""
    return nn.functional.smooth_l1_loss(model(x), y)


def sequences(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs of another shape than the suite's."""
    x = torch.randn(number, 3, 6, generator=torch.Generator().manual_seed(seed))
    return x, x.sum((1, 2), keepdim=True).squeeze(2).expand(-1, 2).contiguous()


class TestOwnLossModelAndData(StrategyContract):
    """The suite takes a model, a loss and data that fit a strategy."""

    spec = "ddp"
    num_ranks = (2,)
    build = Sequences
    loss = staticmethod(distance)
    batch = staticmethod(sequences)
