"""The checks of ``plugframe doctor``, one module each."""

from __future__ import annotations

from plugframe.tools.diagnosis.finding import Finding

__all__ = ["Finding"]
