"""The environment contract: detect the scheduler or launcher and read each rank's position from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import provider
from plugframe.hooks.world import World

if TYPE_CHECKING:
    from plugframe.hooks.context import Context


class EnvironmentSpec(Protocol):
    """Hooks of the kind ``environment``: a scheduler, a launcher, or a bare shell."""

    @provider
    def environment_detect(self) -> bool:
        """Return whether this environment started the process, judging by its environment variables.

        Called while the plan is made, in every process, if all of the descriptor's `variables` are set.
        """
        ...

    @provider
    def environment_launched(self) -> bool:
        """Return whether the job's processes exist already, so that nothing has to be launched.

        Called while the plan is made, on the selected environment.
        """
        ...

    @provider
    def environment_world(self) -> World:
        """Return this process's `World`. Called while the plan is made, if `environment_launched`.

        Raises:
            EnvironmentMismatchError: if the variables are incomplete or contradict each other; the message names
                the variable, its value and the fix.
        """
        ...

    @provider
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        """Check the requested processes per node and nodes (None where not requested) against the actual numbers.

        Called while the plan is made, if `environment_launched`.

        Raises:
            EnvironmentMismatchError: naming both numbers, their sources and the fix.
        """
        ...

    @provider
    def environment_requeue(self) -> bool:
        """Ask the scheduler to start the job again once it has ended; return whether the request was made.

        Called on global rank 0 by ``lite.requeue()``.
        """
        ...

    @provider
    def environment_store(self, context: Context, timeout_s: float) -> Any:
        """Return the ``torch.distributed.Store`` for the rendezvous of the job's ranks.

        Called once on every rank by the collective plugin. On one node it listens on loopback only.
        """
        ...
