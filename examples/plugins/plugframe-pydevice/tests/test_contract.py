"""Run the contract suite of plugframe's accelerator plugins."""

from plugframe.testing import AcceleratorContract


class TestPydevice(AcceleratorContract):
    spec = "pydevice"
