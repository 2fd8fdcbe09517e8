"""Run the contract suite of plugframe's precision plugins."""

from plugframe.testing import PrecisionContract


class TestFp8Mixed(PrecisionContract):
    spec = "fp8-mixed"
