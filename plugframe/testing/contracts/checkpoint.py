"""The checkpoint contract suite: round trips, verification, errors and clean-up."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from plugframe.checkpoint import fill, materialize
from plugframe.errors import CheckpointError, UnsupportedError
from plugframe.hooks.context import Context
from plugframe.testing.contracts import states
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.checkpoint_damage import Code, attempt, damaged, is_file_path
from plugframe.testing.contracts.checkpoint_ranks import (
    ALIKE,
    ATOMIC,
    PATHS,
    SHARDED,
    check_alone,
    check_pair,
)
from plugframe.testing.contracts.running import broken, chosen, left, listing, once, one_line, running, traces
from plugframe.testing.ranks import RanksFailed, run_ranks

ROUND_TRIP = "Round trip (what was saved is loaded bit for bit)"
VERIFIED = "Verified (a damaged file is refused, and named)"
NO_CODE = "No code (loading never runs code from a file)"
REFUSED = "Refused by key (a value that cannot be saved is a CheckpointError that names its key)"
WAIT = "Waiting (with wait=True the checkpoint is complete on return; otherwise a handle reports completion)"
TOLD = "Told (inspect() reports what was saved)"
CLEAN = "Law 9 (nothing is left behind)"


_UNSAVABLE = (object(), {1, 2}, len, torch.empty(3, device="meta"))


class CheckpointContract(PluginContract):
    """Subclass it and set `spec`.

    ::

        class TestAcme(CheckpointContract):
            spec = "acme"
    """

    kind = "checkpoint"

    #: Further arguments of `Lite(...)` that the plugin needs, such as a collective.
    settings: ClassVar[dict[str, Any]] = {}

    def location(self, folder: Path) -> str:
        """Return where the suite saves; override it for a plugin whose paths are not files."""
        return str(folder / "checkpoint")

    # ------------------------------------------------------------------ one rank

    @pytest.fixture
    def hooks(self) -> Iterator[Any]:
        """The hooks of a job of one rank with this plugin."""
        with self.job() as context:
            yield context.hooks

    @contextmanager
    def job(self) -> Iterator[Context]:
        """Run a job of one rank with this plugin."""
        plugin = chosen(self.kind, self.spec, dict(self.options))
        with running(checkpoint=plugin, **self.settings) as (_, context):
            yield context

    def where(self, folder: Path) -> str:
        """Return a location in a new folder."""
        own = folder / "kept here"
        own.mkdir(exist_ok=True)
        return self.location(own)

    def saved(self, hooks: Any, path: str, state: Any, **info: Any) -> None:
        """Save and wait; a failure breaks the round trip."""
        handle = attempt(ROUND_TRIP, "saving", hooks.checkpoint_save, path=path, state=state, info=info, wait=True)
        if handle is not None:
            broken(WAIT, f"checkpoint_save(wait=True) returned {handle!r}, not None")

    def loaded(self, hooks: Any, path: str, *, lazy: bool = False) -> Any:
        """Load the full state; a failure breaks the round trip."""
        state = attempt(ROUND_TRIP, "loading", hooks.checkpoint_load, path=path, trusted=False, lazy=lazy)
        return materialize(state) if lazy else state

    def unchanged(self, hooks: Any, path: str, state: Any, *, rule: str, after: str) -> None:
        """Check that the checkpoint at `path` still holds `state`."""
        try:
            found = hooks.checkpoint_load(path=path, trusted=False, lazy=False)
        except CheckpointError as error:
            broken(rule, f"after {after} the earlier checkpoint cannot be loaded: {error}")
        differs = states.difference(state, found)
        if differs:
            broken(rule, f"after {after} the earlier checkpoint has changed: {differs}")

    @pytest.mark.parametrize("lazy", [False, True], ids=["at once", "lazily"])
    @pytest.mark.parametrize("what", ["tensors", "values"])
    def test_what_was_saved_comes_back(self, hooks: Any, tmp_path: Path, what: str, lazy: bool) -> None:
        """Every dtype, layout and plain value is restored bit for bit."""
        state = getattr(states, what)()
        path = self.where(tmp_path)
        self.saved(hooks, path, state)
        differs = states.difference(state, self.loaded(hooks, path, lazy=lazy))
        if differs:
            broken(ROUND_TRIP, differs)

    def test_other_values_come_back_or_are_refused(self, hooks: Any, tmp_path: Path) -> None:
        """Other values are restored, or refused by key, but never changed."""
        for key, value in states.more_values().items():
            state, path = {"outer": {key: value}}, self.where(tmp_path)
            try:
                hooks.checkpoint_save(path=path, state=state, info={}, wait=True)
            except CheckpointError as error:
                if key not in str(error):
                    broken(REFUSED, f"{value!r} at state['outer'][{key!r}] was refused with: {error}")
                continue
            differs = states.difference(state, self.loaded(hooks, path))
            if differs:
                broken(ROUND_TRIP, f"{differs}. Values that a format cannot store must be refused")

    def test_a_save_takes_the_place_of_the_one_before(self, hooks: Any, tmp_path: Path) -> None:
        """A save replaces the earlier checkpoint at its path completely, and leaves no other files."""
        path = self.where(tmp_path)
        self.saved(hooks, path, {**states.small(1), "only before": torch.ones(1000)})
        state = states.small(2)
        self.saved(hooks, path, state)
        once = listing(tmp_path)
        differs = states.difference(state, self.loaded(hooks, path))
        if differs:
            broken(ROUND_TRIP, f"saved over an earlier checkpoint: {differs}")
        for number in (3, 4):
            self.saved(hooks, path, states.small(number))
        more = listing(tmp_path)
        if len(more) > len(once):
            broken(CLEAN, f"after 4 saves at one path there are {len(more)} files, after 2 there were {len(once)}")
        beside = sorted(name for name in os.listdir(tmp_path / "kept here") if not path.endswith(name))
        if beside:
            broken(CLEAN, f"a save left, beside the checkpoint {path}, {', '.join(beside)}")

    def test_a_loaded_checkpoint_is_the_callers_own(self, hooks: Any, tmp_path: Path) -> None:
        """Loaded tensors can be modified, and saved over the checkpoint they were loaded from."""
        path, state = self.where(tmp_path), states.small(1)
        self.saved(hooks, path, state)
        first, second = self.loaded(hooks, path), self.loaded(hooks, path)
        first["model"]["layer.weight"].add_(1)
        differs = states.difference(state, second) or states.difference(state, self.loaded(hooks, path))
        if differs:
            broken(ROUND_TRIP, f"modifying a loaded tensor changed another one: {differs}")
        again = attempt(ROUND_TRIP, "loading", hooks.checkpoint_load, path=path, trusted=False, lazy=True)
        try:
            self.saved(hooks, path, again)
        except CheckpointError:
            self.saved(hooks, path, materialize(again))
        self.unchanged(hooks, path, state, rule=ROUND_TRIP, after="saving over itself what was loaded lazily")

    def test_a_stored_tensor_fills_any_target(self, hooks: Any, tmp_path: Path) -> None:
        """Lazy tensors are read into targets of any dtype and layout."""
        path, state = self.where(tmp_path), states.small(1)
        self.saved(hooks, path, state)
        loaded = attempt(ROUND_TRIP, "loading", hooks.checkpoint_load, path=path, trusted=False, lazy=True)
        saved, stored = state["model"]["layer.weight"], loaded["model"]["layer.weight"]
        targets = (torch.empty(16, 9), torch.empty(9, 16).t(), torch.empty(16, 9, dtype=torch.float64))
        for target in targets:
            fill([(target, stored)])
            if not torch.equal(target.to(saved.dtype), saved):
                what = f"{target.dtype} with strides {target.stride()}"
                broken(ROUND_TRIP, f"filling a tensor of {what} from {type(stored).__name__} gave other values")

    def test_a_handle_says_when_the_checkpoint_is_whole(self, hooks: Any, tmp_path: Path) -> None:
        """With wait=False the values at the call are saved; after wait() the checkpoint is complete."""
        path, state = self.where(tmp_path), states.small(1)
        handle = attempt(WAIT, "saving", hooks.checkpoint_save, path=path, state=state, info={}, wait=False)
        if handle is not None and "async" not in self.descriptor.provides:
            broken(WAIT, f"it returned {handle!r} though its descriptor does not say provides=('async',)")
        state["model"]["layer.weight"].zero_()  # the next optimizer step
        if handle is not None:
            attempt(WAIT, "waiting", handle.wait)
            if handle.done() is not True:
                broken(WAIT, "done() is not True after wait() has returned")
        differs = states.difference(states.small(1), self.loaded(hooks, path))
        if differs:
            broken(WAIT, f"changes made after checkpoint_save(wait=False) returned were saved: {differs}")
        if handle is not None:
            save = hooks.checkpoint_save
            self.refuses(save, rule=REFUSED, names=("culprit",), path=path, state={"culprit": len}, info={}, wait=False)

    def test_tear_down_finishes_a_pending_save(self, tmp_path: Path) -> None:
        """Tear-down waits for pending saves, and leaves neither threads nor files."""
        path, before = self.where(tmp_path), traces()
        with self.job() as context:
            attempt(
                WAIT, "saving", context.hooks.checkpoint_save, path=path, state=states.small(1), info={}, wait=False
            )
        found = left(before, traces())
        if found:
            broken(CLEAN, f"after tear-down {found}")
        with self.job() as context:
            differs = states.difference(states.small(1), self.loaded(context.hooks, path))
        if differs:
            broken(WAIT, f"a save that was pending at tear-down is not complete: {differs}")

    def test_it_can_say_what_it_holds(self, hooks: Any, tmp_path: Path) -> None:
        """`inspect`, if there is one, returns the keys, shapes and the information about the run."""
        path, state = self.where(tmp_path), states.small(1)
        self.saved(hooks, path, state, world_size=3, plugins={"strategy": "ours"})
        try:
            contents = self.make().inspect(path)
        except (AttributeError, UnsupportedError):
            pytest.skip("It has no inspect().")
        info = {"world_size": 3, "plugins": {"strategy": "ours"}}
        if {key: contents.info.get(key) for key in info} != info:
            broken(TOLD, f"info was {info} and is reported as {dict(contents.info)}")
        if list(contents.state) != list(state):
            broken(TOLD, f"the state had the keys {list(state)} and is reported with {list(contents.state)}")
        weight = contents.state["model"]["layer.weight"]
        if (tuple(weight.shape), weight.dtype) != ((16, 9), torch.float32):
            broken(TOLD, f"a float32 of shape (16, 9) is reported as {weight.dtype} of shape {tuple(weight.shape)}")

    # ------------------------------------------------------------------ errors

    def refuses(self, call: Any, *, rule: str, names: tuple[str, ...], what: str = "", **arguments: Any) -> None:
        """Check that a call raises a one-line CheckpointError that contains one of `names`."""
        what = what or f"state={arguments.get('state')!r}"
        try:
            result = call(**arguments)
            if hasattr(result, "wait"):
                result.wait()
        except CheckpointError as error:
            if not any(name in str(error) for name in names):
                broken(rule, f"{what} was refused, but the message names none of {', '.join(names)}: {error}")
            if "\n" in str(error).strip():
                broken(rule, f"{what} was refused in {len(str(error).splitlines())} lines, not one: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(rule, f"{what} raised {one_line(error)}, not a CheckpointError")
        else:
            broken(rule, f"{what} was accepted")

    @pytest.mark.parametrize(
        "value", [object(), {1, 2}, len, torch.empty(3, device="meta")], ids=lambda v: type(v).__name__
    )
    def test_what_cannot_be_saved_is_refused_by_key(self, hooks: Any, tmp_path: Path, value: Any) -> None:
        """The error names the key, and the earlier checkpoint remains."""
        path, state = self.where(tmp_path), states.small(1)
        self.saved(hooks, path, state)
        before = listing(tmp_path)
        asked = {"model": torch.ones(2), "outer": {"culprit": [value]}}
        what = f"a {type(value).__name__} at state['outer']['culprit'][0]"
        save = hooks.checkpoint_save
        self.refuses(save, rule=REFUSED, names=("culprit",), what=what, path=path, state=asked, info={}, wait=True)
        self.unchanged(hooks, path, state, rule=ATOMIC, after="a save that was refused")
        extra = listing(tmp_path) - before
        if extra:
            broken(CLEAN, f"a refused save left {', '.join(sorted(extra))}")

    def test_nothing_and_something_else_are_refused(self, hooks: Any, tmp_path: Path) -> None:
        """A path without a checkpoint is an error that names it."""
        if not is_file_path(self.where(tmp_path)):
            pytest.skip("Its paths are no files.")
        folder, text, empty = tmp_path / "a folder", tmp_path / "notes.txt", tmp_path / "an empty file"
        folder.mkdir()
        (folder / "notes.txt").write_text("keep")
        text.write_text("keep")
        empty.write_bytes(b"")
        for path in (tmp_path / "nothing", folder, text, empty, text / "below"):
            call, what = hooks.checkpoint_load, f"loading {path.name!r}"
            self.refuses(call, rule=PATHS, names=(path.name,), what=what, path=str(path), trusted=False, lazy=False)
        for path in (folder, text / "below"):
            call, what = hooks.checkpoint_save, f"saving at {path.name!r}, where something else is,"
            state = states.small(1)
            self.refuses(
                call, rule=PATHS, names=(path.name,), what=what, path=str(path), state=state, info={}, wait=True
            )
        if (folder / "notes.txt").read_text() != "keep" or text.read_text() != "keep":
            broken(PATHS, "a refused save changed a file that is not a checkpoint")

    @pytest.mark.parametrize("how", ["a bit flipped", "the end cut off", "bytes added", "missing"])
    def test_damage_is_refused(self, hooks: Any, tmp_path: Path, how: str) -> None:
        """Loading, lazy loading too, detects a changed byte in any file."""
        path, state = self.where(tmp_path), states.small(1)
        self.saved(hooks, path, state)
        for file in self.files(path):
            whole = file.read_bytes()
            if not whole and how != "missing":
                continue
            for lazy, (what, data) in enumerate(damaged(whole, how)):
                if data is None:
                    file.unlink()
                else:
                    file.write_bytes(data)
                told = f"{file.name} ({len(whole)} bytes), {what},"
                names = (file.name,) if how != "missing" else (file.name, os.path.basename(path))
                call = hooks.checkpoint_load
                self.refuses(call, rule=VERIFIED, names=names, what=told, path=path, trusted=False, lazy=bool(lazy % 2))
                file.write_bytes(whole)
        self.unchanged(hooks, path, state, rule=VERIFIED, after="damage that was repaired")

    def files(self, path: str) -> list[Path]:
        """Return the files of the checkpoint at `path`; override it for a plugin whose paths are not files."""
        if not is_file_path(path):
            pytest.skip("Its paths are no files.")
        place = Path(path)
        return [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())

    @pytest.mark.parametrize("how", ["torch.save", "pickle"])
    def test_code_in_a_file_is_never_run(self, hooks: Any, tmp_path: Path, how: str) -> None:
        """A pickle is refused, in place of a checkpoint and of each of its files."""
        path, ran = self.where(tmp_path), tmp_path / "ran"
        self.saved(hooks, path, states.small(1))
        evil = tmp_path / "evil"
        if how == "torch.save":
            torch.save({"model": Code(str(ran))}, evil)
        else:
            evil.write_bytes(pickle.dumps({"model": Code(str(ran))}))
        files = self.files(path)
        for file in [*files, evil]:
            whole = file.read_bytes()
            bad = evil.read_bytes()
            target = str(file) if file == evil else path
            for lazy in (False, True):
                file.write_bytes(bad)
                try:
                    hooks.checkpoint_load(path=target, trusted=False, lazy=lazy)
                except CheckpointError:
                    pass
                except Exception as error:  # noqa: BLE001 - reported as it is
                    broken(NO_CODE, f"a pickle at {file.name} raised {one_line(error)}, not a CheckpointError")
                else:
                    broken(NO_CODE, f"a pickle at {file.name} was loaded without trusted=True")
                finally:
                    file.write_bytes(whole)
                if ran.exists():
                    broken(NO_CODE, f"a pickle at {file.name} was unpickled, and its code was run")

    # ------------------------------------------------------------------ faults and ranks: one job for each

    @pytest.fixture
    def faults(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        """The results of saves that fail or die, in their own process."""
        return once(self, "faults", lambda: self._in_ranks(1, check_alone, tmp_path_factory))

    @pytest.fixture
    def pair(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        """The results of the checks on two ranks."""
        if self.descriptor.ranks == "one":
            pytest.skip("It works with one rank only.")
        return once(self, "pair", lambda: self._in_ranks(2, check_pair, tmp_path_factory))

    def _in_ranks(self, num_ranks: int, check: Any, folders: pytest.TempPathFactory) -> dict[str, str]:
        folder = folders.mktemp("checkpoint")
        path = self.where(folder)
        given = (self.spec, dict(self.options), dict(self.settings), path, "sharded" in self.descriptor.provides)
        try:
            reports: list[dict[str, str]] = run_ranks(num_ranks, check, *given)
        except RanksFailed as error:
            return {rule: str(error) for rule in (ATOMIC, "died", ALIKE, PATHS, SHARDED)}
        return {rule: next((each[rule] for each in reports if each[rule]), "") for rule in reports[0]}

    def test_a_save_that_fails_leaves_what_was_there(self, faults: dict[str, str]) -> None:
        """A full disk is an error that says so, and the earlier checkpoint is intact."""
        if not is_file_path(self.location(Path("/"))):
            pytest.skip("Its paths are no files.")
        if faults[ATOMIC]:
            broken(ATOMIC, faults[ATOMIC])

    def test_a_process_that_dies_while_saving_leaves_what_was_there(self, faults: dict[str, str]) -> None:
        """A process killed before any of its file system calls leaves the old or the new checkpoint, complete."""
        if not is_file_path(self.location(Path("/"))):
            pytest.skip("Its paths are no files.")
        if faults["died"]:
            broken(ATOMIC, faults["died"])

    def test_all_ranks_hear_of_an_error(self, pair: dict[str, str]) -> None:
        """An error on one rank is raised on all, and none hangs."""
        if pair[ALIKE]:
            broken(ALIKE, pair[ALIKE])

    def test_a_path_may_be_a_str_or_a_path(self, pair: dict[str, str]) -> None:
        """`lite.save` and `lite.load` accept both."""
        if pair[PATHS]:
            broken(PATHS, pair[PATHS])

    def test_any_number_of_ranks_loads_it(self, pair: dict[str, str]) -> None:
        """A checkpoint of two ranks loads on one and vice versa, with sharded tensors if it supports them."""
        if pair[SHARDED]:
            broken(SHARDED, pair[SHARDED])
