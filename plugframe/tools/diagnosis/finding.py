"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: ``"note"`` is no fault: something that is not there, or that is not used. ``"error"`` makes the exit code 1.
Status = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        area: the section it belongs to.
        name: what was looked at.
        status: how it is.
        text: what was found, and what to type if something is wrong.
        facts: the same as plain values, for ``--json``.
    """

    area: str
    name: str
    status: Status
    text: str
    facts: dict[str, Any] = field(default_factory=dict)
