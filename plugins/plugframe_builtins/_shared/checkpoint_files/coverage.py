"""Check that boxes cover a tensor, and byte ranges a file, exactly once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

Box = tuple[Sequence[int], Sequence[int]]

#: Most dimensions along which a tensor may be sharded.
_MAX_DIVIDED = 8


def fills(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Return whether boxes inside a tensor of this shape cover each of its elements exactly once.

    Args:
        shape: the tensor's shape.
        boxes: offsets and sizes, with as many entries each as `shape`.
    """
    solid = [(offsets, sizes) for offsets, sizes in boxes if math.prod(sizes)]
    if sum(math.prod(sizes) for _, sizes in solid) != math.prod(shape):
        return False
    if len(solid) <= 1:
        return True
    divided = [dim for dim, size in enumerate(shape) if any(box[1][dim] != size for box in solid)]
    if len(divided) == 1:
        (dim,) = divided
        return _fills_line(shape[dim], [(offsets[dim], sizes[dim]) for offsets, sizes in solid])
    if len(divided) > _MAX_DIVIDED:
        return False
    # The signed corners of boxes add up to those of the tensor if and only if every element is in one box.
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in solid:
        _add_corners(corners, [(offsets[dim], offsets[dim] + sizes[dim]) for dim in divided], 1)
    _add_corners(corners, [(0, shape[dim]) for dim in divided], -1)
    return not any(corners.values())


def _fills_line(size: int, stretches: Iterable[tuple[int, int]]) -> bool:
    end = 0
    for start, length in sorted(stretches):
        if start != end:
            return False
        end = start + length
    return end == size


def _add_corners(corners: Counter[tuple[int, ...]], ends: Sequence[tuple[int, int]], sign: int) -> None:
    for choice in itertools.product((0, 1), repeat=len(ends)):
        corner = tuple(end[which] for end, which in zip(ends, choice, strict=True))
        corners[corner] += sign * (-1) ** sum(choice)


def fills_file(start: int, end: int, stretches: Iterable[tuple[int, int]]) -> bool:
    """Return whether byte ranges (start, size) cover a file from `start` to `end` without gap or overlap."""
    return _fills_line(end - start, [(at - start, size) for at, size in stretches if size])
