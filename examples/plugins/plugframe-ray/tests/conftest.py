"""One cluster of Ray for all tests, without reports of usage."""

import os
from collections.abc import Iterator

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    """Start Ray once: it takes seconds."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()
