"""The collective contract suite: result shapes for any world size, and errors where ranks differ."""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest
import torch

from plugframe.errors import UnsupportedError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe.testing.contracts import collective_ranks as ranks
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.batches import run_batch, tell
from plugframe.testing.contracts.placed import accelerator_for, context_of
from plugframe.testing.contracts.running import broken, once, one_line

ONE_RANK = "One rank (a collective for one rank is refused with more: each would compute by itself)"


class CollectiveContract(PluginContract):
    """Subclass it and set `spec`. It starts two jobs, of one rank and of two.

    ``ranks="one"`` in the descriptor leaves out the job of two ranks.

    Attributes:
        dtypes: those that it supports.
        timeout_s: limit of one job with all its checks.
    """

    kind = "collective"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    timeout_s: ClassVar[float] = 120.0

    def reports(self, num_ranks: int) -> dict[str, str]:
        """Run all checks on that many ranks, once for the suite; return a report for each, by its name."""
        if num_ranks > 1 and self.descriptor.ranks == "one":
            pytest.skip("It works with one rank only.")
        if num_ranks > 1 and "simulated" in self.descriptor.provides:
            pytest.skip("Its other ranks do not exist.")
        self.make()
        settings = ranks.Settings(
            spec=self.spec,
            options=dict(self.options),
            accelerator=accelerator_for(self.descriptor, num_ranks).qualified,
            provides=self.descriptor.provides,
            dtypes=self.dtypes,
        )

        def run() -> dict[str, str]:
            found: dict[str, str] = {}
            for make, checks in ((ranks.connected, ranks.CONNECTED), (ranks.apart, ranks.APART)):
                given = functools.partial(make, settings=settings)
                found |= run_batch(num_ranks, given, checks, timeout_s=self.timeout_s)
            return found

        return once(self, f"{num_ranks} ranks", run)

    @pytest.mark.parametrize("num_ranks", [1, 2])
    @pytest.mark.parametrize("check", [check.__name__ for check in (*ranks.CONNECTED, *ranks.APART)])
    def test_on_ranks(self, check: str, num_ranks: int) -> None:
        """The check passes on that many ranks."""
        tell(self.reports(num_ranks)[check])

    def test_more_ranks_than_it_connects_are_refused(self) -> None:
        """Set-up of a collective for one rank raises with more, with their number."""
        if self.descriptor.ranks != "one":
            pytest.skip("It connects any number of ranks.")
        context = self._context(World(world_size=2, local_world_size=2))
        plugin = self.make()
        try:
            plugin.collective_setup(context=context)
        except UnsupportedError as error:
            if "2" not in str(error):
                broken(ONE_RANK, f"the message does not say how many ranks there are: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(ONE_RANK, f"set-up on one of 2 ranks raised {one_line(error)}, not an UnsupportedError")
        else:
            broken(ONE_RANK, "set-up on one of 2 ranks raised nothing")
        finally:
            plugin.collective_teardown()

    def _context(self, world: World) -> Context:
        accelerator = self.registry.make(accelerator_for(self.descriptor))
        device = accelerator.accelerator_device(index=0)
        return context_of(accelerator, device=device, world=world, names={self.kind: self.entry.name})
