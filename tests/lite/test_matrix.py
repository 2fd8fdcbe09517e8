"""Every installed strategy in every precision on every number of ranks: it trains as one process does, or refuses.

The cells come from the descriptors of what is installed: a new plugin enters by being installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from matrix_cells import EXACT, ON_FOUR, RANKS, Cell, Installed, Matrix, Passing, Training, in_order
from matrix_ranks import SAMPLES, SAVED_AFTER, STEPS, WINDOW, Run, build, run_cells, train_plain
from plugframe import Lite, UnsupportedError
from plugframe.core.planning.compatibility import Target
from plugframe.core.registry.registry import Registry
from ranks import RanksFailed, run_ranks

#: How far weights may be from those of one process, for each parameter as a part of the way it has gone in training,
#: and norms and losses as a part of themselves. One process sums a batch in another order than many: that is the
#: rounding of the precision, which the steps multiply.
TOLERANCES = {
    "32-true": 1e-5,
    "64-true": 1e-12,
    # Under autocast one process rounds parameters to 11 or 8 bits for each operation by itself; a strategy that
    # gathers them in 16 bits does so for all, the normalisations included.
    "16-mixed": 0.02,
    "bf16-mixed": 0.1,
    # Weights themselves are rounded: what is left of a small update is a matter of the last bit.
    "16-true": 0.02,
    "bf16-true": 0.2,
}
#: Of a precision that is not listed.
TOLERANCE = 0.2

#: How often ranks are started again after one cell failed, to run those behind it.
MAX_RESTARTS = 6

#: A collective that waits for so long is an error, in the test of whichever cell it is.
COLLECTIVE_TIMEOUT_S = 60

MATRIX = Matrix(Registry.discover())
TRAININGS, PASSINGS = MATRIX.trainings(), MATRIX.passings()
ONE_RANK = [c for c in TRAININGS if c.precision == EXACT and c.ranks == 1 and c.strategy in MATRIX.whole()]


def _ids(cells: list[Any]) -> list[str]:
    return [cell.id for cell in cells]


# ---------------------------------------------------------------- what the ranks brought


class Outcomes:
    """What came out of every cell; ranks are started once the first of their cells is asked for."""

    def __init__(self, folder: Path, cells: list[Cell]) -> None:
        self.folder = folder
        self._of: dict[str, dict[str, Any]] = {}
        saving = [cell.saved_by for cell in cells if isinstance(cell, Passing)]
        self._starts = in_order([*cells, *saving])

    def __getitem__(self, cell: Cell) -> dict[str, Any]:
        while cell.id not in self._of:
            self._start(*self._starts.pop(0))
        return self._of[cell.id]

    def _start(self, num_ranks: int, cells: list[Cell]) -> None:
        for cell in cells:
            source = self[cell.saved_by] if isinstance(cell, Passing) else {"kept": None}
            if "kept" not in source:
                kind = "refused" if "refused" in source else "failed"
                self._of[cell.id] = {kind: f"There is no checkpoint to load: {source[kind]}"}
        left = [cell for cell in cells if cell.id not in self._of]
        for _ in range(1 + MAX_RESTARTS):
            if left:
                left = self._run(num_ranks, left)
        self._of.update((cell.id, {"failed": f"not run: {1 + MAX_RESTARTS} cells failed before"}) for cell in left)

    def _run(self, num_ranks: int, cells: list[Cell]) -> list[Cell]:
        """Run cells up to the first that fails, and return those behind it."""
        env, died = {"PLUGFRAME_TIMEOUT_S": str(COLLECTIVE_TIMEOUT_S)}, ""
        try:
            run_ranks(num_ranks, run_cells, cells, self.folder, timeout_s=280, env=env)
        except RanksFailed as error:
            died = str(error)
        for number, cell in enumerate(cells):
            reports = [self._report(cell, rank) for rank in range(num_ranks)]
            self._of[cell.id] = _one_of(reports, died)
            if "failed" in self._of[cell.id]:
                return cells[number + 1 :]
        assert not died, died
        return []

    def _report(self, cell: Cell, rank: int) -> dict[str, Any] | None:
        path = self.folder / f"{cell.id}.rank{rank}"
        if not path.exists():
            return None
        report: dict[str, Any] = torch.load(path, weights_only=False)
        return report


def _one_of(reports: list[dict[str, Any] | None], died: str) -> dict[str, Any]:
    """Return what the ranks agree on: rank 0's outcome, or what failed."""
    done = [report for report in reports if report is not None]
    texts = [f"rank {rank}: {report['failed']}" for rank, report in enumerate(reports) if report and "failed" in report]
    if texts or len(done) < len(reports):
        return {"failed": "\n".join([*texts, died])}
    refusals = {report.get("refused") for report in done}
    if len(refusals) > 1:
        return {"failed": f"the ranks differ: {refusals}"}
    if refusals == {None} and any(
        differences([done[0]["norms"], done[0]["losses"]], [r["norms"], r["losses"]]) for r in done
    ):
        return {"failed": f"the ranks have different norms or losses: {[(r['norms'], r['losses']) for r in done]}"}
    return done[0]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run the cells that this session has selected."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    cells = [cast("Cell", item.callspec.params["cell"]) for item in items if "cell" in item.callspec.params]
    ready = {each.name for each in [*MATRIX.strategies, *MATRIX.precisions] if each.absent is None}
    return Outcomes(tmp_path_factory.mktemp("matrix"), [cell for cell in cells if not _used(cell) - ready])


def _used(cell: Cell) -> set[str]:
    return {cell.strategy, cell.precision} if isinstance(cell, Training) else {cell.source, cell.target}


@pytest.fixture
def outcome(cell: Cell, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return what came out of a cell, unless it cannot run here and says so."""
    for each in [*MATRIX.strategies, *MATRIX.precisions]:
        if each.name in _used(cell) and each.absent:
            pytest.skip(f"{each.name} needs {each.absent}")
    result: dict[str, Any] = request.getfixturevalue("outcomes")[cell]
    assert "failed" not in result, result["failed"]
    if "refused" in result:
        assert _says_why(result["refused"], cell), result.get("trace", result["refused"])
        pytest.skip(result["refused"])
    return result


def _says_why(refusal: str, cell: Cell) -> bool:
    """Say whether a refusal names the precision, what the strategy cannot do with the model, or the object to make."""
    if isinstance(cell, Training) and cell.precision != EXACT and f"precision={cell.precision!r}" in refusal:
        return refusal.startswith("UnsupportedError")
    if re.search(r"UnsupportedError: '[\w.]+' .* strategy '\w+' does not .*\. \w+ the model", refusal, re.DOTALL):
        return True
    return bool(re.search(r"SettingError.*use \w+\(.*=.*\)", refusal, re.DOTALL))


# ---------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def reference() -> Callable[[str], tuple[dict[str, Tensor], list[Tensor]]]:
    """Return a function that gives weights and norms of one process on whole batches, in a precision."""
    known: dict[str, tuple[dict[str, Tensor], list[Tensor]]] = {EXACT: train_plain(SAMPLES)}

    def of(precision: str) -> tuple[dict[str, Tensor], list[Tensor]]:
        if precision not in known:
            with Lite(accelerator="cpu", strategy="single", devices=1, precision=precision) as lite:
                run = Run(lite, precision, window=SAMPLES)
                run.train(STEPS)
                known[precision] = {k: v.clone() for k, v in run.model.state_dict().items()}, run.norms
        return known[precision]

    return of


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return, for each parameter, how far apart two trainings ended, as a part of the way of the second."""
    start = build(EXACT)[0].state_dict()
    assert list(ours) == list(theirs) == list(start)
    found = {}
    for name, other in theirs.items():
        moved = (other.double() - start[name].double()).norm()
        assert moved > 0, f"{name} was not trained"
        found[name] = ((ours[name].double() - other.double()).norm() / moved).item()
    return found


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Compare norms or losses; a strategy may compute them in a wider dtype than one process does."""
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack(theirs).double(), rtol=tolerance, atol=0)


def differences(ours: Any, theirs: Any) -> list[str]:
    """Return where two trees of tensors and values are not the same, to the last bit."""
    return list(_differences(ours, theirs, ""))


def _differences(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if set(ours) != set(theirs):
            yield f"{where} has keys {list(ours)} and {list(theirs)}"
        for key in ours:
            if key in theirs:
                yield from _differences(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(one, other, f"{where}[{number}]")
    elif isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            yield f"{where} is {ours.dtype} {tuple(ours.shape)} and {theirs.dtype} {tuple(theirs.shape)}"
        elif not torch.equal(ours, theirs):
            yield f"{where} differs by {(ours - theirs).abs().max().item():.3g}"
    elif ours != theirs:
        yield f"{where} is {ours!r} and {theirs!r}"


# ---------------------------------------------------------------- the tests


def test_the_matrix_holds_everything_that_is_installed() -> None:
    """Every strategy and precision that a distribution publishes, and that is no alias, has cells."""
    assert not MATRIX.broken
    for kind, cells in (
        ("strategy", {cell.strategy for cell in TRAININGS}),
        ("precision", {cell.precision for cell in TRAININGS}),
    ):
        published = metadata.entry_points(group=f"plugframe.{kind}")
        found = {point.name: point.load() for point in published}
        names = {name for name, plugin in found.items() if not plugin.alias_of and plugin.works_alone}
        elsewhere = {each.name for each, _ in MATRIX.misfits("strategies" if kind == "strategy" else "precisions")}
        assert names
        assert names <= {name.rpartition(":")[2] for name in cells | elsewhere}
    for strategy in MATRIX.strategies:
        on = {cell.ranks for cell in TRAININGS if cell.strategy == strategy.name}
        assert on == {ranks for ranks in RANKS if strategy.fits(ranks)}


def test_a_new_plugin_enters_by_being_installed(packages: Callable[..., None]) -> None:
    """Somebody else's strategy gets its cells from its descriptor; one that cannot be loaded is told."""
    packages("acme", "broken")
    matrix = Matrix(Registry.discover())
    cells = {(cell.precision, cell.ranks) for cell in matrix.trainings() if cell.strategy == "acme"}
    on_less = {(precision.name, ranks) for precision in matrix.precisions for ranks in (1, 2)}
    assert cells == on_less | {(precision, 4) for precision in ON_FOUR}
    passings = matrix.passings()
    assert "acme" in {cell.source for cell in passings} & {cell.target for cell in passings}
    assert sum(len(cells) for _, cells in in_order([*matrix.trainings(), *passings])) == len(
        {*matrix.trainings(), *passings}
    )
    assert any("broken-import" in text for text in matrix.broken)


def test_every_checkpoint_is_passed_on() -> None:
    """Every strategy that is there, and can be exact, saves for another one and loads from another one."""
    able = {s.name for s in MATRIX.strategies if s.absent is None and s.fits(1)}
    exact = able & {cell.strategy for cell in TRAININGS if cell.precision == EXACT}
    assert exact <= {cell.source for cell in PASSINGS}
    assert exact <= {cell.target for cell in PASSINGS}
    assert {(cell.saved_on, cell.ranks) for cell in PASSINGS} >= {(4, 2), (2, 4), (4, 1), (1, 4), (2, 1), (1, 2)}


@pytest.mark.ranks
@pytest.mark.parametrize("cell", TRAININGS, ids=_ids(TRAININGS))
def test_training_equals_one_process(
    cell: Training, outcome: dict[str, Any], reference: Callable[[str], tuple[dict[str, Tensor], list[Tensor]]]
) -> None:
    """Weights and norms after 10 steps with unequal micro-batches and clipping are those of the whole batch."""
    weights, norms = reference(cell.precision)
    tolerance = TOLERANCES.get(cell.precision, TOLERANCE)
    assert len(outcome["norms"]) == len(norms) == STEPS
    assert_near(outcome["norms"], norms, tolerance)
    far = distance(outcome["content"]["model"], weights)
    assert max(far.values()) <= tolerance, far


@pytest.mark.ranks
@pytest.mark.parametrize("cell", ONE_RANK, ids=_ids(ONE_RANK))
def test_one_rank_is_plain_torch(cell: Training, outcome: dict[str, Any]) -> None:
    """On one rank, where a strategy keeps the whole model, the order of sums is plain torch's: all bits are equal."""
    weights, norms = train_plain(WINDOW)
    assert differences(outcome["content"]["model"], weights) == []
    assert differences(outcome["norms"], norms) == []


@pytest.mark.ranks
@pytest.mark.parametrize("cell", PASSINGS, ids=_ids(PASSINGS))
def test_checkpoints_pass_between_strategies(cell: Passing, outcome: dict[str, Any], outcomes: Outcomes) -> None:
    """What one strategy saved on some ranks another one holds on others, to the bit, and trains on as the first."""
    saved = outcomes[cell.saved_by]
    assert differences(saved["kept"], outcome["kept"]) == []
    tolerance = TOLERANCES[EXACT]
    assert_near(outcome["losses"], saved["losses"][SAVED_AFTER:], tolerance)
    assert_near(outcome["norms"], saved["norms"][SAVED_AFTER:], tolerance)
    far = distance(outcome["content"]["model"], saved["content"]["model"])
    assert max(far.values()) <= tolerance, far


@pytest.mark.parametrize(
    ("strategy", "precision"), [pytest.param(s, p, id=f"{s.name}-{p.name}") for s, p in MATRIX.unhonoured()]
)
def test_precisions_that_are_not_honoured_are_refused(strategy: Installed, precision: Installed) -> None:
    """A precision that does what a strategy cannot take is refused, with both names and what that is."""
    refused = next(each for each in strategy.plugin.conflicts["precision"] if each in precision.plugin.provides)
    expected = (
        f"precision={precision.name!r} has {refused!r}, which strategy {strategy.name!r} does not support: choose "
    )
    with pytest.raises(UnsupportedError, match=re.escape(expected)):
        Lite(accelerator="cpu", devices=1, strategy=strategy.name, precision=precision.name)


@pytest.mark.parametrize(
    ("strategy", "ranks"), [pytest.param(s, n, id=f"{s.name}-on-{n}") for s, n in MATRIX.misfits("strategies")]
)
def test_ranks_that_do_not_fit_are_refused(strategy: Installed, ranks: int) -> None:
    """A strategy that cannot work on so many ranks of the CPU is refused, with what can."""
    problem = Target("cpu", ranks).incompatibility(strategy.plugin)
    able = sorted(
        (each for each in MATRIX.strategies if each.plugin.priority is not None and each.fits(ranks)),
        key=lambda each: -(each.plugin.priority or 0),
    )
    use = f" use strategy={' or '.join(repr(each.name) for each in able)}, or" if able else ""
    with pytest.raises(UnsupportedError, match=re.escape(f"strategy={strategy.name!r} {problem}:{use} choose ")):
        Lite(accelerator="cpu", devices=ranks, strategy=strategy.name)
