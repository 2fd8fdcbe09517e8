"""Arguments that Fabric's strategy classes share, and that are settings of the job here."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from plugframe.errors import SettingError, closest

#: By argument: its default, and what to write instead.
_SETTINGS: dict[str, tuple[Any, str]] = {
    "accelerator": (None, "pass accelerator= to Fabric"),
    "parallel_devices": (None, "pass devices= to Fabric"),
    "cluster_environment": (None, "pass environment= to Fabric"),
    "checkpoint_io": (None, "pass checkpoint= to Fabric"),
    "precision": (None, "pass precision= to Fabric"),
    "process_group_backend": (
        None,
        "pass collective=TorchCollective(backend=…) to Fabric, from plugframe_builtins.torch_collective.collective, or "
        "run the script with --collective.backend",
    ),
    "timeout": (timedelta(minutes=30), "pass timeout_s= to Fabric"),
    "start_method": ("popen", "pass launcher='spawn' or 'fork' to Fabric"),
}


def refuse_settings(cls: str, given: dict[str, Any], names: tuple[str, ...] = tuple(_SETTINGS)) -> dict[str, Any]:
    """Return the other arguments, once those that are settings of the job have their defaults.

    Args:
        cls: name of Fabric's class.
        given: its arguments.
        names: those settings that the class has.

    Raises:
        SettingError: naming an argument with another value, and where it goes.
    """
    for name in names:
        default, instead = _SETTINGS[name]
        value = given.get(name, default)
        if value not in (default, None):
            raise SettingError(f"{cls}({name}={value!r}): this is a setting of the job here; {instead}.")
    return {name: value for name, value in given.items() if name not in names}


def refuse_unknown(cls: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise for an argument that has no counterpart.

    Raises:
        SettingError: naming it, with those that have one.
    """
    for name in given:
        if name not in known:
            raise SettingError(
                f"{cls}() has no argument {name!r} here.{closest(name, known)} It has: {', '.join(known)}."
            )
