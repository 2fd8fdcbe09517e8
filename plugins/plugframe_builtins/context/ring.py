"""Attention to keys and values that go round the ranks: none has more than two chunks of them at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plugframe_builtins.context.axis import SequenceAxis


@dataclass(frozen=True)
class Terms:
    """What a call of attention has besides queries, keys and values.

    Attributes:
        mask: of the complete sequence, bool or added to the scores, of shape (…, S or 1, S or 1).
        causal: whether a token attends to itself and those before it only.
        dropout: probability.
        scale: of the scores.
    """

    mask: Tensor | None
    causal: bool
    dropout: float
    scale: float


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any) -> bool:
    """Return whether `attend` supports a call; equal on all ranks."""
    alike = query.shape[:-3] == key.shape[:-3] == value.shape[:-3] and query.shape[-1] == key.shape[-1]
    if query.ndim > 2 and alike:
        heads, keys = query.shape[-3], key.shape[-3]
        alike = value.shape[-3] == keys and (heads == keys or (bool(options.get("enable_gqa")) and heads % keys == 0))
    return alike and not (mask is not None and mask.requires_grad) and set(options) <= {"scale", "enable_gqa"}


def attend(axis: SequenceAxis, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    """Return the attention of this rank's queries to the keys and values of all ranks.

    As ``scaled_dot_product_attention`` does, with sums in float32 at least. Every rank must call it.

    Args:
        query: of shape (…, H, S/n, D).
        key: of shape (…, Hk, S/n, D), where Hk divides H.
        value: of shape (…, Hk, S/n, Dv).
    """
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    seed = int(torch.empty((), dtype=torch.int64).random_().item()) if terms.dropout else 0
    found: Tensor = _Ring.apply(query, key, value, axis, terms, seed)  # type: ignore[no-untyped-call]
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, axis: SequenceAxis, terms: Terms, seed: int
    ) -> Tensor:
        blocks = _Blocks(axis, query, terms, seed)
        with torch.autocast(query.device.type, enabled=False):
            out, largest, total = blocks.zeros(value.shape[-1]), blocks.full(-math.inf), blocks.full(0.0)
            pair = torch.cat([key, value], -1)
            for step in range(axis.size):
                if step:
                    pair = _rotate(axis, pair)
                source = (axis.index - step) % axis.size
                if blocks.empty(source):
                    continue
                keys, values = blocks.wide(pair[..., : key.shape[-1]]), blocks.wide(pair[..., key.shape[-1] :])
                scores = blocks.scores(keys, source)
                now = torch.maximum(largest, scores.amax(-1, keepdim=True))
                shift = now.masked_fill(now == -math.inf, 0.0)  # rows without a key so far
                weights = (scores - shift).exp()
                before = (largest - shift).exp()
                total = total * before + weights.sum(-1, keepdim=True)
                out = out * before + (weights * blocks.kept(weights, source)) @ values
                largest = now
            # A row without any key is 0, as torch has it.
            norm = total.masked_fill(total == 0, 1.0)
            out = out / norm
            log_sum = norm.log() + largest.masked_fill(largest == -math.inf, 0.0)
        found = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.rest = axis, terms, seed
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, log_sum = ctx.saved_tensors
        axis, terms, seed = ctx.rest
        blocks = _Blocks(axis, query, terms, seed)
        with torch.autocast(query.device.type, enabled=False):
            gradient = gradients[0].to(out.dtype)
            delta = (gradient * out).sum(-1, keepdim=True)
            of_query = torch.zeros_like(blocks.query)
            pair = torch.cat([key, value], -1)
            of_pair = torch.zeros(pair.shape, dtype=out.dtype, device=pair.device)
            for step in range(axis.size):
                if step:
                    pair, of_pair = _rotate(axis, pair), _rotate(axis, of_pair)
                source = (axis.index - step) % axis.size
                if blocks.empty(source):
                    continue
                keys, values = blocks.wide(pair[..., : key.shape[-1]]), blocks.wide(pair[..., key.shape[-1] :])
                weights = (blocks.scores(keys, source) - log_sum).exp()
                kept = blocks.kept(weights, source)
                of_scores = weights * ((gradient @ values.mT) * kept - delta)
                of_query += of_scores @ keys * terms.scale
                of_keys = of_scores.mT @ blocks.query * terms.scale
                of_values = (weights * kept).mT @ gradient
                of_pair += torch.cat([blocks.narrow(of_keys, key), blocks.narrow(of_values, value)], -1)
            of_pair = _rotate(axis, of_pair)  # back to the rank that has them
        parts = of_pair[..., : key.shape[-1]], of_pair[..., key.shape[-1] :]
        return of_query.to(query.dtype), parts[0].to(key.dtype), parts[1].to(value.dtype), None, None, None


class _Blocks:
    """The scores of this rank's queries with one chunk of keys at a time."""

    def __init__(self, axis: SequenceAxis, query: Tensor, terms: Terms, seed: int) -> None:
        self._axis, self._terms, self._seed = axis, terms, seed
        self.query = query.to(torch.promote_types(query.dtype, torch.float32))

    def empty(self, source: int) -> bool:
        """Return whether this rank's queries attend to none of a rank's keys."""
        return self._terms.causal and source > self._axis.index

    def zeros(self, width: int) -> Tensor:
        return self.query.new_zeros(*self.query.shape[:-1], width)

    def full(self, value: float) -> Tensor:
        return self.query.new_full((*self.query.shape[:-1], 1), value)

    def wide(self, tensor: Tensor) -> Tensor:
        """Return keys or values of each head of the queries."""
        tensor = tensor.to(self.query.dtype)
        heads = self.query.shape[-3] if tensor.ndim > 2 else 0
        if not heads or heads == tensor.shape[-3]:
            return tensor
        return tensor.repeat_interleave(heads // tensor.shape[-3], -3)

    def narrow(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Return the transpose of `wide`."""
        if gradient.shape == like.shape:
            return gradient
        shape = gradient.shape
        return gradient.view(*shape[:-3], like.shape[-3], -1, *shape[-2:]).sum(-3)

    def scores(self, keys: Tensor, source: int) -> Tensor:
        """Return the scores, with minus infinity where a query does not attend to a key."""
        scores = self.query @ keys.mT * self._terms.scale
        mask = self._mask(source, scores)
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)

    def _mask(self, source: int, scores: Tensor) -> Tensor | None:
        mask, axis = self._terms.mask, self._axis
        if self._terms.causal and source == axis.index:
            return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is None or self._terms.causal:
            return None
        rows = mask.chunk(axis.size, -2)[axis.index] if mask.shape[-2] > 1 else mask
        return rows.chunk(axis.size, -1)[source] if rows.shape[-1] > 1 else rows

    def kept(self, weights: Tensor, source: int) -> Tensor | float:
        """Return the factors of dropout, the same ones in forward and backward."""
        dropout = self._terms.dropout
        if not dropout:
            return 1.0
        generator = torch.Generator(weights.device).manual_seed((self._seed + source) % 2**63)
        drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
        return (drawn >= dropout).to(weights.dtype) / max(1 - dropout, 1e-12)


def _rotate(axis: SequenceAxis, tensor: Tensor) -> Tensor:
    """Send a tensor to the next rank of the axis, and return that of the one before."""
    to = [int(rank == (axis.index + 1) % axis.size) for rank in range(axis.size)]
    source = [int(rank == (axis.index - 1) % axis.size) for rank in range(axis.size)]
    found: Tensor = axis.hooks.collective_all_to_all(
        tensor=tensor.contiguous()[None],
        output_sizes=source,
        input_sizes=to,
        group=axis.group,
        sync_grads=False,
    )
    return found[0]
