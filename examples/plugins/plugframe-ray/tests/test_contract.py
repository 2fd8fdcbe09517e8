"""Run the contract suite of plugframe's launcher plugins."""

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install ray")

from plugframe.testing import LauncherContract


class TestRay(LauncherContract):
    spec = "ray"
