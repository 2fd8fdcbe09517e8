"""How a strategy that shards a complete module shards parts of it, for another strategy that runs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from plugframe.errors import SettingError
from plugframe_builtins._shared.fully_shard.activation_checkpointing import recompute
from plugframe_builtins._shared.fully_shard.parts import ShardedParts
from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy
from plugframe_builtins._shared.fully_shard.units import find_units
from plugframe_builtins._shared.sharding.copies import keep_attributes
from plugframe_builtins._shared.sharding.layout import check_layout, check_plain, make_contiguous
from plugframe_builtins._shared.sharding.plain_states import accept_plain_states

#: Options that gather, free, cast or compile single units in forwards, with what does not change their effect.
_OF_FORWARDS = {"reshard_after_forward": (None, False), "mp_policy": (None,), "cpu_offload": (False,)}
_OF_FORWARDS |= {"prefetch": (None,), "compile": (False,)}


def check_options(strategy: FullyShardedStrategy, leader: str) -> None:
    """Raise for options without effect where parameters are gathered for all micro-batches together.

    Raises:
        SettingError: naming the option.
    """
    for name, neutral in _OF_FORWARDS.items():
        value = getattr(strategy, name)
        if value not in neutral:
            raise SettingError(
                f"{name}={value!r} of strategy {strategy.name!r} has no effect beside {leader!r}, where parameters "
                "stay gathered, in their own dtype, from the first micro-batch to the last: leave it out."
            )


def find_parts(strategy: FullyShardedStrategy, module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Check a module that is not sharded yet; return its units, inner ones first, and the blocks to recompute."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    check_plain(module, parameters, strategy.name)
    check_layout(module, parameters, strategy.name)
    make_contiguous(module)
    units = strategy._find_units(module)
    choice = strategy.activation_checkpointing
    if isinstance(choice, bool):
        return units, units if choice else []
    return units, find_units(module, choice, min_numel=strategy.unit_min_numel)


def shard_parts(
    strategy: FullyShardedStrategy,
    module: nn.Module,
    parts: Sequence[nn.Module],
    found: tuple[list[nn.Module], list[nn.Module]],
    before: Mapping[str, nn.Parameter],
    together: Sequence[Optimizer],
) -> ShardedParts:
    """Shard the parameters of `parts` as the strategy shards those of a complete module. Every rank must call it.

    Args:
        module: the complete module.
        parts: submodules of `module` with parameters of their own.
        found: units and blocks to recompute, of `find_parts`.
        before: the parameters of the module by name, of before anything was done to it.
        together: optimizers that are set up with it.
    """
    units, blocks = found
    strategy._undo.callback(recompute([block for block in blocks if _within(block, parts)]))
    homes: dict[int, nn.Module] = {}
    for unit in units:
        if _within(unit, parts):
            for part in unit.modules():
                homes.setdefault(id(part), unit)
    groups: dict[tuple[int, torch.dtype], list[nn.Module]] = {}
    for part in parts:
        dtype = next(part.parameters(recurse=False)).dtype  # one in each part, see `split_dtypes`
        groups.setdefault((id(homes.get(id(part), module)), dtype), []).append(part)
    hooks, mesh = strategy.context.hooks, strategy._data_mesh
    sharded = ShardedParts(module, list(groups.values()), mesh, strategy._evaluation, hooks)
    after = dict(module.named_parameters(remove_duplicate=False))
    strategy._remapping.note(before, after, together)
    keep_attributes(module)
    # Other ranks have other parts: only those that hold shards of the same ones load them together.
    accept_plain_states(module, hooks, [mesh.get_group(dim) for dim in range(mesh.ndim)])
    return sharded


def _within(module: nn.Module, parts: Iterable[nn.Module]) -> bool:
    """Return whether all parameters of a module are those of `parts`."""
    own = set(map(id, parts))
    return all(id(part) in own for part in module.modules() if part._parameters)
