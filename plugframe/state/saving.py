"""Saving and loading the state of a run through the checkpoint plugin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from plugframe import __version__
from plugframe.checkpoint.stored import materialize
from plugframe.core.runtime.session import Session
from plugframe.data.loaders import Loaders
from plugframe.errors import CheckpointError, SettingError
from plugframe.hooks.checkpoint import SaveHandle
from plugframe.state.parameter_names import Naming
from plugframe.state.run import RunState, run_state
from plugframe.state.tree import Filter, Restore, check_held, collect
from plugframe.utils.logging import warn_caller

#: The key of a checkpoint under which plugframe keeps what an exact resume needs besides the user's objects.
RUN = "__plugframe__"


def checked_path(path: Any) -> str:
    """Return a path as text.

    Raises:
        SettingError: for what is no path.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise SettingError(f"A checkpoint's path is a str or a Path, got {path!r}.")
    return os.fspath(path)


class Unwritten:
    """The handle of a save that writes nothing."""

    def wait(self) -> None:
        """Return at once."""

    def done(self) -> bool:
        """Say yes."""
        return True


def save(
    session: Session,
    path: Any,
    state: Any,
    *,
    filters: Mapping[str, Filter] | None,
    loaders: Loaders,
    naming: Naming,
    wait: bool,
    info: Mapping[str, Any] | None = None,
) -> SaveHandle | None:
    """Write `state` and what belongs to the run. Called on every rank."""
    if isinstance(path, Mapping):
        path, state = state, path  # torch.save's order
    target = checked_path(path)
    if not isinstance(state, Mapping):
        raise SettingError(f"save() takes the state as a dict such as {{'model': model}}, got {type(state).__name__}.")
    if RUN in state:
        raise CheckpointError(f"The key {RUN!r} of the state is taken by plugframe itself: choose another name.")
    provides = session.plan.choices["checkpoint"].descriptor.provides
    rank = session.world.global_rank
    if not wait and "async" not in provides and rank == 0:
        name = session.plan.choices["checkpoint"].name
        warn_caller(f"wait=False has no effect: checkpoint {name!r} saves at once.")
    hooks = session.hooks
    tree = collect(state, hooks, sharded="sharded" in provides, naming=naming, filters=filters)
    check_held(tree, session, target)
    tree[RUN] = run_state(session, loaders)
    if session.plan.simulated:
        # The parts of all other ranks would be missing, or this one's in their place.
        warn_caller("Nothing is saved: the other ranks of this job are simulated.")
        return None if wait else Unwritten()
    handle: SaveHandle | None = hooks.checkpoint_save(
        path=target, state=tree, info={**_info(session), **(info or {})}, wait=wait
    )
    if hooks.on_save is not None:
        hooks.on_save(path=target, state=state)
    return handle


def load(
    session: Session,
    path: Any,
    state: Any,
    *,
    strict: bool,
    loaders: Loaders,
    naming: Naming,
    trusted: bool,
    rng: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint into `state` and return what has no place in it. Called on every rank."""
    target = checked_path(path)
    if state is not None and not isinstance(state, dict):
        raise SettingError(
            f"load() takes the state as a dict such as {{'model': model}}, got {type(state).__name__}; "
            "for a single object use load_raw()."
        )
    loaded = session.hooks.checkpoint_load(path=target, trusted=trusted, lazy=_lazy(session))
    run = loaded.pop(RUN, None)
    if state is None:
        return {key: materialize(value) for key, value in loaded.items()}
    restore = Restore(session.hooks, path=target, strict=strict, naming=naming)
    rest = restore.into(state, loaded)
    # Read and tried before anything is written: what can fail must have failed then.
    kept = RunState(session, run, loaders, rng=rng) if run is not None else None
    if kept is not None:
        kept.plan(restore)
    restore.apply()
    _tell(session, _passed_over(restore))
    if kept is not None:
        kept.finish()
    else:
        _tell(
            session,
            f"{target} holds no state of a run: random generators, the loss scaler and the loaders' positions were not "
            "restored.",
        )
    if session.hooks.on_load is not None:
        session.hooks.on_load(path=target)
    return rest


def load_raw(session: Session, path: Any, obj: Any, *, strict: bool, naming: Naming, trusted: bool) -> None:
    """Read a file that holds the bare state of one object. Called on every rank."""
    target = checked_path(path)
    loaded = session.hooks.checkpoint_load(path=target, trusted=trusted, lazy=_lazy(session))
    loaded.pop(RUN, None)
    if not (hasattr(obj, "load_state_dict") and hasattr(obj, "state_dict")):
        raise SettingError(f"load_raw() takes an object with load_state_dict(), got {type(obj).__name__}.")
    restore = Restore(session.hooks, path=target, strict=strict, naming=naming)
    restore.into({"object": obj}, {"object": loaded})
    restore.apply()
    _tell(session, _passed_over(restore))


def _passed_over(restore: Restore) -> str:
    what = "; ".join(restore.passed_over)
    return what and f"Not all of {restore.path} was restored, as strict=False allows: {what}."


def _tell(session: Session, message: str) -> None:
    """Warn on rank 0, at the line of the user's call."""
    if message and session.world.global_rank == 0:
        warn_caller(message)


def _info(session: Session) -> dict[str, Any]:
    plan = session.plan
    plugins = {choice.kind: choice.origin for choice in plan.choices.values()}
    return {"plugframe": __version__, "world_size": plan.world_size, "plugins": plugins}


def _lazy(session: Session) -> bool:
    """Say whether ranks keep only their parts of a model, and so should read only those."""
    return "sharded" in session.plan.choices["strategy"].descriptor.provides
