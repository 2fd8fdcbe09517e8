"""``load_state_dict`` of plain tensors into sharded modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.checkpoint import as_bytes
from plugframe.errors import OutOfSyncError
from plugframe_builtins._shared.sharding.parameter import local_shard

_MASK = (1 << 63) - 1


def accept_plain_states(module: nn.Module, hooks: Any, groups: Sequence[Any] = (None,)) -> None:
    """Make `module` and its submodules load states of plain tensors, equal on all ranks of each group."""
    for part in module.modules():
        if part._parameters:
            part.register_load_state_dict_pre_hook(_PlainStateHook(hooks, groups))  # type: ignore[no-untyped-call]


class _PlainStateHook:
    """A ``load_state_dict`` hook for modules with parameters. Every rank must load."""

    def __init__(self, hooks: Any, groups: Sequence[Any] = ()) -> None:
        self._hooks = hooks
        self._groups = groups

    def __call__(self, part: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if self._hooks is None:
            return
        plain: dict[str, tuple[DTensor, Tensor]] = {}
        for name, parameter in part._parameters.items():
            value = state.get(prefix + name)
            if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
                continue
            if value.shape == parameter.shape:  # else torch raises
                plain[prefix + name] = (parameter, value)
        if plain:
            self._check_equal({key: value for key, (_, value) in plain.items()})
        for key, (own, value) in plain.items():
            state[key] = local_shard(value, own)

    def _check_equal(self, values: dict[str, Tensor]) -> None:
        """Raise if states differ between ranks: shards of both would be mixed.

        Raises:
            OutOfSyncError: on all ranks of a group.
        """
        digest = xxhash.xxh3_64()
        for value in values.values():
            held = value.detach().cpu().contiguous()  # its bytes are valid only while it lives
            digest.update(as_bytes(held))
        mine = torch.tensor([digest.intdigest() & _MASK])
        found = [self._hooks.collective_all_gather(tensor=mine, group=each, sync_grads=False) for each in self._groups]
        if not all(bool((everyone == everyone[0]).all()) for everyone in found):
            names = ", ".join(map(repr, values))
            raise OutOfSyncError(
                f"load_state_dict() of a sharded model got other values for {names} on some ranks: every rank keeps "
                "its part of what it is given, so load the same state on all."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> _PlainStateHook:
        return _PlainStateHook(None)
