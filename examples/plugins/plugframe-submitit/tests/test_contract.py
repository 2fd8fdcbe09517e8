"""Run the contract suite of plugframe's launcher plugins."""

from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from plugframe.testing import LauncherContract


class TestSubmitit(LauncherContract):
    spec = "submitit"
    options: ClassVar[dict[str, Any]] = {"cluster": "local"}
    _folder: ClassVar[TemporaryDirectory[str]]

    @classmethod
    def setup_class(cls) -> None:
        """Write the outputs of the jobs to a temporary folder."""
        cls._folder = TemporaryDirectory()
        cls.options = {"cluster": "local", "folder": cls._folder.name}

    @classmethod
    def teardown_class(cls) -> None:
        cls._folder.cleanup()
