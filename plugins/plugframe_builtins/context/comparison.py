"""Compare a block on a part of the sequence with the same block on all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import map_tensors
from plugframe_builtins.context.attention import Call, Run
from plugframe_builtins.context.axis import SequenceAxis

#: Difference relative to the largest value, by dtype, that rounding explains.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def difference(axis: SequenceAxis, part: Run, full: Run, outputs: tuple[Any, Any], dim: int) -> str | None:
    """Return how a divided run differs from the undivided one on this rank, None if it does not.

    Args:
        outputs: of both runs.
        dim: the sequence dimension of the hidden states, the first tensor of the outputs.
    """
    if part.count != full.count:
        return f"it calls attention {part.count} times, and {full.count} times on the complete sequence"
    for number, (ours, theirs) in enumerate(zip(part.calls, full.calls, strict=True)):
        found = _calls(axis, ours, theirs)
        if found is not None:
            return f"{found} of its attention call {number} differ from those of the complete sequence"
    ours_out, theirs_out = _tensors(outputs[0]), _tensors(outputs[1])
    if len(ours_out) != len(theirs_out) or not ours_out:
        return f"it returns {len(ours_out)} tensors, and {len(theirs_out)} on the complete sequence"
    dtype = _coarsest([*ours_out[:1], *(tensor for call in part.calls for tensor in call.tensors)])
    if theirs_out[0].ndim <= dim:
        return f"its first output has shape {tuple(theirs_out[0].shape)}, without dimension {dim}"
    expected = theirs_out[0].chunk(axis.size, dim)[axis.index]
    for number, (own, true) in enumerate(zip(ours_out, [expected, *theirs_out[1:]], strict=True)):
        apart = _apart(own, true)
        if apart > _tolerance(dtype):
            what = "other shapes" if apart == float("inf") else f"{apart:.1e} of the largest value"
            return f"its output {number} is {what} apart from that on the complete sequence"
    return None


@contextmanager
def evaluating(block: nn.Module) -> Iterator[None]:
    """Set a block to evaluation, without gradients, and restore each submodule's mode."""
    modes = [(part, part.training) for part in block.modules()]
    for part, _ in modes:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _calls(axis: SequenceAxis, ours: Call, theirs: Call) -> str | None:
    dtype = _coarsest(ours.tensors)
    for name, own, true in zip(("queries", "keys", "values"), ours.tensors, theirs.tensors, strict=True):
        if ours.heads:
            true = true.chunk(axis.size, -3)[axis.index] if true.shape[-3] % axis.size == 0 else true
        elif name == "queries" or ours.chunks:
            true = true.chunk(axis.size, -2)[axis.index]
        if _apart(own, true) > _tolerance(dtype):
            return name
    if ours.causal != theirs.causal or (ours.mask is None) != (theirs.mask is None):
        return "masks"
    if ours.mask is not None and theirs.mask is not None:
        own, true = _kept(ours.mask), _kept(theirs.mask)
        if own.shape[-2:] != true.shape[-2:]:
            return "masks"
        # torch's own layers expand masks over heads, which counts as equal.
        apart = (own != true).any() if own.dtype == torch.bool else ((own - true).abs() > _tolerance(dtype)).any()
        return "masks" if bool(apart) else None
    return None


def _kept(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask.float().clamp(min=-1e30)


def _apart(own: Tensor, true: Tensor) -> float:
    """Return the largest difference relative to the largest value, infinite for other shapes."""
    if own.shape != true.shape or own.dtype != true.dtype:
        return float("inf")
    if not own.numel():
        return 0.0
    own, true = own.double(), true.double()
    different = (own - true).abs()
    # Values that are infinite or no number in both are equal.
    different = different.where(~((own == true) | (own.isnan() & true.isnan())), torch.zeros_like(different))
    largest = true.abs().nan_to_num(0.0, 0.0, 0.0).amax().item()
    found = different.amax().item()
    return found / largest if largest else (found and float("inf"))


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, output)
    return found


def _coarsest(tensors: Sequence[Tensor]) -> torch.dtype:
    return max((tensor.dtype for tensor in tensors), key=_tolerance)


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCES.get(dtype, 5e-2)
