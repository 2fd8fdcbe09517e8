"""Settings of wandb for tests: no output, no network, no record of this machine."""

import os
from collections.abc import Iterator

import pytest

for name, value in {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_X_DISABLE_STATS": "true",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_ERROR_REPORTING": "false",
}.items():
    os.environ[name] = value


@pytest.fixture
def nothing_left_behind(nothing_left_behind: None) -> Iterator[None]:
    """Have wandb forget artifacts, which it keeps until the process ends, with a temporary folder each."""
    yield
    from wandb.sdk.artifacts.artifact_instance_cache import artifact_instance_cache_by_client_id

    for artifact in artifact_instance_cache_by_client_id.values():
        if artifact._tmp_dir is not None:
            artifact._tmp_dir.cleanup()
    artifact_instance_cache_by_client_id.clear()
