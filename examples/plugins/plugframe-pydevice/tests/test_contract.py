"""The contract every plugframe accelerator keeps, checked over this one."""

from plugframe.testing import AcceleratorContract


class TestPydevice(AcceleratorContract):
    spec = "pydevice"
