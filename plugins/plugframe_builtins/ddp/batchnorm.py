"""Synchronised batch normalisation in the user's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from plugframe.utils.logging import warn_caller


class _Synced(nn.SyncBatchNorm):
    """A ``SyncBatchNorm`` that is still an instance of the class it replaces."""

    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are plain modules: they may be used without a process group.
        state = {key: value for key, value in self.__dict__.items() if key != "process_group"}
        return object.__new__, (self.plain,), state


class _Synced1d(_Synced, nn.BatchNorm1d):
    plain = nn.BatchNorm1d


class _Synced2d(_Synced, nn.BatchNorm2d):
    plain = nn.BatchNorm2d


class _Synced3d(_Synced, nn.BatchNorm3d):
    plain = nn.BatchNorm3d


_SYNCED: dict[type[nn.Module], type[_Synced]] = {synced.plain: synced for synced in (_Synced1d, _Synced2d, _Synced3d)}


def sync_batchnorm(module: nn.Module, *, warn: bool) -> Callable[[], None]:
    """Make every batch normalisation in `module` use the batches of all ranks; return a function that undoes it.

    Instances change their class, whereas ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces them:
    references to them and their hooks stay valid, and the module itself may be a batch normalisation.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    skipped = set()
    for child in module.modules():
        synced = _SYNCED.get(type(child))
        if synced is not None:
            changed.append((child, type(child)))
            child.__class__ = synced
            child.__dict__["process_group"] = None  # all ranks
        elif isinstance(child, tuple(_SYNCED)) and not isinstance(child, nn.SyncBatchNorm):
            skipped.add(type(child).__qualname__)
    if skipped and warn:
        warn_caller(
            f"sync_batchnorm=True leaves {', '.join(sorted(skipped))} as it is: a subclass of BatchNorm may do "
            "more than nn.SyncBatchNorm would."
        )

    def undo() -> None:
        for child, plain in changed:
            if type(child) in _SYNCED.values():
                child.__class__ = plain
                del child.__dict__["process_group"]

    return undo
