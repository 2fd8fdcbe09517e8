"""The two pluggy markers of the project."""

from __future__ import annotations

import pluggy

PROJECT = "plugframe"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

#: A provider hook: answered by the selected plugin of its kind, and by that one alone.
provider = hookspec(firstresult=True)
