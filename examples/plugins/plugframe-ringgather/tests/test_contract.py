"""The contract every plugframe collective keeps, checked over this one; and that of the strategies that use it."""

from typing import Any, ClassVar

from plugframe.testing import CollectiveContract, StrategyContract


class TestRing(CollectiveContract):
    spec = "ring"


class TestDDPOverRing(StrategyContract):
    spec = "ddp"
    settings: ClassVar[dict[str, Any]] = {"collective": "ring"}
