"""Save and load the state of a run through the checkpoint plugin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from plugframe import __version__
from plugframe.checkpoint.stored import materialize
from plugframe.core.runtime.session import Session
from plugframe.data.loaders import Loaders
from plugframe.errors import CheckpointError, SettingTypeError
from plugframe.hooks.checkpoint import SaveHandle
from plugframe.state.filters import Filter
from plugframe.state.module_info import module_infos
from plugframe.state.parameter_names import ParameterNamer
from plugframe.state.plugins import PluginStates
from plugframe.state.run import RunState, run_state
from plugframe.state.tree import Restore, check_rank_keys, collect
from plugframe.utils.logging import warn_caller

#: The key for the state of the run besides the user's objects; see `plugframe.state.run`.
RUN = "__plugframe__"


def checked_path(path: Any) -> str:
    """Return a path as a string.

    Raises:
        SettingError: if it is not a path.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise SettingTypeError(f"A checkpoint's path is a str or a Path, got {path!r}.")
    return os.fspath(path)


class NoOpSaveHandle:
    """The handle of a save that writes nothing, in a simulated job."""

    def wait(self) -> None:
        """Return at once."""

    def done(self) -> bool:
        """Return True."""
        return True


def save(
    session: Session,
    path: Any,
    state: Any,
    *,
    filters: Mapping[str, Filter] | None,
    loaders: Loaders,
    plugins: PluginStates,
    namer: ParameterNamer,
    wait: bool,
    info: Mapping[str, Any] | None = None,
) -> SaveHandle | None:
    """Write `state` and the state of the run. Every rank must call it."""
    if isinstance(path, Mapping):
        path, state = state, path  # torch.save's order
    target = checked_path(path)
    if not isinstance(state, Mapping):
        raise SettingTypeError(
            f"save() takes the state as a dict such as {{'model': model}}, got {type(state).__name__}."
        )
    if RUN in state:
        raise CheckpointError(f"The key {RUN!r} of the state is reserved for plugframe: choose another name.")
    provides = session.plan.choices["checkpoint"].descriptor.provides
    rank = session.world.global_rank
    if not wait and "async" not in provides and rank == 0:
        name = session.plan.choices["checkpoint"].name
        warn_caller(f"wait=False has no effect: checkpoint {name!r} does not save in the background.")
    hooks = session.hooks
    tree = collect(state, hooks, sharded="sharded" in provides, namer=namer, filters=filters)
    check_rank_keys(tree, session, target)
    tree[RUN] = run_state(session, loaders, plugins, target, sharded="sharded" in provides)
    if session.plan.simulated:
        # The shards of the other ranks do not exist.
        warn_caller("Nothing is saved: the other ranks of this job are simulated.")
        return None if wait else NoOpSaveHandle()
    about = {**_info(session), "modules": module_infos(state, tree), **(info or {})}
    handle: SaveHandle | None = hooks.checkpoint_save(path=target, state=tree, info=about, wait=wait)
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
    plugins: PluginStates,
    namer: ParameterNamer,
    trusted: bool,
    rng: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint into `state` and return the keys that `state` does not have. Every rank must call it."""
    target = checked_path(path)
    if state is not None and not isinstance(state, dict):
        raise SettingTypeError(
            f"load() takes the state as a dict such as {{'model': model}}, got {type(state).__name__}; "
            "for a single object use load_raw()."
        )
    loaded = session.hooks.checkpoint_load(path=target, trusted=trusted, lazy=_lazy(session))
    run = loaded.pop(RUN, None)
    if state is None:
        return {key: materialize(value) for key, value in loaded.items()}
    restore = Restore(session.hooks, path=target, strict=strict, namer=namer)
    rest = restore.into(state, loaded)
    # Validated before anything is written.
    run_to_restore = RunState(session, run, loaders, plugins, rng=rng) if run is not None else None
    if run_to_restore is not None:
        run_to_restore.plan(restore)
    restore.apply()
    _warn(session, _ignored_text(restore))
    if run_to_restore is not None:
        run_to_restore.finish()
    else:
        _warn(
            session,
            f"{target} holds no state of a run: random generators, the loss scaler and the loaders' positions were not "
            f"restored{', nor ' * bool(plugins.names)}{', '.join(plugins.names)}.",
        )
    if session.hooks.on_load is not None:
        session.hooks.on_load(path=target)
    return rest


def load_raw(session: Session, path: Any, obj: Any, *, strict: bool, namer: ParameterNamer, trusted: bool) -> None:
    """Load a file that holds the state of one object. Every rank must call it."""
    target = checked_path(path)
    loaded = session.hooks.checkpoint_load(path=target, trusted=trusted, lazy=_lazy(session))
    loaded.pop(RUN, None)
    if not (hasattr(obj, "load_state_dict") and hasattr(obj, "state_dict")):
        raise SettingTypeError(f"load_raw() takes an object with load_state_dict(), got {type(obj).__name__}.")
    restore = Restore(session.hooks, path=target, strict=strict, namer=namer)
    restore.into({"object": obj}, {"object": loaded})
    restore.apply()
    _warn(session, _ignored_text(restore))


def _ignored_text(restore: Restore) -> str:
    problems = "; ".join(restore.ignored)
    return problems and f"Not all of {restore.path} was restored, as strict=False allows: {problems}."


def _warn(session: Session, message: str) -> None:
    """Warn on rank 0, at the line of the user's call."""
    if message and session.world.global_rank == 0:
        warn_caller(message)


def _info(session: Session) -> dict[str, Any]:
    plan = session.plan
    plugins = {choice.kind: choice.origin for choice in plan.choices.values()}
    return {"plugframe": __version__, "world_size": plan.world_size, "plugins": plugins}


def _lazy(session: Session) -> bool:
    """Return whether ranks hold shards of a model, and so should read only those from a checkpoint."""
    return "sharded" in session.plan.choices["strategy"].descriptor.provides
