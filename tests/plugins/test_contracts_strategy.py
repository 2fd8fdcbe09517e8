"""Every built-in strategy passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

import tempfile

from contract_classes import of_builtins
from plugframe.testing import StrategyContract

PLAN = {"enter": "colwise", "leave": "rowwise"}

#: Variants of one implementation, which hardly differ on one rank: these run on two ranks only.
VARIANTS = ("stage_1", "stage_2", "stage_1_offload", "stage_2_offload", "stage_3_offload")

globals().update(
    of_builtins(
        "strategy",
        StrategyContract,
        tensor_parallel={"options": {"plan": PLAN}},
        pipeline={"options": {"split": ["leave"]}},
        # Offloading to disks needs libaio.
        deepspeed_stage_3_offload_nvme={"options": {"nvme_path": tempfile.gettempdir()}, "num_ranks": ()},
        **{f"deepspeed_{variant}": {"num_ranks": (2,)} for variant in VARIANTS},
    )
)
