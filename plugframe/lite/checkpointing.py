"""Save, load and preemption methods of `Lite`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from plugframe.adopt import state_of
from plugframe.hooks.checkpoint import SaveHandle
from plugframe.hooks.context import Context
from plugframe.launch.preemption import PreemptionHandler
from plugframe.state import saving
from plugframe.state.filters import Filter
from plugframe.state.full import full_state_dict
from plugframe.state.manager import CheckpointManager
from plugframe.state.parameter_names import ParameterNamer, ParameterNames, names_of
from plugframe.utils.logging import failing, tell, warn_caller

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite


def save(
    lite: Lite, path: Any, state: Any, *, filter: Mapping[str, Filter] | None = None, info: Any = None, wait: bool
) -> SaveHandle | None:
    """Write `state` at `path`; see `Lite.save`.

    Args:
        info: plain values for the manifest.
    """
    lite._started("save")
    job = lite._job_state
    if job.accumulating and lite.is_global_zero:
        warn_caller(
            "lite.save() in the middle of an accumulated step: its gradients so far, and batches read for it, "
            "are not in the checkpoint. Save under `if not lite.accumulating:`."
        )
    return saving.save(
        lite._session,
        path,
        state,
        filters=filter,
        loaders=lite._loaders,
        plugins=lite._plugin_states,
        namer=_naming(lite),
        wait=wait,
        info=info,
    )


def load(lite: Lite, path: Any, state: Any, *, strict: bool, trusted: bool, rng: bool) -> dict[str, Any]:
    """Load the checkpoint at `path` into the objects of `state`; see `Lite.load`."""
    lite._started("load")
    return saving.load(
        lite._session,
        path,
        state,
        strict=strict,
        loaders=lite._loaders,
        plugins=lite._plugin_states,
        namer=_naming(lite),
        trusted=trusted,
        rng=rng,
    )


def load_raw(lite: Lite, path: Any, obj: Any, *, strict: bool, trusted: bool) -> None:
    """Load the bare ``state_dict`` at `path` into `obj`."""
    lite._started("load_raw")
    saving.load_raw(lite._session, path, obj, strict=strict, namer=_naming(lite), trusted=trusted)


def state_dict(lite: Lite, obj: nn.Module | Optimizer, *, all_ranks: bool) -> dict[str, Any]:
    """Return the full state of a module or an optimizer, as in a single process."""
    lite._started("state_dict")
    return full_state_dict(lite._session, obj, all_ranks=all_ranks, namer=_naming(lite))


def checkpoints(
    lite: Lite,
    folder: Any,
    *,
    keep_last: int | None,
    keep_best: tuple[str, str, int] | None,
    every_s: float | None,
) -> CheckpointManager:
    """Return the checkpoint manager for `folder`."""
    lite._started("checkpoints")
    return CheckpointManager(
        lite._session,
        saving.checked_path(folder),
        save=functools.partial(save, lite),
        load=lite.load,
        keep_last=keep_last,
        keep_best=keep_best,
        every_s=every_s,
    )


def should_stop(lite: Lite) -> bool:
    """Return whether any rank received a stop signal, or a plugin requests a stop, the same on all ranks."""
    context, handler = lite._started("should_stop"), lite._preemption
    reported = handler.reason
    stop = handler.should_stop(lite._hooks, context.stop_requests)
    if handler.reason and not reported and lite.is_global_zero:
        tell(f"A plugin requests to stop, on {handler.reason.rstrip('.')}.")
    return stop


def warn_of_unread_requests(handler: PreemptionHandler, context: Context) -> None:
    """Warn at tear-down of requests to stop that had no effect, since the script never read ``lite.should_stop``."""
    if context.stop_requests and not handler.was_read and not failing():
        warn_caller(
            f"A plugin requested to stop ({context.stop_requests[0].rstrip('.')}), and the script never read "
            "lite.should_stop: leave the loop when it is True."
        )


def requeue(lite: Lite) -> bool:
    """Requeue this job with the scheduler; return whether there is a scheduler that supports it."""
    lite._started("requeue")
    asked = lite._hooks.environment_requeue() if lite.is_global_zero else None
    return bool(lite._hooks.collective_broadcast_object(obj=asked, src=0, group=None))


def _naming(lite: Lite) -> ParameterNamer:
    """Return the parameters of an optimizer for naming: current, or as set up if the strategy hides them."""

    def naming(optimizer: Optimizer) -> ParameterNames | None:
        found = names_of(optimizer, lite._living())
        return found or getattr(state_of(optimizer), "names", None)

    return naming
