"""The logger contract: record metrics, hyperparameters and artifacts. Any number of loggers can be selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from plugframe.hooks.markers import hookspec, per_plugin

if TYPE_CHECKING:
    from torch import Tensor

    from plugframe.hooks.context import Context

#: A hyperparameter: JSON without dicts, which are flattened.
HyperParameter: TypeAlias = "str | int | float | bool | list[Any] | None"
#: The rows of a table: the same columns, in the same order, in each.
Table: TypeAlias = "Sequence[Mapping[str, str | int | float | bool | None]]"
#: What `logger_log_artifact` gets: an image, a table, text or a file.
Artifact: TypeAlias = "Tensor | Table | str | Path"
ArtifactKind: TypeAlias = Literal["image", "table", "text", "file"]


def artifact_kind(value: Artifact) -> ArtifactKind:
    """Return the kind of an artifact: ``"image"``, ``"table"``, ``"text"`` or ``"file"``."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Path):
        return "file"
    return "table" if isinstance(value, (list, tuple)) else "image"


class LoggerSpec(Protocol):
    """Hooks of the kind ``logger``. Every selected logger gets every call."""

    @hookspec
    def logger_setup(self, context: Context) -> None:
        """Prepare the logger. Called once on every rank; write files on global rank 0 only."""
        ...

    @hookspec
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Record metrics. Called on global rank 0 by ``lite.log`` and ``lite.log_dict``.

        `step` is None when the user passed none; the logger then counts its own calls.
        """
        ...

    @hookspec
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        """Record hyperparameters. Called on global rank 0 by ``lite.log_hyperparams``.

        `params` is flat: ``{"optimizer/lr": 0.1}`` for ``{"optimizer": {"lr": 0.1}}``. Values are JSON: str, int,
        float (NaN and infinities included), bool, None, or a list of those. A later call adds to the earlier ones; of
        a name recorded twice the later value counts. The base class warns once that the logger does not store them.
        """
        ...

    @hookspec
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        """Record an artifact. Called on global rank 0 by ``lite.log_artifact``.

        `name` is a relative path with ``/``, such as ``"samples/first"``; its parts hold no other special characters.
        `value` is the logger's own, except for a file, which may change after the call:

        - image: a uint8 tensor of shape ``(C, H, W)`` on the CPU; C is 1 (gray), 3 (RGB) or 4 (RGBA)
        - table: a list of dicts with the same keys in the same order; values are str, int, float, bool or None
        - text: a str
        - file: the `Path` of an existing file

        `plugframe.hooks.artifact_kind` tells them apart. A logger that cannot store a kind passes the call to
        ``super().logger_log_artifact(...)``: the base class warns once for each kind.
        """
        ...

    @hookspec
    def logger_run_id(self) -> str | None:
        """Return the id of the run that is recorded; None on other ranks, before set-up, or without ids.

        A store that assigns ids itself has none before the first record. A run resumed from a checkpoint has the id of
        the run that saved it, see `logger_load_state`.
        """
        ...

    @hookspec
    def logger_teardown(self, error: BaseException | None) -> None:
        """Flush and close. Called once on every rank, also after an exception.

        `error` is the exception that ends the run, to record it as failed: one that leaves the ``with`` block of
        `Lite`, is passed to ``lite.teardown``, or ends the process. None for a run that ends well. An implementation
        may leave the argument out.
        """
        ...

    @per_plugin
    def logger_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for a later job to continue this run, such as its id. Optional.

        Called on every rank by ``lite.save`` and ``lite.load``, as `extension_state`, which describes the values and
        the name they are saved under.

        Example:
            ``return {"run_id": self.run_id}``
        """
        return {}

    @per_plugin
    def logger_load_state(self, state: dict[str, Any]) -> None:
        """Continue the run of a checkpoint. Called on every rank by ``lite.load``, as `extension_load_state`.

        What this job has recorded already belongs to the continued run too. A load that fails on any rank is undone by
        a second call, with the state from before: change no file before the next record or the tear-down.
        """
        return None
