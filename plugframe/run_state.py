"""What an exact resume needs besides the user's objects: loss scaler, random generators, positions of loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from plugframe.adopt.reading import Loaders
from plugframe.base.telling import warn_caller
from plugframe.checkpoint.stored import materialize
from plugframe.seed import rng_problem, rng_state, set_rng_state
from plugframe.session import Session
from plugframe.state import Restore


def run_state(session: Session, loaders: Loaders) -> dict[str, Any]:
    """Return it, of all ranks. Every rank must call it."""
    hooks = session.hooks
    common, own = loaders.where()
    mine = {**rng_state(), "loaders": own}
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
        self._num_saved = 0
        self._mine: dict[str, Any] | None = None

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
        if self._num_saved != self._session.world.world_size:
            self._tell_of_ranks()
        elif self._rng and self._mine is not None:
            if "device" in self._mine:
                self._session.hooks.accelerator_set_rng_state(state=self._mine["device"], device=self._session.device)
            set_rng_state(self._mine)

    def _problem(self) -> str | None:
        try:
            self._run = materialize(self._run)
            if not isinstance(self._run["precision"], dict):
                return "the state of the loss scaler is none"
            ranks, common = self._run["rng"], self._run["loaders"]
            self._num_saved = len(ranks)
            if self._num_saved == self._session.world.world_size:
                self._mine = dict(ranks[self._session.world.global_rank])
                own = self._mine["loaders"]
            else:
                own = None
        except Exception as error:  # noqa: BLE001 a file may hold anything
            return f"what it holds of the run is not what was saved: {type(error).__name__}: {error}"
        if self._rng and self._mine is not None:
            problem = rng_problem(self._mine) or self._device_problem(self._mine) or self._loaders.problem(common, own)
            return problem and f"{problem}: pass rng=False to go on without the states of random generators"
        if self._mine is not None:
            self._mine["loaders"] = own = {
                number: {key: value for key, value in each.items() if key not in ("rng", "generators")}
                for number, each in own.items()
            }
        return self._loaders.problem(common, own)

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
        self._loaders.go_on(self._run["loaders"], None if self._mine is None else self._mine["loaders"])

    def _tell_of_ranks(self) -> None:
        world = self._session.world
        if world.global_rank == 0:
            begun = any(kept["position"] for kept in self._run["loaders"]["known"])
            what = " An epoch that had begun begins anew." if begun else ""
            message = (
                f"The random generators were not restored: {self._num_saved} ranks saved, {world.world_size} load."
            )
            warn_caller(message + what)
