"""Transformers whose blocks attend in different ways, and data for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, LENGTH, WORDS = 16, 8, 11


class Block(nn.Module):
    """Causal attention with fewer heads of keys than of queries, and a feed-forward layer."""

    def __init__(self, heads: int = 4, key_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.key_heads, self.dropout = heads, key_heads, dropout
        size = WIDTH // heads
        self.norm, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * key_heads * size)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(x)
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = (
            each.unflatten(-1, (heads, -1)).transpose(1, 2)
            for each, heads in ((self.q(x), self.heads), (k, self.key_heads), (v, self.key_heads))
        )
        return q, k, v

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        out: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x)
        causal, grouped = mask is None, self.heads != self.key_heads
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )
        return self.rest(x, y)


class RotaryBlock(Block):
    """Attention with rotary positions that are given as tensors."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, shift: Any = None) -> Any:  # type: ignore[override]
        q, k, v = self.qkv(hidden_states + shift)
        q, k = (turned(each, *position_embeddings) for each in (q, k))
        grouped = self.heads != self.key_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.rest(hidden_states, y), None


def angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    table = torch.outer(torch.arange(length), 0.5 ** torch.arange(size // 2)).repeat(1, 2)
    return table.cos(), table.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


class Model(nn.Module):
    """Embeddings with learned positions, blocks, and a head on all tokens."""

    def __init__(self, number: int = 3, block: type[nn.Module] = Block, **options: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList([block(**options) for _ in range(number)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places
        for block in self.blocks:
            x = self.apply_block(block, x, tokens)
        out: Tensor = self.head(self.norm(x))
        return out

    def apply_block(self, block: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
        out: Tensor = block(x)
        return out


class Masked(Model):
    """Causal attention that ignores some keys, by a mask made outside of the blocks."""

    def apply_block(self, block: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
        kept = (tokens != 0) | (torch.arange(LENGTH) == 0)
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        out: Tensor = block(x, mask=causal & kept[:, None, None, :])
        return out


class Rotary(Model):
    """Rotary positions, grouped keys, and a conditioning that all tokens share."""

    def __init__(self, key_heads: int = 2) -> None:
        super().__init__(block=RotaryBlock, key_heads=key_heads)
        self.shift = nn.Linear(WIDTH, WIDTH)

    def apply_block(self, block: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
        shift = self.shift(self.words(tokens).mean(1, keepdim=True))
        out: Tensor = block(x, position_embeddings=angles(LENGTH, WIDTH // 4), shift=shift)[0]
        return out


class Encoder(Model):
    """torch's own encoder, with a mask of keys, and of pairs if `causal`."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__(number=0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        pairs = nn.Transformer.generate_square_subsequent_mask(LENGTH) if self.causal else None
        padding = None if self.causal else (tokens == 0) & (torch.arange(LENGTH) > 0)
        x = self.encoder(
            self.words(tokens) + self.places, mask=pairs, src_key_padding_mask=padding, is_causal=self.causal
        )
        out: Tensor = self.head(self.norm(x))
        return out


def data(number: int = 8) -> Tensor:
    return torch.randint(0, WORDS, (number, LENGTH), generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.roll(-1, 1).flatten())
