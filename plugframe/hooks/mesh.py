"""The axes of a device mesh that strategies use, and what each means for data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from plugframe.errors import closest

#: What a strategy divides over the ranks of its axes, in the order in which composed strategies are applied.
Divides = Literal["stages", "tensors", "experts", "sequence", "blocks", "batch"]
ORDER: tuple[Divides, ...] = ("stages", "tensors", "experts", "sequence", "blocks", "batch")
#: The order of their axes in the mesh, outermost first: neighbours in a node are along the last.
#: The sequence stands before the batch: of the two axes over which a sharding strategy averages gradients, torch
#: replicates over the outer one and shards over the inner one.
PLACES: tuple[Divides, ...] = ("stages", "sequence", "batch", "experts", "blocks", "tensors")


@dataclass(frozen=True)
class Axis:
    """An axis of the device mesh that a strategy uses.

    Attributes:
        name: as users write it in ``mesh={"data": 2}``.
        samples: whether ranks along it read different samples; if not, they read the same ones.
        averages: whether the strategy that divides the batch averages gradients over it, though the axis is another
            one's: because each rank computes a part of them, or has samples of its own. It must provide
            ``"averages-axes"``.
        size: its size if users give none; None takes the ranks that are left.
        optional: whether another strategy that uses the name takes it over.
        aliases: other names that users may write.
    """

    name: str
    samples: bool = field(default=False, kw_only=True)
    averages: bool = field(default=False, kw_only=True)
    size: int | None = field(default=None, kw_only=True)
    optional: bool = field(default=False, kw_only=True)
    aliases: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class MeshLayout:
    """The axes of a mesh with their sizes; ranks count along the last axis first.

    Attributes:
        axes: in order, outermost first.
        sizes: of each.
        owners: the strategy that uses it, by name, of each.
    """

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]
    owners: tuple[str, ...]

    @classmethod
    def of(cls, claims: Mapping[str, tuple[Axis, ...]], given: Mapping[str, int], num_ranks: int) -> MeshLayout:
        """Return the layout of all ranks with given sizes, by names or aliases; -1 stands for the ranks that are left.

        Args:
            claims: the axes of each strategy, outermost first.

        Raises:
            ValueError: for a strategy without axes, an axis of two, an unknown name, one given twice, or sizes that do
                not multiply to `num_ranks`.
        """
        owned = _owned(claims)
        axes = [axis for axis, _ in owned]
        sizes = _sizes(axes, given)
        known = math.prod(size for size in sizes if size != -1)
        if num_ranks % known == 0:
            sizes = [num_ranks // known if size == -1 else size for size in sizes]
        if -1 in sizes or math.prod(sizes) != num_ranks:
            raise ValueError(
                f"it does not fit the {num_ranks} ranks of this job: the sizes must multiply to that; -1 takes those "
                "that are left."
            )
        return cls(tuple(axes), tuple(sizes), tuple(owner for _, owner in owned))

    def owned_by(self, strategy: str) -> tuple[str, ...]:
        """Return the names of the axes that a strategy uses."""
        return tuple(name for name, owner in zip(self.names, self.owners, strict=True) if owner == strategy)

    def averaged(self, base: str) -> tuple[str, ...]:
        """Return the names of the axes over which the strategy `base` averages gradients: its own, and `Axis.averages`.

        Outermost first.
        """
        pairs = zip(self.axes, self.owners, strict=True)
        return tuple(axis.name for axis, owner in pairs if owner == base or axis.averages)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(axis.name for axis in self.axes)

    @property
    def num_ranks(self) -> int:
        """The number of ranks of the mesh."""
        return math.prod(self.sizes)

    def coordinates(self, rank: int) -> Mapping[str, int]:
        """Return the index of a rank along each axis."""
        found: dict[str, int] = {}
        for name, size in zip(reversed(self.names), reversed(self.sizes), strict=True):
            rank, found[name] = divmod(rank, size)
        return found

    def data_shard(self, rank: int) -> tuple[int, int]:
        """Return ``(index, count)``: which shard of the data a rank reads; ranks with equal samples share one."""
        where, index, count = self.coordinates(rank), 0, 1
        for axis, size in zip(self.axes, self.sizes, strict=True):
            if axis.samples:
                index, count = index * size + where[axis.name], count * size
        return index, count

    def __str__(self) -> str:
        pairs = zip(self.axes, self.sizes, strict=True)
        return ", ".join(f"{axis.name}={size}" for axis, size in pairs if size > 1 or axis.size != 1)


def parse_mesh(text: str) -> dict[str, int]:
    """Return the sizes in ``"data=2,tensor=4"``.

    Raises:
        ValueError: if it has another form.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found = {name.strip(): int(size) for name, _, size in pairs}
    if len(found) < len(pairs):
        raise ValueError
    return found


def mesh_text(mesh: Mapping[Any, Any]) -> str:
    """Return sizes as they are typed: ``data=2,tensor=4``."""
    return ",".join(f"{name}={size}" for name, size in mesh.items())


def is_mesh(value: Any) -> bool:
    """Return whether a value maps names to sizes, one of them may be -1."""
    if not isinstance(value, Mapping) or not value:
        return False
    sizes = [size for size in value.values() if isinstance(size, int) and not isinstance(size, bool)]
    right = all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) < 2
    return right and len(sizes) == len(value) and all(isinstance(name, str) for name in value)


def _owned(claims: Mapping[str, tuple[Axis, ...]]) -> list[tuple[Axis, str]]:
    """Return each axis with the strategy that uses it: optional ones are taken over by others."""
    found: list[tuple[Axis, str]] = []
    for strategy, axes in claims.items():
        if not axes:
            raise ValueError(
                f"strategy {strategy!r} has no axes of a mesh, so it can neither be combined with other strategies nor "
                "take mesh=: leave them out, or choose another strategy."
            )
        others = {axis.name: (axis, other) for other in claims if other != strategy for axis in claims[other]}
        for axis in axes:
            other, owner = others.get(axis.name, (None, ""))
            if other is not None and not axis.optional and not other.optional:
                raise ValueError(
                    f"strategy {strategy!r} and strategy {owner!r} both use the axis {axis.name!r}: keep one of them."
                )
            if other is None or not axis.optional:
                found.append((axis, strategy))
    return found


def _sizes(axes: Sequence[Axis], given: Mapping[str, int]) -> list[int]:
    """Return the size of each axis, -1 for one that takes the ranks that are left."""
    names = {name: axis.name for axis in axes for name in (axis.name, *axis.aliases)}
    for name in given:
        if name not in names:
            known = ", ".join(axis.name for axis in axes)
            hint = closest(name, names)
            raise ValueError(f"the strategies of this job have no axis {name!r}.{hint} Their axes: {known}.")
        same = [other for other in given if names.get(other) == names[name]]
        if len(same) > 1:
            raise ValueError(f"{' and '.join(same)} are one axis: keep one.")
    sizes = {names[name]: size for name, size in given.items()}
    found = [sizes.get(axis.name, -1 if axis.size is None else axis.size) for axis in axes]
    if found.count(-1) > 1:
        unsaid = [axis.name for axis in axes if axis.name not in sizes and axis.size is None]
        example = ",".join(f"{name}=2" for name in unsaid)
        raise ValueError(
            f"the axes {' and '.join(unsaid)} need their numbers of ranks: write mesh={example}; -1 takes those that "
            "are left."
        )
    return found
