"""Fabric's ``FSDPStrategy``, which is for torch's first FSDP, as an `FSDP` for the second."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from plugframe.errors import SettingError
from plugframe.utils.logging import warn_caller
from plugframe_builtins._shared.fabric_arguments import refuse_settings, refuse_unknown
from plugframe_builtins.fsdp.strategy import FSDP

_OWN = (
    "cpu_offload",
    "mixed_precision",
    "auto_wrap_policy",
    "activation_checkpointing",
    "activation_checkpointing_policy",
    "sharding_strategy",
    "state_dict_type",
    "device_mesh",
)
#: What the second FSDP does by itself, whatever is passed.
_ALWAYS = ("use_orig_params", "sync_module_states", "limit_all_gathers", "forward_prefetch", "backward_prefetch")
_RESHARDS = {"FULL_SHARD": None, "HYBRID_SHARD": None, "SHARD_GRAD_OP": False, "_HYBRID_SHARD_ZERO2": False}


class FSDPStrategy:
    """Make the strategy `FSDP` from the arguments of Fabric's ``FSDPStrategy``.

    Args:
        options: Fabric's. Wrapping policies select `units`; ``sharding_strategy`` is ``"FULL_SHARD"``,
            ``"SHARD_GRAD_OP"`` or ``"HYBRID_SHARD"`` with ``device_mesh=(replicas, shards)``.
    """

    def __new__(cls, **options: Any) -> FSDP:  # type: ignore[misc]
        """Return the strategy.

        Raises:
            SettingError: for an argument that is a setting of the job, or has no counterpart.
        """
        options = refuse_settings(cls.__name__, options)
        refuse_unknown(cls.__name__, options, (*_OWN, *_ALWAYS))
        if options.get("state_dict_type", "sharded") != "sharded":
            warn_caller(
                f"FSDPStrategy(state_dict_type={options['state_dict_type']!r}) has no effect: every checkpoint loads "
                "under every strategy. For a single file pass checkpoint='safetensors' to Fabric."
            )
        offload = options.get("cpu_offload")
        recomputed = options.get("activation_checkpointing_policy") or options.get("activation_checkpointing")
        policy = options.get("auto_wrap_policy")
        return FSDP(
            units="auto" if policy is None else _units("auto_wrap_policy", policy),
            activation_checkpointing=_units("activation_checkpointing", recomputed) if recomputed else False,
            cpu_offload=bool(getattr(offload, "offload_params", offload)),
            mp_policy=_policy(options.get("mixed_precision")),
            **_sharding(options.get("sharding_strategy", "FULL_SHARD"), options.get("device_mesh")),
        )


def _units(name: str, policy: Any) -> Any:
    """Return the units for classes of modules, or for a wrapping policy of torch.

    Raises:
        SettingError: for anything else.
    """
    classes = getattr(policy, "_module_classes", policy)  # of a ModuleWrapPolicy
    if isinstance(classes, type):
        return {classes}
    if isinstance(classes, Iterable) and all(isinstance(each, type) for each in classes):
        return set(classes)
    if isinstance(policy, functools.partial) or callable(policy):
        return _selects(policy)
    raise SettingError(
        f"FSDPStrategy({name}=…) takes classes of modules, a ModuleWrapPolicy or a function, got "
        f"{type(policy).__name__}: pass FSDP(units=f(module) -> bool) as the strategy."
    )


def _selects(policy: Callable[..., Any]) -> Callable[[nn.Module], bool]:
    def selects(module: nn.Module) -> bool:
        numel = sum(parameter.numel() for parameter in module.parameters())
        return bool(policy(module=module, recurse=False, nonwrapped_numel=numel))

    return selects


def _policy(mixed: Any) -> dict[str, Any] | None:
    """Return the dtypes of a ``MixedPrecision`` of torch's first FSDP."""
    if mixed is None:
        return None
    if getattr(mixed, "buffer_dtype", None) is not None:
        warn_caller(f"FSDPStrategy: buffer_dtype={mixed.buffer_dtype} has no effect: buffers stay in their dtype.")
    fields = ("param_dtype", "reduce_dtype", "cast_forward_inputs")
    return {name: getattr(mixed, name) for name in fields if getattr(mixed, name, None) is not None}


def _sharding(strategy: Any, mesh: Any) -> dict[str, Any]:
    """Return the arguments of `FSDP` for a ``ShardingStrategy`` and the sizes of a mesh.

    Raises:
        SettingError: for a strategy without a counterpart, or a mesh that goes with another.
    """
    name = getattr(strategy, "name", strategy)
    if name == "NO_SHARD":
        raise SettingError("FSDPStrategy(sharding_strategy='NO_SHARD'): use strategy='ddp'.")
    if name not in _RESHARDS:
        raise SettingError(f"FSDPStrategy(sharding_strategy={name!r}): it is one of {', '.join(map(repr, _RESHARDS))}.")
    hybrid = "HYBRID" in name
    if hybrid != (mesh is not None):
        raise SettingError(
            "FSDPStrategy: sharding_strategy='HYBRID_SHARD' and device_mesh=(replicas, shards) go together."
        )
    sizes = tuple(getattr(mesh, "shape", mesh) or ())
    found: dict[str, Any] = {"reshard_after_forward": _RESHARDS[name]}
    if hybrid:
        if len(sizes) != 2:
            raise SettingError(f"FSDPStrategy(device_mesh={mesh!r}): it is (replicas, shards).")
        found["mesh"] = {"replicate": int(sizes[0]), "shard": int(sizes[1])}
    return found
