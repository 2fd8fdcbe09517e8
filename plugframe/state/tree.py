"""The state of a run: from the user's objects to a tree of tensors and plain values, and back."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe._printable import names_text, printable_cause
from plugframe.adopt.module import COMPILED, compiled_from
from plugframe.checkpoint.stored import StoredTensor, fill, materialize
from plugframe.checkpoint.tree import MAX_DEPTH
from plugframe.checkpoint.values import is_numpy
from plugframe.data.random_sources import has_state
from plugframe.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError
from plugframe.state.key_matching import complete, contradictions, match
from plugframe.state.optimizer import is_optimizer_state, like_now, misfits
from plugframe.state.parameter_names import Naming, differences, renamed, to_names, to_numbers

Filter = Callable[[str, Any], bool]


def collect(
    state: Mapping[str, Any],
    hooks: Any,
    *,
    sharded: bool,
    naming: Naming,
    filters: Mapping[str, Filter] | None = None,
) -> dict[str, Any]:
    """Return the tree of what `state` holds; every rank must call it.

    Args:
        state: objects with a ``state_dict``, tensors, plain values, and dicts and lists of those.
        sharded: whether tensors may be this rank's parts, as ``DTensor``.
        naming: gives the names of an optimizer's parameters.
        filters: for a key of `state`, which of its entries are saved: ``f(name, value) -> bool``.
    """
    tree = {key: _collect(value, hooks, sharded, naming) for key, value in state.items()}
    for key, keep in (filters or {}).items():
        if key not in tree or not isinstance(tree[key], Mapping):
            raise CheckpointError(f"filter names {key!r}, which is no object in the state: {', '.join(state)}.")
        tree[key] = {name: value for name, value in tree[key].items() if keep(name, value)}
    return tree


def _collect(value: Any, hooks: Any, sharded: bool, naming: Naming, inside: tuple[int, ...] = ()) -> Any:
    if isinstance(value, nn.Module):
        return _module_state(value, hooks, sharded)
    if isinstance(value, Optimizer):
        return to_names(hooks.strategy_optimizer_state(optimizer=value, sharded=sharded), naming(value))
    if has_state(value):
        return value.state_dict()
    if isinstance(value, Counter) or not isinstance(value, (Mapping, list, tuple)):
        return value
    if id(value) in inside or len(inside) > MAX_DEPTH:
        return value  # what contains itself, or is too deep, is for the checkpoint to name
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return {key: _collect(item, hooks, sharded, naming, inside) for key, item in value.items()}
    items = [_collect(item, hooks, sharded, naming, inside) for item in value]
    return items if isinstance(value, list) else tuple(items)


def check_held(tree: Mapping[str, Any], session: Any, path: str) -> None:
    """Refuse a state that would lose tensors: a checkpoint holds the keys of rank 0. Every rank must call it.

    Raises:
        CheckpointError: on all ranks, naming a key under which only a later rank has a tensor.
    """
    if session.world.world_size == 1 or session.plan.simulated:
        return
    hooks = session.hooks
    mine = set(_tensor_names(tree, ()))
    summary = hashlib.sha256("\0".join(sorted(mine)).encode("utf-8", "backslashreplace")).hexdigest()
    if len(set(hooks.collective_all_gather_object(obj=summary, group=None))) == 1:
        return
    first = hooks.collective_broadcast_object(obj=sorted(mine), src=0, group=None)
    everyone = hooks.collective_all_gather_object(obj=sorted(mine.difference(first)), group=None)
    for rank, others in enumerate(everyone):
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise CheckpointError(
                f"cannot save {path}, nothing was written: {others[0]!r}{more} is a tensor on rank {rank} and not on "
                "rank 0, whose keys a checkpoint holds. Gather it to rank 0 (lite.all_gather), or let every rank have "
                "the same keys."
            )


def _tensor_names(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the keys that lead to each tensor; the places in a list, of which ranks may have more or fewer, as one."""
    if len(path) > MAX_DEPTH:
        return
    if isinstance(tree, (Tensor, StoredTensor)) or is_numpy(tree, "ndarray"):
        yield ".".join(path)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensor_names(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensor_names(value, (*path, "*"))


def _module_state(module: nn.Module, hooks: Any, sharded: bool) -> dict[str, Any]:
    """Return the module's state, under the same keys whether it is compiled or not."""
    state: dict[str, Any] = hooks.strategy_module_state(module=module, sharded=sharded)
    return state if compiled_from(module) is None else _without_prefix(state)


def _without_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(COMPILED): value for key, value in state.items()}


class Restore:
    """Puts a loaded tree into the user's objects: everything is checked before the first value is written.

    What only an object of the user's own can judge, its ``load_state_dict``, comes first. If one raises, it and those
    before it are given their own ``state_dict`` of before, and nothing else has been written; on no rank, if on one.
    """

    def __init__(self, hooks: Any, *, path: str, strict: bool, naming: Naming) -> None:
        self.hooks = hooks
        self.naming = naming
        self.path = path
        self.strict = strict
        self.problems: list[str] = []
        #: What `strict` would have refused: it stays as it is.
        self.passed_over: list[str] = []
        self._objects: list[tuple[str, Any, Any]] = []
        self._acts: list[tuple[str, Callable[[], Callable[[], object]], Callable[[], object]]] = []
        self._writes: dict[str, list[Callable[[], object]]] = {
            kind: [] for kind in ("optimizer", "module", "tensor", "value")
        }

    def into(self, state: Any, loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Plan to put `loaded` into `state`, whose plain values are replaced, and return what has no place in it."""
        missing = [key for key in state if key not in loaded]
        if missing:
            others = ", ".join(repr(key) for key in loaded if key not in state)
            instead = f" (there {'are' if ',' in others else 'is'} {others})" if others else ""
            self._strictly(f"missing: {', '.join(map(repr, missing))}{instead}")
        for key in state:
            if key in loaded:
                try:
                    self._put(state, key, state[key], loaded[key], str(key))
                except Exception as error:  # noqa: BLE001 a file may hold anything, and the other ranks wait for word
                    self.problems.append(
                        f"{key} does not take what the checkpoint has: {type(error).__name__}: {error}"
                    )
        return {key: materialize(value) for key, value in loaded.items() if key not in state}

    def also(self, where: str, *, remember: Callable[[], Callable[[], object]], act: Callable[[], object]) -> None:
        """Plan one thing more, after the objects of the user's own and before anything else is written.

        Args:
            where: what it restores, for messages.
            remember: called before, returns what undoes it.
            act: does it. If it raises, on any rank, all is undone on all ranks.
        """
        self._acts.append((where, remember, act))

    def _strictly(self, text: str) -> None:
        (self.problems if self.strict else self.passed_over).append(text)

    def _put(self, container: Any, key: Any, value: Any, loaded: Any, where: str) -> None:
        if isinstance(value, nn.Module):
            self._module(value, loaded, where)
        elif isinstance(value, Optimizer):
            self._optimizer(value, loaded, where)
        elif has_state(value):
            self._objects.append((where, value, loaded))
        elif isinstance(value, dict) and isinstance(loaded, Mapping) and _holds_objects(value):
            self._dict(value, loaded, where)
        elif isinstance(value, (list, tuple)) and isinstance(loaded, (list, tuple)) and _holds_objects(value):
            self._sequence(container, key, value, loaded, where)
        elif isinstance(value, Tensor):
            self._tensor(value, loaded, where)
        else:
            self._writes["value"].append(lambda: container.__setitem__(key, materialize(loaded)))

    def _dict(self, value: dict[Any, Any], loaded: Mapping[Any, Any], where: str) -> None:
        for name in value:
            if name in loaded:
                self._put(value, name, value[name], loaded[name], f"{where}.{name}")
            else:
                self._strictly(f"missing: '{where}.{name}'")
        for name in loaded:
            if name not in value:
                self._strictly(f"unexpected: '{where}.{name}'")

    def _sequence(self, container: Any, key: Any, value: Any, loaded: Sequence[Any], where: str) -> None:
        if len(value) != len(loaded):
            self.problems.append(f"{where} has {len(value)} elements, the checkpoint has {len(loaded)}")
        items = value if isinstance(value, list) else list(value)
        for index, (item, other) in enumerate(zip(value, loaded, strict=False)):
            self._put(items, index, item, other, f"{where}[{index}]")
        if items is not value:
            # A tuple keeps its objects; for its plain values there must be another tuple.
            make = getattr(type(value), "_make", type(value))
            self._writes["value"].append(lambda: container.__setitem__(key, make(items)))

    def _tensor(self, value: Tensor, loaded: Any, where: str) -> None:
        problem = _misfit(where, value, loaded)
        if problem is not None:
            self.problems.append(problem)
        else:
            self._writes["tensor"].append(lambda: fill([(value.data, loaded)]))

    def _module(self, module: nn.Module, loaded: Any, where: str) -> None:
        if not isinstance(loaded, Mapping):
            self.problems.append(f"{where} is a {type(loaded).__name__}, not the state of a module")
            return
        own = _module_state(module, self.hooks, sharded=True)
        found = match(own, loaded)
        complete(module, own, found)
        taken = set(found.values())
        missing = [key for key in own if key not in found]
        unexpected = [key for key in loaded if key not in taken]
        for what, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                self._strictly(f"{what} in {where}: {names_text(names)}")
        for key, value in own.items():
            if isinstance(value, Tensor) and key in found:
                problem = _misfit(f"{where}.{key}", value, loaded[found[key]])
                self.problems += [problem] if problem is not None else []
        self.problems += [f"{where}: {text}" for text in contradictions(module, own, found, loaded)]
        prefix = "" if compiled_from(module) is None else COMPILED
        # What is no tensor, an extra state, goes to the user's code: nothing in it may lie in the file still.
        fitting = {
            prefix + key: loaded[name] if isinstance(own[key], Tensor) else materialize(loaded[name])
            for key, name in found.items()
        }
        self._writes["module"].append(
            lambda: self.hooks.strategy_load_module_state(module=module, state=fitting, strict=self.strict)
        )

    def _optimizer(self, optimizer: Optimizer, loaded: Any, where: str) -> None:
        if not is_optimizer_state(loaded):
            self.problems.append(f"{where} is not the state of an optimizer")
            return
        own = [len(group["params"]) for group in optimizer.param_groups]
        other = [len(group["params"]) for group in loaded["param_groups"]]
        if own != other:
            self.problems.append(
                f"{where} has parameter groups of {own} parameters, the checkpoint has groups of {other}"
            )
            return
        names = self.naming(optimizer)
        loaded = renamed(loaded, names)
        self.problems += [f"{where}: {text}" for text in differences(loaded, names)]
        state = like_now(optimizer, to_numbers(loaded, names))
        self.problems += [f"{where}: {text}" for text in misfits(optimizer, state, names)]
        self._writes["optimizer"].append(
            lambda: self.hooks.strategy_load_optimizer_state(optimizer=optimizer, state=state)
        )

    def apply(self) -> None:
        """Write everything. Every rank must call it.

        Raises:
            CheckpointMismatchError: listing every problem; nothing was written, on no rank.
        """
        told = self._first(self.problems or None)
        if told is not None:
            rank, problems = told
            where = "" if self.problems else f" on rank {rank}"
            raise CheckpointMismatchError(
                f"{self.path} does not fit the objects it is loaded into{where}; nothing was changed. "
                + "; ".join(self.problems or problems)
            )
        self._load_objects()
        for writes in self._writes.values():
            for write in writes:
                try:
                    write()
                except Exception as error:  # noqa: BLE001 what was checked before fails now: a disk, or a device
                    raise CheckpointError(
                        f"{self.path} could not be put in place ({type(error).__name__}: {error}). Some objects are "
                        "changed, others are not: load again, or another checkpoint, before you go on."
                    ) from printable_cause(error)

    def _load_objects(self) -> None:
        """Have every object load its state, or none."""
        before: list[tuple[Any, Any]] = []
        error: Exception | None = None
        failure: str | None = None
        # Last those that cannot be asked for their state in passing: a loader would start its workers.
        for where, value, loaded in sorted(self._objects, key=lambda each: hasattr(each[1], "__iter__")):
            try:
                if not hasattr(value, "__iter__"):
                    before.append((value, _copied(value)))
                value.load_state_dict(materialize(loaded))
            except Exception as problem:  # noqa: BLE001 the other ranks wait for word, whatever went wrong here
                error, failure = problem, f"{where}: {type(problem).__name__}: {problem}"
                break
        undo: list[Callable[[], object]] = []
        for where, remember, act in self._acts if error is None else ():
            try:
                undo.append(remember())
                act()
            except Exception as problem:  # noqa: BLE001 as above
                failure = f"{where}: {type(problem).__name__}: {problem}"
                error = CheckpointMismatchError(f"{self.path} does not fit; nothing was changed. {failure}")
                error.__cause__ = problem
                break
        told = self._first(failure)
        if told is None:
            return
        for back in reversed(undo):
            with suppress(Exception):
                back()
        for value, state in reversed(before):
            # The error to tell is the one that came first.
            with suppress(Exception):
                if state is not None:
                    value.load_state_dict(state)
        if isinstance(error, CheckpointCorruptError):
            # One rank's object says so, not the file: the other ranks raise another class.
            error = CheckpointMismatchError(str(error))
        raise error or CheckpointError(
            f"{self.path}: an object did not take its state on rank {told[0]}; nothing was changed. {told[1]}"
        )

    def _first(self, mine: Any) -> tuple[int, Any] | None:
        """Return the first rank with something to tell, and what; None if none has."""
        everyone = self.hooks.collective_all_gather_object(obj=mine, group=None)
        return next(((rank, told) for rank, told in enumerate(everyone) if told is not None), None)


def _copied(value: Any) -> Any:
    """Return a copy of an object's state, None if it gives none before it has loaded one, or none to copy."""
    try:
        return copy.deepcopy(value.state_dict())
    except Exception:  # noqa: BLE001 whatever the user's own code may raise
        return None


def _misfit(where: str, value: Tensor, loaded: Any) -> str | None:
    """Return why a tensor cannot take what was loaded, None if it can."""
    if not isinstance(loaded, (Tensor, StoredTensor)):
        return f"{where} is a tensor, the checkpoint has {_brief(loaded)}"
    if value.shape != loaded.shape:
        return f"{where} has shape {tuple(value.shape)}, the checkpoint has {tuple(loaded.shape)}"
    if not torch.can_cast(loaded.dtype, value.dtype):
        return f"{where} is of {value.dtype}, which cannot hold the checkpoint's {loaded.dtype}"
    return None


def _brief(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # Python writes no decimal text of so long an integer
        return f"a {type(value).__name__}"


def _holds_objects(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    return any(has_state(item) or (isinstance(item, (dict, list, tuple)) and _holds_objects(item)) for item in items)
