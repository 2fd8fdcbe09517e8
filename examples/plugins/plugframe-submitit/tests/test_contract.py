"""The contract every plugframe launcher keeps, checked over this one."""

from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from plugframe.testing import LauncherContract


class TestSubmitit(LauncherContract):
    spec = "submitit"
    options: ClassVar[dict[str, Any]] = {"cluster": "local"}
    _folder: ClassVar[TemporaryDirectory[str]]

    @classmethod
    def setup_class(cls) -> None:
        """Keep the outputs of the jobs apart, and no longer than the tests need them."""
        cls._folder = TemporaryDirectory()
        cls.options = {"cluster": "local", "folder": cls._folder.name}

    @classmethod
    def teardown_class(cls) -> None:
        cls._folder.cleanup()
