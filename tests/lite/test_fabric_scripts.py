"""Scripts written for Fabric and for early Lite run after a change of one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fabric_scripts import SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_on_one_device(script: Callable[..., float], tmp_path: Path) -> None:
    """Scripts in the style of Fabric and early Lite train, save and load on one device, without a warning."""
    assert math.isfinite(script(tmp_path, accelerator="cpu", devices=1))
