"""Runs of a logger by itself, and the comparison of what it recorded."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch

from plugframe.errors import PlugframeWarning
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.running import broken, one_line

#: A metric's step, name and value.
Record = tuple[int, str, float]


class LoggerBench(PluginContract):
    """What the tests of loggers share.

    Attributes:
        float_dtype: the format in which the logger stores metrics; ``"float32"`` is a loss that its users should know.
        infinity: what it stores for infinity; the largest number in a store that has no infinities.
        metric_name: a name with characters that files and databases treat specially; with others in a store that
            refuses these.
    """

    kind = "logger"
    float_dtype: ClassVar[Literal["float64", "float32"]] = "float64"
    infinity: ClassVar[float] = math.inf
    metric_name: ClassVar[str] = "läng,e \"q'"

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Return constructor arguments for a logger that writes into `folder`."""
        return {"folder": str(folder), **self.options}

    def read(self, logger: Any) -> Sequence[Record]:
        """Return the metrics of the run that `logger` has ended, each as (step, name, value), in stored order."""
        raise NotImplementedError(f"{type(self).__name__} must give read(): what the logger recorded.")

    def read_hyperparams(self, logger: Any) -> Mapping[str, Any]:
        """Return the hyperparameters of the run that `logger` has ended. Needed if it stores them.

        A number may be given as its text, as some stores keep it.
        """
        raise NotImplementedError

    def read_artifact(self, logger: Any, name: str, step: int | None, kind: str) -> Any:
        """Return an artifact of the run that `logger` has ended. Needed for each kind that it stores.

        An ``"image"`` as a uint8 tensor or array of shape ``(H, W, C)``; a ``"table"`` as a list of dicts, or in
        another form as the texts of its cells, row by row; ``"text"`` as a str; a ``"file"`` as bytes.
        """
        raise NotImplementedError

    def has_failed(self, logger: Any) -> bool:
        """Return whether the run that `logger` has ended is recorded as failed. Needed if it records that."""
        raise NotImplementedError

    # ------------------------------------------------------------------ helpers

    def logger(self, folder: Path) -> Any:
        """Return a new logger that writes into `folder`."""
        return self.make(**self.arguments(folder))

    @contextmanager
    def run(self, logger: Any, *, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Set the logger up on one rank, and tear it down, with the error that leaves the block."""
        world = World(global_rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size)
        context = Context(world=world, device=torch.device("cpu"), hooks=SimpleNamespace(), names={})
        call(logger.logger_setup, context=context)
        error: BaseException | None = None
        try:
            yield logger
        except BaseException as raised:
            error = raised
            raise
        finally:
            tear_down(logger, error)

    def log(self, logger: Any, metrics: dict[str, float], step: int | None, *, rule: str) -> None:
        """Log metrics, and report an error with the rule."""
        try:
            call(logger.logger_log, metrics=metrics, step=step)
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(rule, f"logger_log({metrics}, step={step}) raised {one_line(error)}")

    def found(self, logger: Any) -> list[Record]:
        """Return what was recorded, in stored order."""
        return [(int(step), str(name), float(value)) for step, name, value in self.read(logger)]

    def stored(self, value: float) -> float:
        """Return a value as the logger stores it."""
        if math.isinf(value):
            return math.copysign(self.infinity, value)
        return torch.tensor(value, dtype=getattr(torch, self.float_dtype)).item()

    def expect(self, logger: Any, expected: Sequence[Record], *, rule: str, what: str) -> None:
        """Check that the recorded metrics are the expected ones, in any order."""
        found = sorted(self.found(logger), key=repr)
        wanted = sorted(((step, name, self.stored(value)) for step, name, value in expected), key=repr)
        missing = [record for record in wanted if not any(same(record, other) for other in found)]
        more = [record for record in found if not any(same(record, other) for other in wanted)]
        if missing or more:
            texts = [f"{records[0]} is {how}" for records, how in ((missing, "missing"), (more, "there")) if records]
            broken(rule, f"{what}: (step, name, value) {', and '.join(texts)}")


def same(first: Record, second: Record) -> bool:
    """Return whether two records are equal; NaN equals NaN."""
    values = first[2], second[2]
    return first[:2] == second[:2] and (values[0] == values[1] or all(map(math.isnan, values)))


def call(hook: Any, **arguments: Any) -> Any:
    """Call a hook as a job does: with those arguments that the implementation takes."""
    taken = inspect.signature(hook).parameters
    return hook(**{name: value for name, value in arguments.items() if name in taken})


def tear_down(logger: Any, error: BaseException | None = None) -> None:
    """Tear the logger down."""
    call(logger.logger_teardown, error=error)


@contextmanager
def warned() -> Iterator[list[str]]:
    """Yield a list that holds plugframe's warnings after the block."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield found
    found += [str(each.message) for each in seen if issubclass(each.category, PlugframeWarning)]
    for other in seen:
        if not issubclass(other.category, PlugframeWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
