"""Loaders that are no ``DataLoader``: iterable objects that yield batches, such as webdataset's ``WebLoader``.

The object stays the user's. It is iterated through a ``DataLoader`` that takes its batches as they are, which divides
them between the ranks as any stream: every rank reads all batches, and keeps its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from plugframe.errors import SettingTypeError
from plugframe.utils.swap import KEY, State, adopt, plain_class, release

#: The answer for what cannot be divided.
_INSTEAD = "pass a DataLoader, or an object of a class with __iter__ that yields batches"


class Batches(IterableDataset[Any]):
    """The batches of an iterable, as a dataset; other attributes are those of the iterable."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(plain_class(self.source).__iter__(self.source))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "source" not in vars(self):
            raise AttributeError(name)
        return getattr(self.source, name)


class SizedBatches(Batches):
    """`Batches` of an iterable with a length."""

    def __len__(self) -> int:
        return int(plain_class(self.source).__len__(self.source))


class EpochBatches(Batches):
    """`Batches` of an iterable whose epoch can be set."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, unless the user ever did."""
        state = vars(self.source).get(KEY)
        if state is None or not state.epoch_set:
            plain_class(self.source).set_epoch(self.source, epoch)


class SizedEpochBatches(SizedBatches, EpochBatches):
    """`Batches` of an iterable with both."""


class IterableState(State):
    """State of an adopted iterable.

    Attributes:
        loader: what it is iterated through.
        epoch_set: whether the user ever called its ``set_epoch``.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.epoch_set = False


def check_iterable(loader: Any) -> None:
    """Raise unless an object can be iterated in place of a ``DataLoader``.

    Raises:
        SettingTypeError: saying what to pass instead.
    """
    what = type(loader).__name__
    if isinstance(loader, DataLoader):
        return
    if isinstance(loader, Dataset) and not _holds_loader(loader):
        raise SettingTypeError(
            f"setup_dataloaders() takes torch DataLoaders, got the dataset {what}, whose items are samples: pass "
            "DataLoader(dataset, batch_size)."
        )
    if isinstance(loader, (Tensor, nn.Module, Optimizer, str, bytes)) or not hasattr(type(loader), "__iter__"):
        raise SettingTypeError(f"setup_dataloaders() takes torch DataLoaders, got {what}: {_INSTEAD}.")
    if hasattr(type(loader), "__next__"):
        raise SettingTypeError(
            f"setup_dataloaders() takes torch DataLoaders, got the iterator {what}, which can be read once: {_INSTEAD}."
        )
    if hasattr(type(loader), "__getitem__") and hasattr(type(loader), "__len__"):
        raise SettingTypeError(
            f"setup_dataloaders() takes torch DataLoaders, got {what}: pass DataLoader({what.lower()}, batch_size), or "
            "batch_size=None if its items are batches."
        )
    if not hasattr(loader, "__dict__"):
        raise SettingTypeError(
            f"setup_dataloaders() takes torch DataLoaders, got {what}, which takes no attributes: {_INSTEAD}."
        )


def _holds_loader(dataset: Any) -> bool:
    """Return whether a dataset is a pipeline that begins with a loader, as webdataset's ``WebLoader``."""
    stages = (value for value in vars(dataset).values() if isinstance(value, (list, tuple)))
    return any(isinstance(stage, DataLoader) for each in stages for stage in each)


def as_loader(loader: Any) -> DataLoader[Any]:
    """Return a ``DataLoader`` itself, and for another iterable one that takes its batches as they are."""
    if isinstance(loader, DataLoader):
        return loader
    sized, epochs = (hasattr(type(loader), name) for name in ("__len__", "set_epoch"))
    kinds = {(False, False): Batches, (True, False): SizedBatches, (False, True): EpochBatches}
    return DataLoader(kinds.get((sized, epochs), SizedEpochBatches)(loader), batch_size=None)


def adopt_iterable(iterable: Any, loader: DataLoader[Any]) -> None:
    """Let `iterable` be iterated through `loader`, which was made by `as_loader` and is set up.

    Raises:
        SettingTypeError: for a class that cannot be swapped.
    """
    namespace: dict[str, Any] = {"__iter__": _iter}
    for name, method in (("__len__", _len), ("set_epoch", _set_epoch)):
        if hasattr(type(iterable), name):
            namespace[name] = method
    try:
        adopt(iterable, IterableState(loader), namespace)
    except TypeError as error:
        raise SettingTypeError(
            f"setup_dataloaders() cannot set up a {type(iterable).__name__} ({error}): {_INSTEAD}."
        ) from None


def release_iterable(iterable: Any) -> None:
    """Restore the iterable."""
    release(iterable)


def _iter(self: Any) -> Iterator[Any]:
    state: IterableState | None = self.__dict__.get(KEY)
    return iter(plain_class(self).__iter__(self)) if state is None else iter(state.loader)


def _len(self: Any) -> int:
    state: IterableState | None = self.__dict__.get(KEY)
    return int(plain_class(self).__len__(self)) if state is None else len(state.loader)


def _set_epoch(self: Any, *args: Any, **kwargs: Any) -> Any:
    state: IterableState | None = self.__dict__.get(KEY)
    if state is not None:
        state.epoch_set = True
    return plain_class(self).set_epoch(self, *args, **kwargs)
