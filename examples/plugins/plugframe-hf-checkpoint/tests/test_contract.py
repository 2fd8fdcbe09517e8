"""Run the contract suite of plugframe's checkpoint plugins."""

from plugframe.testing import CheckpointContract


class TestHuggingFace(CheckpointContract):
    spec = "hf"
