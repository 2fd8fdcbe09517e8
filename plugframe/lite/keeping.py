"""Keeping state: save and load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from plugframe import saving
from plugframe.adopt import state_of
from plugframe.hooks.checkpoint import SaveHandle
from plugframe.lite.core import Core
from plugframe.naming import Names, names_of
from plugframe.state import Filter


class Keeping(Core):
    """What goes to disk and comes back."""

    def save(
        self,
        path: Any,
        state: Any,
        filter: Mapping[str, Filter] | None = None,
        *,
        wait: bool = True,
    ) -> SaveHandle | None:
        """Write `state` at `path`; a crash at any instant leaves what was there whole. Every rank must call it.

        Args:
            path: where; a mapping here and a path second (``torch.save``'s order) is understood too.
            state: objects with a ``state_dict``, tensors, plain values, and dicts and lists of those.
            filter: for a key of `state`, which entries of that object are saved: ``f(name, value) -> bool``.
            wait: False lets a checkpoint plugin that can save in the background.

        Raises:
            CheckpointError: on all ranks; what was at `path` before is still there.
        """
        self._started("save")
        return saving.save(
            self._session, path, state, filters=filter, loaders=self._loaders, naming=self._naming, wait=wait
        )

    def load(
        self,
        path: Any,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Put what lies at `path` into the objects of `state`, and its plain values into the dict itself.

        Every rank must call it. Everything is checked before the first value is written.

        Args:
            state: as it was given to `save`; None returns the content instead.
            strict: whether every key must be there and have a place.
            weights_only: False lets a ``torch.save`` file of somebody else run code; never needed for our own.

        Returns:
            What has no place in `state`.

        Raises:
            CheckpointCorruptError: if it is not what was written.
            CheckpointMismatchError: listing every missing and unexpected key and wrong shape.
        """
        self._started("load")
        return saving.load(
            self._session,
            path,
            state,
            strict=strict,
            loaders=self._loaders,
            naming=self._naming,
            weights_only=weights_only,
        )

    def load_raw(self, path: Any, obj: Any, strict: bool = True, *, weights_only: bool | None = None) -> None:
        """Put the bare ``state_dict`` that lies at `path` into `obj`. Every rank must call it."""
        self._started("load_raw")
        saving.load_raw(self._session, path, obj, strict=strict, naming=self._naming, weights_only=weights_only)

    def _naming(self, optimizer: Optimizer) -> Names | None:
        """Return the names of the optimizer's parameters: now, or when it was set up if the strategy hides them."""
        found = names_of(optimizer, self._living())
        return found or getattr(state_of(optimizer), "names", None)
