"""Parse the ``devices`` setting."""

from __future__ import annotations

from collections.abc import Sequence

from plugframe.errors import SettingError


def parse_devices(
    devices: int | str | Sequence[int], *, count: int, name: str, indexed: bool = True
) -> tuple[int, ...]:
    """Return the device indices for a value of ``devices``.

    Args:
        devices: ``2``, ``"2"``; ``-1``, ``"auto"``; ``[0, 2]``, ``"0,2"``.
        count: number of devices, which ``-1`` and ``"auto"`` select.
        name: name of the accelerator, for messages.
        indexed: False if devices have no indices and any number of ranks can share one (a CPU).

    Raises:
        SettingError: for any other value.
    """
    value = _parse(devices)
    if isinstance(value, bool) or value is None:
        raise _error(devices, count=count, name=name, indexed=indexed)
    if isinstance(value, int):
        if value == -1:
            return tuple(range(count))
        if value < 1 or (indexed and value > count):
            raise _error(devices, count=count, name=name, indexed=indexed)
        return tuple(range(value))
    if not indexed or not value or len(set(value)) != len(value) or not all(0 <= i < count for i in value):
        raise _error(devices, count=count, name=name, indexed=indexed)
    return tuple(value)


def _parse(devices: object) -> int | list[int] | bool | None:
    """Return a count or a list of indices; None (or a bool) for an invalid value."""
    if isinstance(devices, (bool, int)):
        return devices
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto":
            return -1
        parts = [part.strip() for part in text.split(",")]
        try:
            if len(parts) == 1:
                return int(parts[0])
            return [int(part) for part in parts if part]
        except ValueError:
            return None
    if isinstance(devices, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in devices):
        return list(devices)
    return None


def _error(devices: object, *, count: int, name: str, indexed: bool) -> SettingError:
    if not indexed:
        allowed = f"a number of processes from 1, or 'auto' (here {count})"
    else:
        last = count - 1
        indices = "[0]" if last == 0 else f"[0, {last}] or '0,{last}'"
        allowed = f"a count from 1 to {count}, a list of indices such as {indices}, or 'auto' (all {count})"
    return SettingError(f"devices={devices!r} does not fit accelerator {name!r}: it takes {allowed}.")
