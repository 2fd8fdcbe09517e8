"""State of a run besides the user's objects: loss scaler, random generators, positions of loaders, plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plugframe.checkpoint.stored import materialize
from plugframe.core.runtime.session import Session
from plugframe.data.loaders import Loaders
from plugframe.data.random_streams import RankStreams, on_restore
from plugframe.data.seed import PROCESS, mix
from plugframe.errors import CheckpointError
from plugframe.state.plugins import PluginStates
from plugframe.state.tree import Restore
from plugframe.utils.logging import warn_caller
from plugframe.utils.rng import load_rng_state, rng_state, rng_state_problem


def run_state(session: Session, loaders: Loaders, plugins: PluginStates, path: str, *, sharded: bool) -> dict[str, Any]:
    """Return the state of the run, of all ranks. Every rank must call it.

    Args:
        path: of the checkpoint, for messages.
        sharded: whether tensors may be a ``DTensor``.
    """
    hooks = session.hooks
    common, own = loaders.capture()
    mine = {**rng_state(), "loaders": own, "index": hooks.strategy_data_shard()[0]}
    common_rng = PROCESS.streams.state() if PROCESS.streams is not None else None
    if common_rng is not None:
        mine["common"] = common_rng
    device = hooks.accelerator_rng_state(device=session.device)
    if device is not None:
        mine["device"] = device
    epochs = [saved["epoch"] for saved in common["known"]]
    ranks = hooks.collective_all_gather_object(obj=(mine, epochs, plugins.names), group=None)
    _check_same_plugins([names for _, _, names in ranks], path)
    begun = [each for _, each, _ in ranks]
    if session.world.global_rank == 0 and any(others != epochs for others in begun):
        warn_caller(
            f"The ranks have begun different numbers of epochs of their loaders ({begun}), and "
            "now read the data in different orders: iterate a loader on all ranks or on none."
        )
    return {
        "precision": hooks.precision_state(),
        "rng": [each for each, _, _ in ranks],
        "loaders": common,
        "plugins": plugins.collect(path, sharded=sharded),
    }


def _check_same_plugins(names: Sequence[Sequence[str]], path: str) -> None:
    for rank, each in enumerate(names):
        odd = sorted(set(each) ^ set(names[0]))
        if odd:
            raise CheckpointError(
                f"cannot save {path}, nothing was written: {odd[0]} is in use on rank {rank if odd[0] in each else 0} "
                f"and not on rank {0 if odd[0] in each else rank}: use plugins with state on all ranks."
            )


class RunState:
    """Restores a saved state of a run.

    Args:
        run: result of `run_state`, unvalidated.
        plugins: the plugins with state in use.
        rng: whether to restore the states of the random generators.
    """

    def __init__(self, session: Session, run: Any, loaders: Loaders, plugins: PluginStates, *, rng: bool) -> None:
        self._session = session
        self._run = run
        self._loaders = loaders
        self._plugins = plugins
        # Apart from the rest, which is read completely. Absent from checkpoints of older versions.
        self._saved_plugins = self._run.pop("plugins", {}) if isinstance(self._run, dict) else {}
        self._rng = rng
        # Saved by the rank with this rank's data shard, or by rank 0 if there was none.
        self._own: dict[str, Any] = {}
        self._has_own = self._restarts_epoch = False
        self._warning = ""

    def plan(self, restore: Restore) -> None:
        """Validate the state, and add what can be undone to the actions of `restore`; problems are added too."""
        problem = self._problem()
        if problem is not None:
            restore.problems.append(problem)
            return
        hooks = self._session.hooks
        restore.add_action(
            "the loss scaler",
            snapshot=self._snapshot_scaler,
            apply=lambda: hooks.precision_load_state(state=self._run["precision"]),
        )
        restore.add_action("the loaders", snapshot=self._loaders.snapshot, apply=self._resume_loaders)
        self._plugins.plan(self._saved_plugins, restore)

    def finish(self) -> None:
        """Restore the random generators, last: loading other objects may have drawn from them."""
        if self._rng:
            hooks, device = self._session.hooks, self._session.device
            if "device" in self._own:
                hooks.accelerator_set_rng_state(state=self._own["device"], device=device)
            load_rng_state(self._own)
            on_restore(self._own.get("common"))
            self._seed_new_rank()
        warnings = [self._warning, self._plugins.unmatched(self._saved_plugins)]
        for warning in warnings if self._session.world.global_rank == 0 else ():
            if warning:
                warn_caller(warning)

    def _seed_new_rank(self) -> None:
        """Seed a rank whose data shard no rank saved, if random numbers differed between ranks."""
        saved = self._run["rng"]
        differ = len(_by_shard(saved)) > 1 and "common" in saved[0]
        if not self._has_own and (differ or PROCESS.per_rank):
            index, count = self._session.hooks.strategy_data_shard()
            streams = RankStreams(index=index, count=count, hooks=self._session.hooks)
            streams.seed_rank(mix(saved[0]["torch"].tolist()))

    def _problem(self) -> str | None:
        try:
            self._run = materialize(self._run)
            if not isinstance(self._run["precision"], dict):
                return "the state of the loss scaler is invalid"
            self._choose()
            common, own = self._run["loaders"], self._own["loaders"]
        except Exception as error:  # noqa: BLE001 a file may hold anything
            return f"the state of the run is invalid: {type(error).__name__}: {error}"
        without = {
            number: {key: value for key, value in each.items() if key not in ("rng", "generators", "held")}
            for number, each in own.items()
        }
        problem = self._loaders.problem(common, without)
        if problem is not None or not self._rng:
            self._own["loaders"] = without
            return problem
        problem = rng_state_problem(self._own) or self._device_problem(self._own) or self._loaders.problem(common, own)
        return problem and f"{problem}: pass rng=False to load without the states of random generators"

    def _choose(self) -> None:
        """Choose the state for this rank among those that the ranks saved."""
        saved: list[Mapping[str, Any]] = self._run["rng"]
        world, (index, count) = self._session.world, self._session.hooks.strategy_data_shard()
        shards = _by_shard(saved)
        mine = saved[world.global_rank] if len(saved) == world.world_size else shards.get(index)
        if mine is not None and mine.get("index", index) != index:
            mine = shards.get(index)  # the same number of ranks, with other data shards
        self._own, self._has_own = dict(mine or saved[0]), mine is not None
        others = len(saved) != world.world_size
        # A position without layout, saved by an older plugframe, holds for the same number of ranks only.
        self._restarts_epoch = others and any(
            k["position"] and "layout" not in k for k in self._run["loaders"]["known"]
        )
        # Where all ranks drew the same numbers, they continue to, whatever their data shards.
        if others or ("common" in saved[0] and len(shards) != count):
            what = " An epoch that had begun starts from its beginning." if self._restarts_epoch else ""
            generators = _other_ranks(len(saved), world.world_size, new=count - len(shards)) if self._rng else ""
            self._warning = (generators + what).strip()

    def _device_problem(self, mine: Mapping[str, Any]) -> str | None:
        """Try to load the state of the device's generator, and restore the current one."""
        if "device" not in mine:
            return None
        hooks, device = self._session.hooks, self._session.device
        now = hooks.accelerator_rng_state(device=device)
        if now is None:
            return None
        try:
            hooks.accelerator_set_rng_state(state=mine["device"], device=device)
        except Exception as error:  # noqa: BLE001 a file may hold anything
            return f"the state of the device's generator does not fit {device} ({type(error).__name__}: {error})"
        finally:
            hooks.accelerator_set_rng_state(state=now, device=device)
        return None

    def _snapshot_scaler(self) -> Callable[[], object]:
        hooks = self._session.hooks
        before = hooks.precision_state()
        return lambda: hooks.precision_load_state(state=before)

    def _resume_loaders(self) -> None:
        # Values that determine the order of samples are the same on all ranks.
        own = None if self._restarts_epoch else self._own["loaders"]
        self._loaders.resume(self._run["loaders"], own, same=self._has_own)


def _by_shard(saved: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Return the saved states by index of the data shard."""
    return {each.get("index", rank): each for rank, each in enumerate(saved)}


def _other_ranks(before: int, now: int, *, new: int) -> str:
    """Return a message on the random numbers if a different number of ranks loads."""
    if new > 0:
        what = f"{new} new one{'s' * (new != 1)} with numbers derived from those of the first"
    else:
        what = "those of the others are left out"
    ranks = f"{before} rank{'s' * (before != 1)} saved, {now} load"
    return f"{ranks}: each continues with the random numbers of its data shard, {what}."
