"""The collective of a single rank: what the base does, and nothing else."""

from __future__ import annotations

from plugframe.base import Collective
from plugframe.errors import UnsupportedError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class OneRank(Collective):
    """Answer every collective with this rank's own input; refuse more than one rank."""

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        if context.world.world_size > 1:
            raise UnsupportedError(
                f"collective='single' connects no ranks, and this job has {context.world.world_size}: "
                "use collective='torch', or devices=1."
            )
        super().collective_setup(context)
