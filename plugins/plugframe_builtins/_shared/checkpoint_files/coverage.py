"""Whether boxes fill a tensor, and stretches a file: every element and every byte exactly once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

Box = tuple[Sequence[int], Sequence[int]]

#: Dimensions along which a tensor is divided; a mesh of more has never been seen.
_MAX_DIVIDED = 8


def fills(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Say whether boxes inside of a tensor of this shape cover every element of it exactly once.

    Args:
        shape: of the tensor.
        boxes: offsets and sizes, as many numbers each as `shape` has.
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
    # The signed corners of boxes add up to those of the whole if and only if every element is in one box.
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
    """Say whether stretches, given by start and size, fill a file from `start` to `end` without gap or overlap."""
    return _fills_line(end - start, [(at - start, size) for at, size in stretches if size])
