"""Every built-in strategy passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

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
        # Offloading to disks needs libaio.
        deepspeed_stage_3_offload_nvme={"options": {"nvme_path": tempfile.gettempdir()}, "num_ranks": ()},
        **{f"deepspeed_{variant}": {"num_ranks": (2,)} for variant in VARIANTS},
    )
)
