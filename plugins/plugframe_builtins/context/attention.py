"""Attention of a block whose tokens are divided: each call attends to the complete sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from plugframe.errors import UnsupportedError
from plugframe_builtins.context import ring
from plugframe_builtins.context.axis import SequenceAxis
from plugframe_builtins.context.multi_head import MultiHead


@dataclass
class Call:
    """What one call of attention used: queries, keys and values, of the heads and tokens of this rank, and the mask.

    Attributes:
        heads: whether they are of this rank's heads.
        chunks: whether keys and values are of this rank's tokens.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None
    causal: bool
    heads: bool = False
    chunks: bool = False


@dataclass
class Run:
    """One run of a block.

    Attributes:
        local: number of this rank's tokens.
        divided: whether the block runs on them; else on all tokens, for comparison.
        compared: whether calls are recorded, without dropout.
    """

    local: int
    divided: bool
    compared: bool
    calls: list[Call] = field(default_factory=list)
    count: int = 0


class Attention:
    """Catch ``scaled_dot_product_attention`` while a block runs.

    Args:
        axis: over which the sequence is divided.
        way: ``"all_to_all"`` exchanges tokens for heads, where their number allows it; ``"gather"``, or ``"ring"``.
        say: tells the user something once.
    """

    def __init__(self, axis: SequenceAxis, way: str, *, say: Callable[[str], None]) -> None:
        self.axis = axis
        self.way = way
        self._say: Callable[[str], None] | None = say
        self._run: Run | None = None
        self._block = ""
        self._within = False
        self._original: Any = None
        self._multi_head: MultiHead | None = None

    @contextmanager
    def catching(self, run: Run, block: str) -> Iterator[None]:
        """Catch calls of attention, also of functions that torch calls by itself, and of names imported before."""
        before = self._run, self._block, self._original
        self._run, self._block, self._original = run, block, _plain(F.scaled_dot_product_attention)
        held = F.scaled_dot_product_attention

        def caught(*args: Any, **kwargs: Any) -> Tensor:
            return self.call(*args, **kwargs)

        caught.original = self._original  # type: ignore[attr-defined]
        F.scaled_dot_product_attention = caught
        try:
            with _Mode(self):
                yield
        finally:
            F.scaled_dot_product_attention = held
            self._run, self._block, self._original = before

    def catches(self, func: Any) -> bool:
        """Return whether a function of torch is attention that is not handled already."""
        return func is self._original and not self._within

    def multi_head(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run ``F.multi_head_attention_forward``, which checks its masks against this rank's tokens."""
        assert self._run is not None
        if not self._run.divided:
            return func(*args, **kwargs)
        self._multi_head = MultiHead(func, args, kwargs, self._block)
        try:
            return self._multi_head.run()
        finally:
            self._multi_head = None

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Attend as the caught call does, to the complete sequence."""
        run = self._run
        assert run is not None
        if self._within:
            return self._original(query, key, value, attn_mask, dropout_p, is_causal, **options)  # type: ignore[no-any-return]
        if self._multi_head is not None:
            attn_mask, is_causal = self._multi_head.mask(query)
        run.count += 1
        self._within = True
        try:
            rest = (0.0 if run.compared else dropout_p, options)
            if not run.divided:
                if run.compared:
                    run.calls.append(Call((query, key, value), attn_mask, is_causal))
                return self._attend(query, key, value, attn_mask, is_causal, *rest)
            self._check(query, key, attn_mask)
            return self._divided(query, key, value, attn_mask, is_causal, *rest)
        finally:
            self._within = False

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float, options: Any
    ) -> Tensor:
        return self._original(query, key, value, mask, dropout, causal, **options)  # type: ignore[no-any-return]

    def _divided(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float, options: Any
    ) -> Tensor:
        assert self._run is not None
        own = key.shape[-2] == self._run.local  # else all ranks have the keys of another sequence
        heads = own and self._by_heads((query, key, value))
        whole = mask, causal
        if own and self._in_ring(query, key, value, mask, options):
            if self._run.compared:
                self._run.calls.append(Call((query, key, value), *whole, chunks=True))
            scale = options.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return ring.attend(self.axis, query, key, value, ring.Terms(mask, causal, dropout, scale))
        if heads:
            mask = self._of_heads(mask, query.shape[-3])
            query, key, value = self.axis.to_heads((query, key, value))
        else:
            mask, causal = self._of_tokens(mask, causal, query, own)
            key, value = (self.axis.gather(each, each.ndim - 2) if own else each for each in (key, value))
        if self._run.compared:
            self._run.calls.append(Call((query, key, value), *whole, heads=heads))
        found = self._attend(query, key, value, mask, causal, dropout, options)
        return self.axis.to_tokens(found) if heads else found

    def _by_heads(self, tensors: tuple[Tensor, ...]) -> bool:
        if self.way != "all_to_all" or any(each.ndim < 3 for each in tensors):
            return False
        heads = [each.shape[-3] for each in tensors]
        if all(number % self.axis.size == 0 for number in heads):
            return True
        if self._say is not None:
            self._say(
                f"strategy 'context' gathers keys and values: {heads[0]} heads with {heads[1]} of keys are no multiple "
                f"of the {self.axis.size} ranks of its axis, so that tokens cannot be exchanged for heads."
            )
            self._say = None
        return False

    def _in_ring(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any) -> bool:
        if self.way != "ring" or ring.fits(query, key, value, mask, options):
            return self.way == "ring"
        if self._say is not None:
            self._say(
                f"strategy 'context' gathers keys and values in block {self._block!r}: a ring needs keys and values of "
                "the queries' shape, fewer heads only with enable_gqa, and a mask that does not train."
            )
            self._say = None
        return False

    def _of_heads(self, mask: Tensor | None, heads: int) -> Tensor | None:
        if mask is None or mask.ndim < 3 or mask.shape[-3] != heads:
            return mask
        return mask.chunk(self.axis.size, -3)[self.axis.index]

    def _of_tokens(self, mask: Tensor | None, causal: bool, query: Tensor, own: bool) -> tuple[Tensor | None, bool]:
        """Return the rows of a mask for this rank's queries."""
        local, size, index = query.shape[-2], self.axis.size, self.axis.index
        if causal:
            if not own:
                raise self._wrong("is_causal=True with keys of another sequence")
            rows = torch.ones(local, local * size, dtype=torch.bool, device=query.device)
            return rows.tril(local * index), False
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.chunk(size, -2)[index]
        return mask, False

    def _check(self, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        assert self._run is not None
        local = self._run.local
        if isinstance(query, DTensor) or isinstance(key, DTensor):
            raise self._wrong("DTensor queries or keys (a tensor-parallel plan without local outputs)")
        if query.shape[-2] != local:
            raise self._wrong(f"{query.shape[-2]} queries, where this rank has {local} tokens")
        keys = local * self.axis.size if key.shape[-2] == local else key.shape[-2]
        full = local * self.axis.size
        if mask is not None and (mask.ndim < 2 or mask.shape[-2] not in (1, full) or mask.shape[-1] not in (1, keys)):
            raise self._wrong(f"a mask of shape {tuple(mask.shape)}, for {full} queries and {keys} keys")

    def _wrong(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"Attention of block {self._block!r} got {what}: strategy 'context' needs tokens of this rank in the order "
            "of the sequence, and masks of the complete one. Compute masks outside of the blocks."
        )


class _Mode(TorchFunctionMode):
    """Sees the functions of torch that a block calls, by whatever name."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._attention.catches(func):
            return self._attention.call(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention.multi_head(func, args, kwargs)
        return func(*args, **kwargs)


def _plain(function: Any) -> Any:
    """Return torch's own function, also where a region runs within another one."""
    return getattr(function, "original", function)
