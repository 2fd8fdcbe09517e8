"""A module with what a ``LightningModule`` of Lightning 2 has for Fabric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LightningBase(nn.Module):
    """Logs and steps through the object under ``_fabric``, as Lightning's does."""

    def __init__(self) -> None:
        super().__init__()
        self._fabric: Any = None
        self._fabric_optimizers: list[Any] = []

    @property
    def logger(self) -> Any:
        return self._fabric.logger

    def log(self, name: str, value: Any) -> None:
        self._fabric.log_dict(metrics={name: value})

    def optimizers(self) -> Any:
        return self._fabric_optimizers[0]

    def manual_backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise NotImplementedError

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        raise NotImplementedError


class Lightning(LightningBase):
    """A user's LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.epochs = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).sum()

    def manual_step(self, batch: Tensor) -> None:
        """Step by hand, from outside of a strategy."""
        self.manual_backward(self.training_step(batch, 0))
        self.optimizers().step()

    def on_train_epoch_end(self) -> None:
        self.epochs += 1
        self.log("epochs", torch.tensor(self.epochs))
