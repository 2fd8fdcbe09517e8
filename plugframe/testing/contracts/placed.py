"""A device and a job context for the plugin under test."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plugframe.core.registry.registry import Entry, Registry
from plugframe.errors import PluginError
from plugframe.hooks import KINDS, Plugin
from plugframe.hooks.context import Context
from plugframe.hooks.world import World


def accelerator_for(descriptor: Plugin, num_ranks: int = 1) -> Entry:
    """Return an available accelerator whose devices a plugin supports, preferably the CPU's.

    The test is skipped if there is none.
    """
    registry = Registry.discover()
    usable: list[tuple[bool, Entry]] = []
    for entry in registry.entries("accelerator"):
        try:
            found = registry.describe(entry)
            if found.factory and _fits(registry, entry, descriptor, num_ranks):
                usable.append((found.devices != ("cpu",), entry))
        except PluginError:
            continue  # a broken package of a third party
    if not usable:
        devices = ", ".join(descriptor.devices) or "any"
        pytest.skip(f"It works on {devices}, and this machine has no {num_ranks} of them.")
    return min(usable, key=lambda each: each[0])[1]


def _fits(registry: Registry, entry: Entry, descriptor: Plugin, num_ranks: int) -> bool:
    plugin = registry.make(entry)
    if not is_here(plugin):
        return False
    device = plugin.accelerator_device(index=0)
    return (not descriptor.devices or device.type in descriptor.devices) and takes(plugin, num_ranks)


def is_here(plugin: Any) -> bool:
    """Return whether an accelerator has a device on this machine; an error counts as no."""
    try:
        return bool(plugin.accelerator_is_available())
    except Exception:  # noqa: BLE001 - an error counts as no
        return False


def takes(plugin: Any, devices: Any) -> bool:
    """Return whether an accelerator accepts a value of ``devices``."""
    from plugframe.errors import SettingError

    try:
        plugin.accelerator_parse_devices(devices=devices)
    except SettingError:
        return False
    return True


def context_of(
    *plugins: Any, device: torch.device, world: World | None = None, names: dict[str, str] | None = None, **hooks: Any
) -> Context:
    """Return the context of a job whose hooks are those of `plugins`, overridden by `hooks`."""
    found: dict[str, Any] = {}
    for plugin in plugins:
        for kind in KINDS.values():
            found |= {name: getattr(plugin, name) for name in kind.hooks if hasattr(plugin, name)}
    return Context(
        world=world or World(),
        device=device,
        hooks=SimpleNamespace(**{**found, **hooks}),
        names=names or {},
        timeout_s=20.0,
    )
