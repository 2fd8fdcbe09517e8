"""Run the contract suite of plugframe's extensions."""

from plugframe.testing import ExtensionContract


class TestNaNGuard(ExtensionContract):
    spec = "nan-guard"
