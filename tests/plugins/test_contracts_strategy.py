"""Every built-in strategy passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

import tempfile

from contract_classes import of_builtins
from plugframe.testing import StrategyContract

PLAN = {"enter": "colwise", "leave": "rowwise"}

#: What offloads to disks needs libaio besides, and is not run.
#: Variants of one implementation, of which one goes through all: with several ranks they differ, with one hardly.
VARIANTS = ("stage_1", "stage_2", "stage_1_offload", "stage_2_offload", "stage_3_offload")

globals().update(
    of_builtins(
        "strategy",
        StrategyContract,
        tensor_parallel={"options": {"plan": PLAN}},
        deepspeed_stage_3_offload_nvme={"options": {"nvme_path": tempfile.gettempdir()}, "num_ranks": ()},
        **{f"deepspeed_{variant}": {"num_ranks": (2,)} for variant in VARIANTS},
    )
)
