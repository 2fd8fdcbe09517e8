"""The contract every plugframe precision keeps, checked over this one."""

from plugframe.testing import PrecisionContract


class TestFp8Mixed(PrecisionContract):
    spec = "fp8-mixed"
