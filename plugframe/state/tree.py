"""Collect the state of the user's objects into a tree of tensors and plain values, and restore it."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.adopt.module import COMPILED, compiled_from
from plugframe.checkpoint.stored import StoredTensor, fill, materialize
from plugframe.checkpoint.subclass import FlattenedTensor
from plugframe.checkpoint.tree import MAX_DEPTH
from plugframe.checkpoint.values import is_numpy
from plugframe.data.stateful import is_stateful
from plugframe.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointMismatchError,
    names_text,
    printable_cause,
)
from plugframe.state.filters import Filter, apply_filters, check_filters
from plugframe.state.key_matching import contradictions, fill_tied, match
from plugframe.state.optimizer import is_optimizer_state, match_setting_types, shape_mismatches
from plugframe.state.parameter_names import ParameterNamer, differences, renamed, to_names, to_numbers
from plugframe.state.subclasses import is_subclass_entry, rebuilt_state, subclass_mismatch, take_subclasses


def collect(
    state: Mapping[str, Any],
    hooks: Any,
    *,
    sharded: bool,
    namer: ParameterNamer,
    filters: Mapping[str, Filter] | None = None,
) -> dict[str, Any]:
    """Return the state tree of `state`. Every rank must call it.

    Args:
        state: objects with a ``state_dict``, tensors, plain values, and dicts and lists of those.
        sharded: whether tensors may be shards, as ``DTensor``.
        naming: gives the names of an optimizer's parameters.
        filters: for a key of `state`, selects the entries to save: ``f(name, value) -> bool``.
    """
    check_filters(filters, state)
    tree = {key: _collect(value, hooks, sharded, namer) for key, value in state.items()}
    apply_filters(tree, filters or {})
    return tree


def _collect(value: Any, hooks: Any, sharded: bool, namer: ParameterNamer, inside: tuple[int, ...] = ()) -> Any:
    if isinstance(value, nn.Module):
        return _module_state(value, hooks, sharded)
    if isinstance(value, Optimizer):
        return to_names(hooks.strategy_optimizer_state(optimizer=value, sharded=sharded), namer(value))
    if is_stateful(value):
        return value.state_dict()
    if isinstance(value, Counter) or not isinstance(value, (Mapping, list, tuple)):
        return value
    if id(value) in inside or len(inside) > MAX_DEPTH:
        return value  # the checkpoint plugin refuses cycles and too deep nesting by name
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return {key: _collect(item, hooks, sharded, namer, inside) for key, item in value.items()}
    items = [_collect(item, hooks, sharded, namer, inside) for item in value]
    return items if isinstance(value, list) else tuple(items)


def check_rank_keys(tree: Mapping[str, Any], session: Any, path: str) -> None:
    """Raise if a rank has tensors under keys that rank 0 lacks, which would be lost. Every rank must call it.

    Raises:
        CheckpointError: on all ranks, with such a key.
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
                "rank 0, whose keys are saved. Gather it to rank 0 (lite.all_gather), or use equal keys on all ranks."
            )


def _tensor_names(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Yield the path of each tensor, with ``*`` for list indices: lists may have different lengths on the ranks."""
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
    """Return the module's state, with the same keys for a compiled module."""
    state: dict[str, Any] = hooks.strategy_module_state(module=module, sharded=sharded)
    return state if compiled_from(module) is None else _without_prefix(state)


def _without_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(COMPILED): value for key, value in state.items()}


class _Action(NamedTuple):
    """An action of `Restore.add_action`."""

    where: str
    snapshot: Callable[[], Callable[[], object]]
    apply: Callable[[], object]
    communicates: bool


class Restore:
    """Restores the user's objects from a loaded tree, all or nothing: everything is validated before it is written.

    Objects that validate in their ``load_state_dict`` come first. If one raises on any rank, it and those before it
    are restored to their previous ``state_dict`` on all ranks, and nothing else is written.
    """

    def __init__(self, hooks: Any, *, path: str, strict: bool, namer: ParameterNamer) -> None:
        self.hooks = hooks
        self.namer = namer
        self.path = path
        self.strict = strict
        self.problems: list[str] = []
        self._lacks_keys = False
        #: Problems that only `strict` refuses.
        self.ignored: list[str] = []
        self._objects: list[tuple[str, Any, Any]] = []
        self._actions: list[_Action] = []
        self._writes: dict[str, list[Callable[[], object]]] = {
            kind: [] for kind in ("optimizer", "module", "tensor", "value")
        }

    def into(self, state: Any, loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Plan to load `loaded` into `state`, replacing its plain values; return the keys that `state` lacks."""
        missing = [key for key in state if key not in loaded]
        if missing:
            others = ", ".join(repr(key) for key in loaded if key not in state)
            instead = f" (there {'are' if ',' in others else 'is'} {others})" if others else ""
            self._lacks_keys = self.strict
            self._strictly(f"missing: {', '.join(map(repr, missing))}{instead}")
        for key in state:
            if key in loaded:
                try:
                    self._put(state, key, state[key], loaded[key], str(key))
                except Exception as error:  # noqa: BLE001 a file may hold anything, and the other ranks wait
                    self.problems.append(
                        f"{key} does not accept the checkpoint's value: {type(error).__name__}: {error}"
                    )
        return {key: materialize(value) for key, value in loaded.items() if key not in state}

    def add_action(
        self,
        where: str,
        *,
        snapshot: Callable[[], Callable[[], object]],
        apply: Callable[[], object],
        communicates: bool = False,
    ) -> None:
        """Plan an action that runs after ``load_state_dict`` of the user's objects and before anything is written.

        Args:
            where: what it restores, for messages.
            snapshot: called before `apply`; returns a function that undoes it.
            apply: runs the action. If it raises on any rank, everything is undone on all ranks.
            communicates: whether it may communicate: it then runs only if no rank has failed before.
        """
        self._actions.append(_Action(where, snapshot, apply, communicates))

    def _strictly(self, text: str) -> None:
        (self.problems if self.strict else self.ignored).append(text)

    def _put(self, container: Any, key: Any, value: Any, loaded: Any, where: str) -> None:
        if isinstance(value, nn.Module):
            self._module(value, loaded, where)
        elif isinstance(value, Optimizer):
            self._optimizer(value, loaded, where)
        elif is_stateful(value):
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
            # The objects are loaded in place; plain values need a new tuple.
            make = getattr(type(value), "_make", type(value))
            self._writes["value"].append(lambda: container.__setitem__(key, make(items)))

    def _tensor(self, value: Tensor, loaded: Any, where: str) -> None:
        problem = _mismatch(where, value, loaded)
        if problem is not None:
            self.problems.append(problem)
        elif isinstance(loaded, FlattenedTensor):
            self._writes["tensor"].append(lambda: loaded.load_into(value))
        else:
            self._writes["tensor"].append(lambda: fill([(value.data, loaded)]))

    def _module(self, module: nn.Module, loaded: Any, where: str) -> None:
        if not isinstance(loaded, Mapping):
            self.problems.append(f"{where} is a {type(loaded).__name__}, not the state of a module")
            return
        own = _module_state(module, self.hooks, sharded=True)
        found = match(own, loaded)
        fill_tied(module, own, found)
        taken = set(found.values())
        missing = [key for key in own if key not in found]
        unexpected = [key for key in loaded if key not in taken]
        for what, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                self._strictly(f"{what} in {where}: {names_text(names)}")
        for key, value in own.items():
            if isinstance(value, Tensor) and key in found:
                problem = _mismatch(f"{where}.{key}", value, loaded[found[key]])
                self.problems += [problem] if problem is not None else []
        self.problems += [f"{where}: {text}" for text in contradictions(module, own, found, loaded)]
        prefix = "" if compiled_from(module) is None else COMPILED
        # An extra state is passed to the user's code, which must not get a `StoredTensor`.
        matched = {
            prefix + key: loaded[name] if isinstance(own[key], Tensor) else materialize(loaded[name])
            for key, name in found.items()
        }
        writes, problems = take_subclasses(module, matched)
        self.problems += [f"{where}.{text}" for text in problems if f"{where}.{text}" not in self.problems]
        self._writes["tensor"] += writes
        self._writes["module"].append(
            lambda: self.hooks.strategy_load_module_state(module=module, state=matched, strict=self.strict)
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
        names = self.namer(optimizer)
        loaded = renamed(loaded, names)
        self.problems += [f"{where}: {text}" for text in differences(loaded, names)]
        state, problems = rebuilt_state(optimizer, match_setting_types(optimizer, to_numbers(loaded, names)))
        self.problems += [f"{where}: {text}" for text in (*problems, *shape_mismatches(optimizer, state, names))]
        self._writes["optimizer"].append(
            lambda: self.hooks.strategy_load_optimizer_state(optimizer=optimizer, state=state)
        )

    def apply(self) -> None:
        """Write everything. Every rank must call it.

        Raises:
            CheckpointMismatchError: listing every problem; nothing was written, on no rank.
        """
        found = self._first_rank_with([self._lacks_keys, self.problems] if self.problems else None)
        if found is not None:
            rank, (lacks_keys, problems) = found
            where = "" if self.problems else f" on rank {rank}"
            raise (CheckpointKeyError if lacks_keys else CheckpointMismatchError)(
                f"{self.path} does not fit the objects it is loaded into{where}; nothing was changed. "
                + "; ".join(self.problems or problems)
            )
        self._load_objects()
        for writes in self._writes.values():
            for write in writes:
                try:
                    write()
                except Exception as error:  # noqa: BLE001 validated before: a disk or a device fails
                    raise CheckpointError(
                        f"{self.path} could not be loaded completely ({type(error).__name__}: {error}). Some objects "
                        "are changed, others are not: load it again, or another checkpoint, before you continue."
                    ) from printable_cause(error)

    def _load_objects(self) -> None:
        """Call ``load_state_dict`` of every object and run the actions; undo all if one raises on any rank."""
        before: list[tuple[Any, Any]] = []
        error: Exception | None = None
        failure: str | None = None
        # Iterable objects last, and without a copy of their state: ``state_dict`` of a loader would start its workers.
        for where, value, loaded in sorted(self._objects, key=lambda each: hasattr(each[1], "__iter__")):
            try:
                if not hasattr(value, "__iter__"):
                    before.append((value, _copy_state(value)))
                value.load_state_dict(materialize(loaded))
            except Exception as problem:  # noqa: BLE001 the other ranks wait for the outcome
                error, failure = problem, f"{where}: {type(problem).__name__}: {problem}"
                break
        undo: list[Callable[[], object]] = []
        found: tuple[int, Any] | None = None
        for action in self._actions:
            if action.communicates and (found := self._first_rank_with(failure)) is not None:
                break
            if failure is not None:
                continue
            try:
                undo.append(action.snapshot())
                action.apply()
            except Exception as problem:  # noqa: BLE001 as above
                failure = f"{action.where}: {type(problem).__name__}: {problem}"
                error = CheckpointMismatchError(f"{self.path} does not fit; nothing was changed. {failure}")
                error.__cause__ = problem
        if found is None and (found := self._first_rank_with(failure)) is None:
            return
        for undo_action in reversed(undo):
            with suppress(Exception):
                undo_action()
        for value, state in reversed(before):
            # The first error is raised, not those of undoing.
            with suppress(Exception):
                if state is not None:
                    value.load_state_dict(state)
        if isinstance(error, CheckpointCorruptError):
            # Raised by an object on one rank, not by the file: the other ranks raise another class.
            error = CheckpointMismatchError(str(error))
        raise error or CheckpointError(
            f"{self.path}: an object did not accept its state on rank {found[0]}; nothing was changed. {found[1]}"
        )

    def _first_rank_with(self, value: Any) -> tuple[int, Any] | None:
        """Return the first rank whose value is not None, and its value; None if there is none."""
        values = self.hooks.collective_all_gather_object(obj=value, group=None)
        return next(((rank, each) for rank, each in enumerate(values) if each is not None), None)


def _copy_state(value: Any) -> Any:
    """Return a copy of an object's state, None if it has none before loading, or if it cannot be copied."""
    try:
        return copy.deepcopy(value.state_dict())
    except Exception:  # noqa: BLE001 raised by the user's code
        return None


def _mismatch(where: str, value: Tensor, loaded: Any) -> str | None:
    """Return why a tensor cannot take the loaded value, None if it can."""
    if is_subclass_entry(value, loaded):
        return subclass_mismatch(where, value, loaded)
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
    except ValueError:  # an integer with more digits than sys.get_int_max_str_digits()
        return f"a {type(value).__name__}"


def _holds_objects(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    return any(is_stateful(item) or (isinstance(item, (dict, list, tuple)) and _holds_objects(item)) for item in items)
