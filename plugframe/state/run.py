"""What an exact resume needs besides the user's objects: loss scaler, random generators, positions of loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plugframe.checkpoint.stored import materialize
from plugframe.core.runtime.session import Session
from plugframe.data.loaders import Loaders
from plugframe.data.random_streams import RankStreams, restored
from plugframe.data.seed import PROCESS, mix, rng_problem, rng_state, set_rng_state
from plugframe.state.tree import Restore
from plugframe.utils.logging import warn_caller


def run_state(session: Session, loaders: Loaders) -> dict[str, Any]:
    """Return it, of all ranks. Every rank must call it."""
    hooks = session.hooks
    common, own = loaders.where()
    mine = {**rng_state(), "loaders": own, "index": hooks.strategy_data_shard()[0]}
    common_draws = PROCESS.streams.state() if PROCESS.streams is not None else None
    if common_draws is not None:
        mine["common"] = common_draws
    device = hooks.accelerator_rng_state(device=session.device)
    if device is not None:
        mine["device"] = device
    epochs = [kept["epoch"] for kept in common["known"]]
    ranks = hooks.collective_all_gather_object(obj=(mine, epochs), group=None)
    if session.world.global_rank == 0 and any(others != epochs for _, others in ranks):
        warn_caller(
            f"The ranks have begun different numbers of epochs of their loaders ({[each for _, each in ranks]}), and "
            "now read the data in different orders: begin to read a loader on all ranks or on none."
        )
    return {"precision": hooks.precision_state(), "rng": [each for each, _ in ranks], "loaders": common}


class RunState:
    """A saved one, to be put back.

    Args:
        run: what `run_state` gave; a file may hold anything in its place.
        rng: whether to restore the states of the random generators.
    """

    def __init__(self, session: Session, run: Any, loaders: Loaders, *, rng: bool) -> None:
        self._session = session
        self._run = run
        self._loaders = loaders
        self._rng = rng
        # What the rank saved that had this rank's share of the data, or rank 0 in its place.
        self._own: dict[str, Any] = {}
        self._has_own = self._begins_anew = False
        self._told = ""

    def plan(self, restore: Restore) -> None:
        """Check everything, and plan what can be undone. Problems are those of the whole load."""
        problem = self._problem()
        if problem is not None:
            restore.problems.append(problem)
            return
        hooks = self._session.hooks
        restore.also(
            "the loss scaler",
            remember=self._scaler,
            act=lambda: hooks.precision_load_state(state=self._run["precision"]),
        )
        restore.also("the loaders", remember=self._loaders.remember, act=self._go_on)

    def finish(self) -> None:
        """Put back the random generators, last of all: what was written before may have drawn from them."""
        if self._rng:
            hooks, device = self._session.hooks, self._session.device
            if "device" in self._own:
                hooks.accelerator_set_rng_state(state=self._own["device"], device=device)
            set_rng_state(self._own)
            restored(self._own.get("common"))
            self._draw_apart()
        if self._told and self._session.world.global_rank == 0:
            warn_caller(self._told)

    def _draw_apart(self) -> None:
        """Give a rank that no rank saved for numbers of its own, where the ranks had such."""
        saved = self._run["rng"]
        apart = len(_shares(saved)) > 1 and "common" in saved[0]
        if not self._has_own and (apart or PROCESS.per_rank):
            index, count = self._session.hooks.strategy_data_shard()
            streams = RankStreams(index=index, count=count, hooks=self._session.hooks)
            streams.seed_apart(mix(saved[0]["torch"].tolist()))

    def _problem(self) -> str | None:
        try:
            self._run = materialize(self._run)
            if not isinstance(self._run["precision"], dict):
                return "the state of the loss scaler is none"
            self._choose()
            common, own = self._run["loaders"], self._own["loaders"]
        except Exception as error:  # noqa: BLE001 a file may hold anything
            return f"what it holds of the run is not what was saved: {type(error).__name__}: {error}"
        without = {
            number: {key: value for key, value in each.items() if key not in ("rng", "generators", "held")}
            for number, each in own.items()
        }
        problem = self._loaders.problem(common, without)
        if problem is not None or not self._rng:
            self._own["loaders"] = without
            return problem
        problem = rng_problem(self._own) or self._device_problem(self._own) or self._loaders.problem(common, own)
        return problem and f"{problem}: pass rng=False to go on without the states of random generators"

    def _choose(self) -> None:
        """Choose what this rank goes on with of what the ranks saved that there were."""
        saved: list[Mapping[str, Any]] = self._run["rng"]
        world, (index, count) = self._session.world, self._session.hooks.strategy_data_shard()
        shares = _shares(saved)
        mine = saved[world.global_rank] if len(saved) == world.world_size else shares.get(index)
        if mine is not None and mine.get("index", index) != index:
            mine = shares.get(index)  # as many ranks, which now share the data in another way
        self._own, self._has_own = dict(mine or saved[0]), mine is not None
        others = len(saved) != world.world_size
        # A place that an older plugframe saved holds for as many ranks alone.
        self._begins_anew = others and any(k["position"] and "layout" not in k for k in self._run["loaders"]["known"])
        # Where all ranks drew alike, those that share the data in another way draw on alike.
        if others or ("common" in saved[0] and len(shares) != count):
            what = " An epoch that had begun begins anew." if self._begins_anew else ""
            self._told = _other_ranks(len(saved), world.world_size, new=count - len(shares)) + what

    def _device_problem(self, mine: Mapping[str, Any]) -> str | None:
        """Try the state of the device's generator, and put back what it had."""
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

    def _scaler(self) -> Callable[[], object]:
        hooks = self._session.hooks
        before = hooks.precision_state()
        return lambda: hooks.precision_load_state(state=before)

    def _go_on(self) -> None:
        # What the order of samples goes by is the same on all ranks.
        own = None if self._begins_anew else self._own["loaders"]
        self._loaders.go_on(self._run["loaders"], own, same=self._has_own)


def _shares(saved: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Return what was saved by the index of the share of the data."""
    return {each.get("index", rank): each for rank, each in enumerate(saved)}


def _other_ranks(before: int, now: int, *, new: int) -> str:
    """Say what becomes of random numbers where another number of ranks loads."""
    if new > 0:
        what = f"{new} new one{'s' * (new != 1)} with numbers derived from those of the first"
    else:
        what = "those of the others are left out"
    ranks = f"{before} rank{'s' * (before != 1)} saved, {now} load"
    return f"{ranks}: each goes on with the random numbers of its share of the data, {what}."
