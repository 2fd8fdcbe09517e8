"""The strategy contract suite: train as one process would, and keep the user's objects usable."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from plugframe.errors import PluginError, UnsupportedError
from plugframe.hooks import Plugin
from plugframe.lite import Lite
from plugframe.testing.contracts import strategy_ranks as ranks
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.batches import run_batch, tell
from plugframe.testing.contracts.placed import accelerator_for
from plugframe.testing.contracts.running import Alone, broken, chosen, once, one_line
from plugframe.testing.contracts.strategy_bench import batch_of, loss_of

ONE_RANK = "One rank (a strategy for one rank is refused with more: each would train by itself)"
SUPPORTED = "Supported (a precision that does what the descriptor refuses is refused, with both names)"
DESCRIBED = "Described (strategy_describe returns lines for --dry-run, before set-up)"
BACKWARD = "Backward (the arguments of lite.backward reach the strategy)"

#: A capability: gradients are not averaged between ranks, by design; weights or updates are, from time to time.
LOCAL_GRADIENTS = "local-gradients"

_AVERAGING = [check.__name__ for check in ranks.AVERAGING]
_ALWAYS = [check.__name__ for check in ranks.ALWAYS]


class StrategyContract(PluginContract):
    """Subclass it and set `spec`. It starts two jobs, of two ranks and of one.

    ``ranks="one"`` in the descriptor leaves out the job of two ranks, and ``provides=("local-gradients",)``, of a
    strategy that averages something else than gradients, laws 6 and 7 on more than one rank.

    Attributes:
        tolerance: of a weight against plain torch's, relative to its change in training.
        settings: further arguments of `Lite`, such as ``{"collective": "acme"}``.
        build: a module-level function that returns the model to train, (n, 6) to (n, 2), for a strategy that does
            not support arbitrary models.
        loss: a module-level function ``f(model, x, y)`` that returns the loss, the mean over samples.
        batch: a module-level function ``f(number, seed)`` that returns inputs and targets, equal on all ranks. Inputs
            of another shape need a `build` to match.
        num_ranks: numbers of ranks to test, 1 and 2 at most.
        timeout_s: limit of one job with all its checks.
    """

    kind = "strategy"
    tolerance: ClassVar[float] = 1e-4
    settings: ClassVar[dict[str, Any]] = {}
    build: ClassVar[Any] = ranks.Model
    loss: ClassVar[Any] = staticmethod(loss_of)
    batch: ClassVar[Any] = staticmethod(batch_of)
    num_ranks: ClassVar[tuple[int, ...]] = (1, 2)
    timeout_s: ClassVar[float] = 180.0

    def precision(self) -> str:
        """Return the name of a supported precision that computes in float32, as plain torch does."""
        for entry in sorted(self.registry.entries("precision"), key=lambda entry: not entry.builtin):
            try:
                descriptor = self.registry.describe(entry)
                if not descriptor.factory or not self._supports(entry.name, descriptor):
                    continue
                dtypes = self.registry.make(entry).precision_dtypes()
            except PluginError:
                continue  # a broken package of a third party
            if dtypes.parameter is dtypes.compute is torch.float32:
                return entry.qualified
        pytest.skip("It supports no precision that computes as plain torch does.")

    @pytest.fixture
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The folder in which the jobs of the suite save checkpoints for each other."""
        return once(self, "folder", lambda: tmp_path_factory.mktemp("strategy"))

    def reports(self, num_ranks: int, folder: Path) -> dict[str, str]:
        """Run all checks on that many ranks, once for the suite; return a report for each, by its name."""
        if num_ranks == 1 and 2 in self.num_ranks and self.descriptor.ranks != "one":
            self.reports(2, folder)  # it saves a checkpoint for the job of one rank
        self.make()
        local = LOCAL_GRADIENTS in self.descriptor.provides and num_ranks > 1
        checks = ranks.ALWAYS if local else (*ranks.AVERAGING, *ranks.ALWAYS)
        settings = ranks.Settings(
            spec=self.spec,
            options=dict(self.options),
            provides=self.descriptor.provides,
            folder=str(folder),
            build=type(self).build,
            loss=type(self).loss,
            batch=type(self).batch,
            shares=any(not axis.samples for axis in self.descriptor.axes),
            tolerance=self.tolerance,
            lite={
                "accelerator": accelerator_for(self.descriptor, num_ranks).qualified,
                "precision": self.precision(),
                **self.settings,
            },
        )
        make = functools.partial(ranks.bench, settings=settings)
        return once(self, f"{num_ranks} ranks", lambda: run_batch(num_ranks, make, checks, timeout_s=self.timeout_s))

    @pytest.mark.parametrize("num_ranks", [2, 1])
    @pytest.mark.parametrize("check", [*_AVERAGING, *_ALWAYS])
    def test_on_ranks(self, check: str, num_ranks: int, folder: Path) -> None:
        """The check passes on that many ranks."""
        if num_ranks not in self.num_ranks:
            pytest.skip(f"num_ranks={self.num_ranks!r} leaves it out.")
        if num_ranks > 1 and self.descriptor.ranks == "one":
            pytest.skip("It works with one rank only.")
        if num_ranks > 1 and check in _AVERAGING and LOCAL_GRADIENTS in self.descriptor.provides:
            pytest.skip("It does not average gradients, by design.")
        tell(self.reports(num_ranks, folder)[check])

    # ------------------------------------------------------------------ in this process

    def _lite(self, **settings: Any) -> Lite:
        given = {"accelerator": accelerator_for(self.descriptor).qualified, "environment": Alone(), **self.settings}
        return Lite(**{**given, "strategy": chosen(self.kind, self.spec, dict(self.options)), **settings})

    def test_more_ranks_than_it_works_with_are_refused(self) -> None:
        """A strategy for one rank is refused with two, by name."""
        if self.descriptor.ranks != "one":
            pytest.skip("It works with any number of ranks.")
        self._refused(ONE_RANK, "2 ranks", [] if self.options else [self.entry.name], devices=2)

    def test_precisions_it_cannot_take_are_refused(self) -> None:
        """Lite raises for every installed precision with a capability that conflicts, with the names of both."""
        for entry in self.registry.entries("precision"):
            try:
                plugin = self.registry.describe(entry)
            except PluginError:
                continue  # a broken package of a third party
            if plugin.factory and not self._supports(entry.name, plugin) and self.registry.absent(entry) is None:
                # An object goes by the first name its class is published under.
                names = [entry.name] if self.options else [entry.name, self.entry.name]
                self._refused(SUPPORTED, f"precision {entry.name!r}", names, devices=1, precision=entry.qualified)

    def _supports(self, name: str, precision: Plugin) -> bool:
        listed = self.descriptor.precisions
        conflicts = self.descriptor.conflicts.get("precision", ())
        return (not listed or name in listed) and not set(conflicts) & set(precision.provides)

    def _refused(self, rule: str, what: str, names: list[str], **settings: Any) -> None:
        try:
            self._lite(**settings)
        except UnsupportedError as error:
            silent = [name for name in names if name not in str(error)]
            if silent:
                broken(rule, f"with {what} the message does not name {silent[0]!r}: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(rule, f"with {what} Lite raised {one_line(error)}, not an UnsupportedError")
        else:
            broken(rule, f"with {what} nothing is raised")

    def test_backward_takes_what_its_caller_gives(self) -> None:
        """strategy_backward takes args and kwargs: without them it would drop retain_graph=True silently."""
        taken = inspect.signature(self.make().strategy_backward).parameters
        left_out = [name for name in ("args", "kwargs") if name not in taken]
        if left_out:
            broken(BACKWARD, f"strategy_backward does not take {' and '.join(left_out)}: hand them to loss.backward()")

    def test_it_can_be_described_before_it_is_set_up(self) -> None:
        """strategy_describe returns strings of one line each."""
        try:
            lines = self.make().strategy_describe()
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(DESCRIBED, f"it raised {one_line(error)}")
        if isinstance(lines, str) or not all(isinstance(line, str) and "\n" not in line for line in lines):
            broken(DESCRIBED, f"it gave {lines!r}, not a sequence of lines")
