"""Sending fewer bytes of gradients: torch's communication hooks by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plugframe.errors import MissingDependencyError, SettingError, UnsupportedError, closest

KINDS = ("fp16", "bf16", "powersgd")


def check_compression(kind: str | None, powersgd: Mapping[str, Any] | None) -> None:
    """Check the settings by themselves, before there is a process group.

    Raises:
        SettingError: naming what is allowed.
        MissingDependencyError: if torch's implementation needs a package that is not installed.
    """
    if kind is not None and kind not in KINDS:
        raise SettingError(
            f"gradient_compression={kind!r} is not known: use None or one of {', '.join(map(repr, KINDS))}."
            f"{closest(kind, KINDS)}"
        )
    if powersgd is not None and kind != "powersgd":
        raise SettingError(f"powersgd={dict(powersgd)!r} has no effect: it goes with gradient_compression='powersgd'.")
    if kind == "powersgd" and importlib.util.find_spec("numpy") is None:
        raise MissingDependencyError("gradient_compression='powersgd' needs NumPy: pip install numpy.")


def compress(engine: DistributedDataParallel, kind: str, powersgd: Mapping[str, Any]) -> None:
    """Have `engine` send its gradients in that way.

    Raises:
        UnsupportedError: if torch cannot do it over this backend.
        SettingError: for options `PowerSGDState` does not take.
    """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    state: Any = engine.process_group
    hook: Any = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}.get(kind)
    if hook is None:
        hook = powerSGD_hook.powerSGD_hook
        try:
            state = powerSGD_hook.PowerSGDState(engine.process_group, **powersgd)
        except (TypeError, ValueError) as error:
            raise SettingError(f"powersgd={dict(powersgd)!r} does not fit torch's PowerSGDState: {error}") from error
    try:
        engine.register_comm_hook(state, hook)
    except (TypeError, RuntimeError) as error:
        backend = dist.get_backend(engine.process_group)
        raise UnsupportedError(
            f"gradient_compression={kind!r} does not work over backend {backend!r} here: {error}. "
            "Use 'fp16', or leave it out."
        ) from error
