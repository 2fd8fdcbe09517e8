"""The contract of an environment: who started the processes, and what it says about them."""

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
        """Say whether this process was started by this environment, from its environment variables.

        Called while the plan is made, in every process, if all of the descriptor's `variables` are set.
        """
        ...

    @provider
    def environment_launched(self) -> bool:
        """Say whether the job's processes exist already, so that nothing has to be launched.

        Called while the plan is made, of the environment that was selected.
        """
        ...

    @provider
    def environment_world(self) -> World:
        """Return where this process stands. Called while the plan is made, if `environment_launched`.

        Raises:
            EnvironmentMismatchError: if the variables are incomplete or contradict each other; the message names
                the variable, its value and what to type.
        """
        ...

    @provider
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        """Compare what was asked (processes on each node, nodes; None where nothing was) with what is there.

        Called while the plan is made, if `environment_launched`.

        Raises:
            EnvironmentMismatchError: naming both figures, where each comes from, and what to type.
        """
        ...

    @provider
    def environment_requeue(self) -> bool:
        """Have whoever started the job start it again once it has ended; say whether that was asked for.

        Called on global rank 0 by ``lite.requeue()``.
        """
        ...

    @provider
    def environment_store(self, context: Context, timeout_s: float) -> Any:
        """Return the ``torch.distributed.Store`` at which the ranks of the job meet.

        Called once on every rank by the collective plugin. On one node it listens on loopback only.
        """
        ...
