"""Plugin objects and callbacks of a `Lite`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from plugframe.errors import SettingError, UnsupportedError, closest

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from plugframe.lite.lite import Lite


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return the plugins in a setting that takes one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def extension(lite: Lite, name: str) -> Any:
    """Return the extension in use under that name; see `Lite.extension`."""
    found = lite._session.extensions
    if name not in found:
        used = ", ".join(choice.name for choice in lite.plan.extensions) or "none"
        raise SettingError(
            f"extension({name!r}): no such extension is in use.{closest(str(name), found)} In use: {used}. "
            f"Lite(plugins={name!r}) or --plugins={name} adds it."
        )
    return found[name]


def callback_object(callback: Any) -> Any:
    """Return a callback object, created from ``package.module:Class`` if given as a string."""
    if not isinstance(callback, str):
        made = callback() if isinstance(callback, type) else callback
        if made is None or isinstance(made, (int, float, bytes, list, tuple, dict, set)):
            text = "pass objects with methods that lite.call() may name, or write 'package.module:Class'."
            raise SettingError(f"callbacks={callback!r}: {text}")
        return made
    module_name, colon, attribute = callback.partition(":")
    if not colon:
        raise SettingError(f"callbacks={callback!r}: write 'package.module:Class'.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingError(f"callbacks={callback!r}: {error}.") from error
    if not hasattr(module, attribute):
        raise SettingError(
            f"callbacks={callback!r}: {module_name} has no {attribute!r}.{closest(attribute, dir(module))}"
        )
    return getattr(module, attribute)()


def mesh(lite: Lite) -> DeviceMesh:
    """Return the mesh of the job; see `Lite.mesh`."""
    found = lite._started("mesh").mesh
    if found is None:
        raise UnsupportedError(
            "This job has no mesh: pass mesh= to Lite, or combine strategies, as in "
            f"strategy='{lite.plan.choices['strategy'].name}+NAME'."
        )
    return found
