"""Fabric's helpers that scripts import, by their names there."""

from __future__ import annotations

from typing import Any

from plugframe.fabric.utilities import rank_zero
from plugframe.fabric.utilities.apply_func import move_data_to_device
from plugframe.fabric.utilities.data import AttributeDict, suggested_max_num_workers
from plugframe.fabric.utilities.rank_zero import rank_zero_debug, rank_zero_deprecation, rank_zero_info, rank_zero_warn
from plugframe.fabric.utilities.throughput import Throughput, ThroughputMonitor, measure_flops

__all__ = [
    "AttributeDict",
    "Throughput",
    "ThroughputMonitor",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_warn",
    "suggested_max_num_workers",
]


def __getattr__(name: str) -> Any:
    return getattr(rank_zero, name)  # rank_zero_only, which is plugframe's own
