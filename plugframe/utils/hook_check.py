"""The hooks of one plugin, checked by itself: as when it is used, and before."""

from __future__ import annotations

from typing import Any

from plugframe.core.planning.plan import Choice
from plugframe.core.runtime.binding import Binding
from plugframe.hooks.kinds import KINDS


def check_hooks(choice: Choice, plugin: Any) -> list[str]:
    """Check the hooks of one plugin by itself; return what of them is deprecated.

    Raises:
        PluginContractError: as when it is used.
    """
    binding = Binding()
    binding.add(choice, plugin)
    if not KINDS[choice.kind].many:
        binding.bind()  # a wrapper of a hook needs somebody who provides it
    return binding.deprecations
