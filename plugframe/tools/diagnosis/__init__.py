"""What ``plugframe doctor`` looks into, each in a module of its own."""

from __future__ import annotations

from plugframe.tools.diagnosis.finding import Finding

__all__ = ["Finding"]
