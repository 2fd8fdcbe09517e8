"""Layers and buffers that depend on how a batch is cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from plugframe.errors import UnsupportedError
from plugframe_builtins.pipeline.cut import buffers_of
from plugframe_builtins.pipeline.stand_in import OtherStage


def check_statistics(module: nn.Module) -> None:
    """Raise if a layer normalises over the samples of a batch in training.

    Raises:
        UnsupportedError: naming it.
    """
    for path, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.training:
            raise UnsupportedError(
                f"{type(part).__name__} {path!r} normalises over the samples of a batch, and strategy 'pipeline' would "
                "normalise over those of a micro-batch: use micro_batches=1, another norm, or "
                f"model.get_submodule({path!r}).eval()."
            )


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the buffers of this rank at the end: a trial run must not change running statistics."""
    held = {
        name: (buffer, buffer.detach().clone())
        for name, (_, _, buffer) in buffers_of(module).items()
        if not isinstance(buffer, OtherStage)
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in held.values():
                buffer.copy_(value)
