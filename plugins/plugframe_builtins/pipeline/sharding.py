"""Stages whose parameters another strategy shards, and whose layers further ones transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from plugframe.errors import UnsupportedError
from plugframe.hooks.context import Context
from plugframe_builtins._shared.fully_shard.part_sharding import check_options
from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy
from plugframe_builtins._shared.stage_view import StageView, meta_copy
from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.cut import Cut


def sharding_base(context: Context) -> FullyShardedStrategy:
    """Set up and return the strategy that divides the batch, which shards the stages and averages their gradients.

    Raises:
        UnsupportedError: if it shards in another way than with ``fully_shard``.
    """
    base = context.base
    if not isinstance(base, FullyShardedStrategy):
        raise UnsupportedError(
            f"strategy 'pipeline' does not know how {type(base).__name__} shards a model, and cannot have it shard "
            "stages: use 'fsdp+pipeline' or 'ddp+pipeline'."
        )
    check_options(base, "pipeline")
    base.strategy_setup(replace(context, parallelize=None, base=None))
    return base


def parallelize_stages(
    module: nn.Module, cut: Cut, axis: Axis, parallelize: Callable[[nn.Module], None] | None
) -> dict[str, nn.Module]:
    """Apply the other strategies to the stages of this rank; return modules by path that compute shapes of results.

    A rank with several stages computes shapes only for those before the one that it runs.
    """
    if parallelize is None:
        return {}
    stages = range(axis.rank, cut.num_stages, axis.size)
    earlier = {path: module.get_submodule(path) for path, stage in cut.units.items() if stage in stages[:-1]}
    copies = {path: meta_copy(part) for path, part in earlier.items()}
    for stage in stages:
        view = StageView(module, cut.units, stage)
        parallelize(view.module)
        view.put_back()
    return copies
