"""A logger that writes TensorBoard event files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plugframe.base import Logger
from plugframe.errors import MissingDependencyError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.version_folder import new_version

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Write scalars into ``<folder>/version_N``, on rank 0; view them with ``tensorboard --logdir <folder>``.

    Args:
        folder: parent folder of the runs; files of earlier runs are never changed.

    Attributes:
        path: the folder of this run, None before set-up.

    Raises:
        MissingDependencyError: if tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs/tensorboard") -> None:
        # Checked here on every rank; at set-up only rank 0 would fail.
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingDependencyError(
                "TensorBoardLogger needs tensorboard: type \"pip install 'plugframe[tensorboard]'\"."
            )
        self.folder = Path(folder)
        self.path: Path | None = None
        self._writer: SummaryWriter | None = None

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        if context.world.global_rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.calls = 0
            self.path = new_version(self.folder)
            self._writer = SummaryWriter(str(self.path))

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        if self._writer is None:
            return
        number = self.next_step(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, number)

    @hookimpl
    def logger_teardown(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
