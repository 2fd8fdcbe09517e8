"""The state of plugins in a checkpoint: extensions, callbacks, loggers and the strategy."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugframe.checkpoint.stored import StoredTensor, fill, materialize
from plugframe.checkpoint.tree import MAX_DEPTH
from plugframe.core.planning.plan import Choice
from plugframe.core.runtime.session import Session
from plugframe.errors import CheckpointError, PluginContractError, SettingError
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.markers import is_per_plugin, marks_of
from plugframe.state.tree import Restore, check_rank_keys
from plugframe.utils.shards import is_shard

#: For each kind whose plugins can have state, the hooks that return and load it.
HOOKS = {
    "extension": ("extension_state", "extension_load_state"),
    "logger": ("logger_state", "logger_load_state"),
    "strategy": ("strategy_state", "strategy_load_state"),
}
#: Hooks that are called on their plugin.
_NEVER_WRAPPED = tuple(
    name for kind in KINDS.values() for name in kind.hooks if is_per_plugin(getattr(kind.spec, name))
)


@dataclass(frozen=True)
class _Member:
    """A plugin with state."""

    state: Callable[[], Any]
    load: Callable[..., Any]
    hook: str


class PluginStates:
    """Saves and restores the states of the plugins of a job.

    Args:
        plugins: every plugin in use with its choice.
        session: of the job.

    Raises:
        PluginContractError: if a plugin implements one hook of a pair, wraps one, or implements one of another kind.
        SettingError: if two objects of one class have state and no `state_key` that distinguishes them.
    """

    def __init__(self, plugins: Sequence[tuple[Choice, Any]], session: Session) -> None:
        self._session = session
        self._members: dict[str, _Member] = {}
        for choice, plugin in plugins:
            _check_hooks(choice, plugin)
            state, load = HOOKS.get(choice.kind, ("", ""))
            if not state or marks_of(plugin, state) is None:
                continue
            key = _key(choice, plugin)
            if key in self._members and choice.kind == "logger":
                # A job often has two loggers of a class, and what they have is their place in the list.
                key = next(f"{key} #{n}" for n in itertools.count(2) if f"{key} #{n}" not in self._members)
            if key in self._members:
                raise SettingError(
                    f"{key} is given twice, and both have state in checkpoints: give each object a string state_key of "
                    "its own, as in ema.state_key = 'fast'."
                )
            self._members[key] = _Member(getattr(plugin, state), getattr(plugin, load), state)

    @property
    def names(self) -> list[str]:
        """The keys of the plugins with state."""
        return sorted(self._members)

    def collect(self, path: str, *, sharded: bool) -> dict[str, Any]:
        """Return the states by key. Every rank must call it, with the same plugins.

        Args:
            path: of the checkpoint, for messages.
            sharded: whether tensors may be a ``DTensor``; otherwise they are gathered on rank 0.

        Raises:
            CheckpointError: on all ranks, naming the plugin, if one raises on any rank.
        """
        found = {}
        for key in self.names:
            problem, error = None, None
            shards: list[str] = []
            try:
                found[key] = self._state_of(key)
                shards = list(_shards(found[key], ""))
            except Exception as raised:  # noqa: BLE001 the other ranks wait for the outcome
                problem, error = f"{type(raised).__name__}: {raised}", raised
            # After each: the next plugin may communicate.
            outcome = (problem, _digest(shards))
            everyone = self._session.hooks.collective_all_gather_object(obj=outcome, group=None)
            for rank, (text, digest) in enumerate(everyone):
                if text is None and digest != everyone[0][1]:
                    text = "its DTensors are not those of rank 0"
                if text is not None:
                    where = f" on rank {rank}" if len(everyone) > 1 else ""
                    raise CheckpointError(
                        f"cannot save {path}, nothing was written: the state of {key} cannot be saved{where}: {text}"
                    ) from error
        if found:
            check_rank_keys({f"state of {key}": state for key, state in found.items()}, self._session, path)
        first_rank = self._session.world.global_rank == 0
        return found if sharded else _gathered(found, keep=first_rank)

    def plan(self, saved: Any, restore: Restore) -> None:
        """Add loading the states to the actions of `restore`, and what is wrong to its problems."""
        if not isinstance(saved, Mapping):
            restore.problems.append("the states of plugins are invalid")
            return
        for key in self.names:
            if key in saved:
                try:
                    self._plan_one(key, saved[key], restore)
                except Exception as error:  # noqa: BLE001 a file may hold anything, and the other ranks wait
                    restore.problems.append(f"the state of {key} cannot be loaded: {type(error).__name__}: {error}")

    def _plan_one(self, key: str, saved: Any, restore: Restore) -> None:
        if not isinstance(saved, dict):
            raise TypeError("it is no dict")
        before = self._state_of(key)
        state = _placed(saved, before)
        load = self._members[key].load

        def snapshot() -> Callable[[], object]:
            copied = _copied(before)
            return lambda: load(state=copied)

        restore.add_action(f"the state of {key}", snapshot=snapshot, apply=lambda: load(state=state), communicates=True)

    def unmatched(self, saved: Mapping[str, Any]) -> str:
        """Return a warning that names the plugins that only the checkpoint or only the job has, empty if none."""
        unused = [key for key in saved if key not in self._members]
        missing = [key for key in self.names if key not in saved]
        texts = []
        if unused:
            texts.append(f"The checkpoint has state of {', '.join(unused)}, not in use here: it was not restored.")
        if missing:
            texts.append(f"The checkpoint has no state of {', '.join(missing)}: it was left as it is.")
        return " ".join(texts)

    def _state_of(self, key: str) -> dict[str, Any]:
        member = self._members[key]
        state = member.state()
        if not isinstance(state, dict):
            raise TypeError(f"{member.hook}() returned {type(state).__name__}, not a dict")
        return state


def _key(choice: Choice, plugin: Any) -> str:
    """Return the key of a plugin's state: its kind and its qualified name, or the path of an unpublished class."""
    cls = type(plugin)
    # Ranks started by multiprocessing import the script under another name.
    module = "__main__" if cls.__module__ == "__mp_main__" else cls.__module__
    name = choice.qualified if choice.entry is not None else f"{module}:{cls.__qualname__}"
    own = getattr(plugin, "state_key", None)
    if own is not None and (not isinstance(own, str) or not own):
        raise SettingError(f"{choice.kind} {choice.name}: state_key={own!r} must be a string.")
    return f"{choice.kind} {name}{f'#{own}' if own else ''}"


def _check_hooks(choice: Choice, plugin: Any) -> None:
    origin = f"{choice.kind} {choice.origin}"
    for name in _NEVER_WRAPPED:
        marks = marks_of(plugin, name)
        if marks is not None and (marks["wrapper"] or marks["hookwrapper"]):
            raise PluginContractError(
                f"{origin} wraps {name}, which nothing wraps, as it is called on its plugin: leave it out."
            )
    for kind, pair in HOOKS.items():
        for name, other in (pair, pair[::-1]):
            if marks_of(plugin, name) is None:
                continue
            if kind != choice.kind:
                own = f": implement {choice.kind}{name.removeprefix(kind)}" if choice.kind in HOOKS else ""
                raise PluginContractError(f"{origin} implements {name}, a hook of the kind {kind}{own}.")
            if marks_of(plugin, other) is None:
                raise PluginContractError(
                    f"{origin} implements {name} and not {other}: implement both and mark them with "
                    "@plugframe.hookimpl."
                )


def _shards(value: Any, where: str, depth: int = 0) -> Iterator[str]:
    """Yield the place, dtype and shape of each ``DTensor`` in a state."""
    if is_shard(value):
        yield f"{where}: {value.dtype} {tuple(value.shape)}"
    elif isinstance(value, (Mapping, list, tuple)) and depth <= MAX_DEPTH:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _shards(item, f"{where}[{key!r}]", depth + 1)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "backslashreplace")).hexdigest()


def _gathered(state: Any, *, keep: bool) -> Any:
    """Return `state` with every ``DTensor`` gathered on the CPU if `keep`, else left out. Every rank must call it."""

    def gather(tensor: Tensor) -> Any:
        if not is_shard(tensor):
            return tensor
        full: Tensor = tensor.full_tensor().detach()
        return full.cpu() if keep else None

    return _mapped(state, gather)


def _copied(state: Any) -> Any:
    """Return a deep copy, of tensors without their graph."""
    return _mapped(state, lambda tensor: tensor.detach().clone())


def _mapped(value: Any, function: Callable[[Tensor], Any], depth: int = 0) -> Any:
    """Return a copy of a state with ``function(tensor)`` in place of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Counter) or not isinstance(value, (Mapping, list, tuple)):
        return copy.copy(value)
    if depth > MAX_DEPTH:
        return value  # the checkpoint plugin refuses cycles and too deep nesting by name
    if isinstance(value, Mapping):
        return {key: _mapped(item, function, depth + 1) for key, item in value.items()}
    items = [_mapped(item, function, depth + 1) for item in value]
    return items if isinstance(value, list) else tuple(items)


@torch.no_grad()
def _placed(saved: Any, now: Any) -> Any:
    """Return `saved` with its tensors read: each like the ``DTensor`` in its place in `now`, or complete."""
    pairs: list[tuple[Tensor, Tensor | StoredTensor]] = []

    def place(value: Any, own: Any) -> Any:
        if isinstance(value, (Tensor, StoredTensor)):
            if is_shard(own) and own.shape == value.shape:
                target = torch.empty_like(own, dtype=value.dtype)
                pairs.append((target, value))
                return target
            return value
        if isinstance(value, Mapping) and not isinstance(value, Counter):
            known = own if isinstance(own, Mapping) else {}
            return {key: place(item, known.get(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            known_items: Sequence[Any] = own if isinstance(own, (list, tuple)) and len(own) == len(value) else ()
            items = [place(item, known_items[i] if known_items else None) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return value

    placed = place(saved, now)
    fill(pairs)
    return materialize(placed)
