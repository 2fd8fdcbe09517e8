"""The collective of a single rank: the base class with a check."""

from __future__ import annotations

from plugframe.base import Collective
from plugframe.errors import UnsupportedError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class OneRank(Collective):
    """Return this rank's input from every collective; refuse more than one rank."""

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        if context.world.world_size > 1:
            raise UnsupportedError(
                f"collective='single' connects no ranks, and this job has {context.world.world_size}: "
                "use collective='torch', or devices=1."
            )
        super().collective_setup(context)
