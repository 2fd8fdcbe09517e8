"""``nn.MultiheadAttention`` on a part of the tokens: its masks are those of the complete sequence."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plugframe.errors import UnsupportedError

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class MultiHead:
    """One call of ``F.multi_head_attention_forward``, run without its masks, which it compares with its own tokens.

    Args:
        func: the function.
        args: of the call.
        kwargs: of the call.
        block: path of the block, for messages.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, block: str) -> None:
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        self._func, self._given = func, dict(bound.arguments)
        self._mask: Tensor | None = self._given["attn_mask"]
        self._padding: Tensor | None = self._given["key_padding_mask"]
        # As in torch, which passes is_causal on only where no other mask is added.
        self._causal = bool(self._given["is_causal"]) and self._padding is None
        given = self._given
        for name, used in (
            ("need_weights=True", given["need_weights"]),
            ("add_bias_kv=True", given["bias_k"] is not None),
            ("add_zero_attn=True", given["add_zero_attn"]),
            ("static keys", given["static_k"] is not None or given["static_v"] is not None),
        ):
            if used:
                raise UnsupportedError(
                    f"nn.MultiheadAttention in block {block!r} is called with {name}, which strategy 'context' cannot "
                    "divide over tokens: call it with need_weights=False and without the others."
                )

    def run(self) -> Any:
        """Return the function's result for this rank's queries."""
        return self._func(**{**self._given, "attn_mask": None, "key_padding_mask": None, "is_causal": False})

    def mask(self, query: Tensor) -> tuple[Tensor | None, bool]:
        """Return the mask of all tokens, for `query` of shape (N, heads, tokens, D), and whether it is causal."""
        if self._causal:
            return None, True
        batch, heads = query.shape[0], query.shape[1]
        mask = None if self._mask is None else _additive(self._mask, query.dtype)
        if mask is not None and mask.ndim == 3:
            mask = mask.view(batch, heads, *mask.shape[-2:])
        if self._padding is None:
            return mask, False
        padding = _additive(self._padding, query.dtype).view(batch, 1, 1, -1)
        return padding if mask is None else mask + padding, False


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask whose True, or whose -inf, is ignored, as numbers that are added."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
