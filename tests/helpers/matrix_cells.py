"""The cells of the matrix: what is installed × what it declares, and who loads whose checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from plugframe import Plugin
from plugframe.core.planning.compatibility import Target
from plugframe.core.registry.registry import Registry
from plugframe.errors import PluginLoadError

RANKS = (1, 2, 4)

#: The precision of what goes through checkpoints: nothing is rounded, so whatever differs is wrong.
EXACT = "32-true"

#: The precisions on four ranks: what rounding does to the exchange between ranks is seen on two, in all of them.
ON_FOUR = (EXACT, "bf16-mixed")

#: The ranks that save and those that load. 4 → 1 comes from strategies for one rank, which are listed apart.
FROM_TO = ((4, 2), (2, 4), (1, 4), (2, 1), (1, 2))

#: Which ranks are started one after the other: those that save before those that load.
STARTS = ((2, ()), (1, (2,)), (4, (1, 2)), (2, (4, 1)), (1, (4,)))


@dataclass(frozen=True)
class Installed:
    """A name that is installed, and no alias.

    Attributes:
        name: what selects it; qualified where the bare name is a built-in's.
        absent: what it needs and is not there, with how to install it.
    """

    name: str
    plugin: Plugin
    absent: str | None

    def fits(self, ranks: int) -> bool:
        """Say whether its descriptor allows so many ranks on the CPU."""
        return Target("cpu", ranks).incompatibility(self.plugin) is None


@dataclass(frozen=True)
class Training:
    """A strategy in a precision on a number of ranks; in `EXACT` it leaves a checkpoint as well."""

    strategy: str
    precision: str
    ranks: int

    @property
    def id(self) -> str:
        return f"{self.strategy}-{self.precision}-on-{self.ranks}"


@dataclass(frozen=True)
class Passing:
    """A checkpoint that one strategy saved and another one loads."""

    source: str
    saved_on: int
    target: str
    ranks: int

    @property
    def id(self) -> str:
        return f"{self.source}-on-{self.saved_on}-to-{self.target}-on-{self.ranks}"

    @property
    def saved_by(self) -> Training:
        """The cell whose checkpoint it is."""
        return Training(self.source, EXACT, self.saved_on)


Cell = Training | Passing


class Matrix:
    """What is installed here, and what follows from it.

    Attributes:
        broken: why descriptors could not be loaded.
    """

    def __init__(self, registry: Registry) -> None:
        self.broken: list[str] = []
        self.strategies = list(self._installed(registry, "strategy"))
        self.precisions = list(self._installed(registry, "precision"))

    def _installed(self, registry: Registry, kind: str) -> Iterator[Installed]:
        for entry in registry.entries(kind):
            try:
                plugin = registry.describe(entry)
                absent = registry.absent(entry)
            except PluginLoadError as error:
                self.broken.append(str(error))
                continue
            if plugin.factory and plugin.works_alone:
                yield Installed(entry.qualified if registry.shadowed(entry) else entry.name, plugin, absent)

    def trainings(self) -> list[Training]:
        """Return every cell that is declared possible, the same ranks together."""
        return [
            Training(strategy.name, precision.name, ranks)
            for ranks in RANKS
            for strategy in self.strategies
            for precision in self.precisions
            if honours(strategy, precision) and strategy.fits(ranks) and precision.fits(ranks)
            if ranks < 4 or precision.name in ON_FOUR
        ]

    def whole(self) -> set[str]:
        """Return the strategies that keep the whole model on every rank."""
        return {strategy.name for strategy in self.strategies if "sharded" not in strategy.plugin.provides}

    def unhonoured(self) -> list[tuple[Installed, Installed]]:
        """Return the strategies with the precisions that do what they cannot take."""
        return [(s, p) for s in self.strategies for p in self.precisions if s.fits(1) and not honours(s, p)]

    def misfits(self, kind: str) -> list[tuple[Installed, int]]:
        """Return what cannot work on so many ranks on the CPU."""
        return [(each, ranks) for each in getattr(self, kind) for ranks in RANKS if not each.fits(ranks)]

    def passings(self) -> list[Passing]:
        """Return who loads whose checkpoint.

        Strategies that share an implementation are one here: each implementation loads from each other one, and
        its names take turns. Those of an implementation that keeps parts of a model also load from one another.
        """
        families: dict[str, list[Installed]] = {}
        for strategy in self.strategies:
            if (
                strategy.absent is None
                and strategy.fits(1)
                and any(honours(strategy, each) for each in self.precisions if each.name == EXACT)
            ):
                families.setdefault(strategy.plugin.factory, []).append(strategy)
        sources, targets = ({factory: itertools.cycle(names) for factory, names in families.items()} for _ in "st")
        pairs: list[tuple[Installed, Installed]] = []
        for one, other in itertools.product(families, repeat=2):
            if one != other:
                pairs.append((next(sources[one]), next(targets[other])))
            elif "sharded" in families[one][0].plugin.provides:
                names = families[one]
                pairs += zip(names, [*names[1:], names[0]], strict=True)
        several, down, up = itertools.cycle(FROM_TO), itertools.cycle((4, 2)), itertools.cycle((2, 4))
        found = []
        for source, target in pairs:
            if source.fits(2) and target.fits(2):
                saved_on, ranks = next(several)
            else:
                saved_on, ranks = (next(down), 1) if source.fits(2) else (1, next(up) if target.fits(2) else 1)
            found.append(Passing(source.name, saved_on, target.name, ranks))
        return found


def honours(strategy: Installed, precision: Installed) -> bool:
    """Say whether the precision does nothing that the strategy's descriptor refuses."""
    refused = strategy.plugin.conflicts.get("precision", ())
    return not set(refused) & set(precision.plugin.provides)


def in_order(cells: Iterable[Cell]) -> list[tuple[int, list[Cell]]]:
    """Return which cells run in which start of ranks."""
    left = list(dict.fromkeys(cells))
    starts: list[tuple[int, list[Cell]]] = []
    seen: set[int] = set()
    for ranks, saved_on in STARTS:
        first, seen = ranks not in seen, seen | {ranks}
        mine = [c for c in left if c.ranks == ranks and (first if isinstance(c, Training) else c.saved_on in saved_on)]
        starts.append((ranks, mine))
        left = [c for c in left if c not in mine]
    assert not left, left
    return starts
