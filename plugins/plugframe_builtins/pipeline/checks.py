"""What a model that was cut into stages cannot have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from plugframe.errors import OrderError, UnsupportedError
from plugframe_builtins.pipeline.cut import Cut, buffers_of
from plugframe_builtins.pipeline.stand_in import OtherParameter, OtherStage


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that normalise over the samples of a batch in training, by path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, _BatchNorm)}


def check_statistics(norms: Mapping[str, nn.Module]) -> None:
    """Raise if one of the layers is in training.

    Raises:
        UnsupportedError: naming it.
    """
    for path, part in norms.items():
        if part.training:
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


def check_module(module: nn.Module) -> None:
    """Raise for what cannot be cut.

    Raises:
        OrderError: if a module was compiled.
        UnsupportedError: for sparse gradients.
    """
    for path, part in module.named_modules():
        # ``module.compile()``, and what ``torch.compile(module)`` returns.
        if part._compiled_call_impl is not None or "_orig_mod" in dict(part.named_children()):
            raise OrderError(
                f"{path or type(module).__name__!r} is compiled, and strategy 'pipeline' replaces what its stages run: "
                "leave torch.compile out."
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise UnsupportedError(
                f"{type(part).__name__} {path!r} has sparse=True, and strategy 'pipeline' sends dense gradients only: "
                "leave sparse=True out."
            )


def check_added(module: nn.Module, cut: Cut, places: Sequence[tuple[nn.Module, str, int]]) -> None:
    """Raise if the model has a parameter that it did not have at set-up.

    Raises:
        OrderError: naming it.
    """
    own = {(id(part), name) for part, name, _ in places}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, parameter in part._parameters.items():
            known = (id(part), name) in own or isinstance(parameter, OtherParameter)
            full = f"{path}." * bool(path) + name
            if parameter is not None and not (known and full in cut.owners):
                raise OrderError(
                    f"{full!r} of this {type(module).__name__} came after lite.setup(): strategy 'pipeline' puts what "
                    "it finds at set-up into stages. Change the model before it is set up."
                )
