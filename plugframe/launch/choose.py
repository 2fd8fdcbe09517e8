"""Which launcher starts the ranks of a job."""

from __future__ import annotations

from dataclasses import replace

from plugframe.core.config.request import Request
from plugframe.core.planning.compatibility import names_of
from plugframe.core.planning.installed import Installed
from plugframe.core.planning.options import configured
from plugframe.core.planning.plan import Choice
from plugframe.core.planning.requested import requested
from plugframe.core.planning.resolve import warn_of
from plugframe.core.registry.catalogue import Catalogue
from plugframe.errors import UnsupportedError

#: What a launcher that was asked for cannot do, and what to do instead.
_CANNOT = {"script": "start a script again: call launch(fn) with a function", "function": "run a function"}


def choose_launcher(request: Request, catalogue: Catalogue, wants: str) -> Choice:
    """Return the launcher for a job that needs the capability `wants`, with its options.

    Args:
        wants: ``"script"``, ``"function"``, or ``"interactive"`` for a function that cannot be imported by name.

    Raises:
        UnsupportedError: if there is none, or the one that was asked for cannot do it.
    """
    notes: dict[str, None] = {}
    installed = Installed(catalogue, notes.setdefault)
    try:
        asked = requested(request, installed).single.get("launcher")
        if asked is not None and wants in asked.descriptor.provides:
            return configured(asked, request, installed)
        able = [each for each in installed.candidates("launcher") if wants in each.descriptor.provides]
        if asked is not None:
            cannot = _CANNOT.get(wants, "run a function that is typed at a prompt")
            instead = f", or use launcher={names_of(able)}" if able else ""
            raise UnsupportedError(f"launcher={asked.name!r} cannot {cannot}{instead}.")
        if not able:
            refused = installed.refused("launcher")
            raise UnsupportedError(
                f"No installed launcher can start a {wants}: install one, or use `plugframe run`.{refused}"
            )
        return configured(replace(able[0], reason="auto: the first that can do it"), request, installed)
    finally:
        warn_of(note for note in notes if note not in request.notes)
