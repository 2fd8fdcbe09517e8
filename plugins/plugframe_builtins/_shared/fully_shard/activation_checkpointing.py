"""Activation checkpointing: recompute a block's activations in backward instead of storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Iterable[nn.Module]) -> Callable[[], None]:
    """Recompute the forwards of `blocks` in backward; return a function that undoes it.

    The class of the instances changes, so that parameter names stay the same.
    """
    changed = [(block, type(block)) for block in blocks]
    for block, plain in changed:
        block.__class__ = _recomputing(plain)

    def undo() -> None:
        for block, plain in changed:
            # A later change of the class is undone by whoever made it.
            if getattr(type(block), "recomputes", None) is plain:
                block.__class__ = plain

    return undo


def without_cache(module: nn.Module) -> Callable[[], None]:
    """Turn ``use_cache`` of a Hugging Face model off; return a function that undoes it.

    A block that is recomputed would add its keys and values to the cache twice. ``generate`` turns the cache on by
    itself, where nothing is recomputed.
    """
    config: Any = getattr(module, "config", None)
    if getattr(config, "use_cache", None) is not True:
        return lambda: None
    config.use_cache = False

    def undo() -> None:
        config.use_cache = True

    return undo


def _recomputing(plain: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain.forward, self, *args, use_reentrant=False, **kwargs)

    namespace = {"forward": forward, "recomputes": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), namespace)
