"""Lend an optimizer to DeepSpeed: its groups hold flat tensors there, and the user's parameters elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from plugframe.errors import UnsupportedError
from plugframe_builtins.deepspeed.trial import own_lists

Group = dict[str, Any]


class Borrowed:
    """An optimizer whose groups hold the user's parameters, and DeepSpeed's only while DeepSpeed runs.

    Hyper-parameters are shared: values that a scheduler or the script writes into a group apply to DeepSpeed's too.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._number = len(optimizer.param_groups)
        # DeepSpeed does not support groups without trainable parameters.
        self.used = [n for n, g in enumerate(optimizer.param_groups) if any(p.requires_grad for p in g["params"])]
        self._theirs: list[Group] = [
            {**g, "params": list(g["params"])} for n, g in enumerate(optimizer.param_groups) if n in self.used
        ]
        self._state: Any = type(optimizer.state)(*([dict] if hasattr(optimizer.state, "default_factory") else []))
        self._is_lent = False
        self._lists = [(own, list(own)) for own in own_lists(optimizer)]
        self._handles = [optimizer.register_step_pre_hook(self._point)] if self._lists else []

    def _point(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Move DeepSpeed's tensors in the groups to lists inside the optimizer."""
        for own, _ in self._lists:
            own[:] = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Put DeepSpeed's own groups and state into the optimizer."""
        optimizer = self.optimizer
        groups, state = optimizer.param_groups, optimizer.state
        all_of_them = list(groups)
        mine = [groups[number] for number in self.used]
        _copy_settings(mine, self._theirs)
        # In place: a wrapped optimizer may share the list.
        groups[:] = self._theirs
        optimizer.state = self._state
        self._is_lent = True
        try:
            yield
        finally:
            self._is_lent = False
            self._theirs, self._state = list(optimizer.param_groups), optimizer.state
            groups[:] = all_of_them
            optimizer.param_groups, optimizer.state = groups, state
            _copy_settings(self._theirs, mine)
            for own, before in self._lists:
                own[:] = before

    def refuse_states(self) -> None:
        """Make ``state_dict()`` and ``load_state_dict()`` raise: the state is sharded, by flat tensor."""
        name = type(self.optimizer).__name__

        def refuse_saving(optimizer: Optimizer) -> None:
            if self._is_lent:
                return
            raise UnsupportedError(
                f"{name}.state_dict() under strategy 'deepspeed' would hold no state: DeepSpeed keeps it. "
                "Save it with lite.save(path, {'optimizer': optimizer}) on every rank."
            )

        def refuse_loading(optimizer: Optimizer, state: Any) -> None:
            if self._is_lent:
                return
            raise UnsupportedError(
                f"{name}.load_state_dict() under strategy 'deepspeed' would not reach the shards of the state: call it "
                "before lite.setup(), or use lite.load()."
            )

        for way in ("__reduce_ex__", "__deepcopy__"):
            vars(self.optimizer)[way] = lambda _: refuse_saving(self.optimizer)
        if not hasattr(self.optimizer, "_optimizer_state_dict_pre_hooks"):
            return  # it did not call torch's __init__, and has no such hooks
        self._handles.append(self.optimizer.register_state_dict_pre_hook(refuse_saving))
        self._handles.append(self.optimizer.register_load_state_dict_pre_hook(refuse_loading))

    def close(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Raise if groups were added after set-up.

        Raises:
            UnsupportedError: with when to add them.
        """
        number = len(self.optimizer.param_groups)
        if number != self._number:
            raise UnsupportedError(
                f"This {type(self.optimizer).__name__} has {number} parameter groups, and had {self._number} when it "
                "was set up: strategy 'deepspeed' takes no groups afterwards. Add them before lite.setup()."
            )

    @property
    def state(self) -> Any:
        """DeepSpeed's state, by flat tensor."""
        return self._state


def _copy_settings(source: Sequence[Group], target: Sequence[Group]) -> None:
    for theirs, mine in zip(source, target, strict=True):
        mine.update({key: value for key, value in theirs.items() if key != "params"})
