"""The strategy of a single rank: the base class with a check."""

from __future__ import annotations

from plugframe.base import Strategy
from plugframe.errors import UnsupportedError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class SingleRank(Strategy):
    """Leave module, optimizers and data as they are; refuse more than one rank."""

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        if context.world.world_size > 1:
            raise UnsupportedError(
                f"strategy='single' works on one rank, and this job has {context.world.world_size}: "
                "use strategy='ddp', or devices=1."
            )
        super().strategy_setup(context)
