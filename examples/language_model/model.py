"""A small GPT, shared by train_torch.py and train_lite.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    """A transformer block: causal self-attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (batch, time, width) to hidden states of the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, time, head width) each
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, time, width))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    """A character-level language model."""

    def __init__(self, *, alphabet: int, block: int, width: int = 96, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.block = block
        self.embed = nn.Embedding(alphabet, width)
        self.embed_position = nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=False)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits (batch, time, alphabet) of the character after each one of `text` (batch, time)."""
        time = torch.arange(text.shape[1], device=text.device)
        state = self.blocks(self.embed(text) + self.embed_position(time))
        logits: Tensor = self.head(self.norm(state))
        return logits

    @torch.no_grad()
    def generate(self, text: Tensor, *, length: int, temperature: float = 0.8) -> Tensor:
        """Append `length` sampled characters to `text` (batch, time); return (batch, time + length)."""
        for _ in range(length):
            logits = self(text[:, -self.block :])[:, -1]
            next_character = torch.multinomial((logits / temperature).softmax(dim=-1), num_samples=1)
            text = torch.cat([text, next_character], dim=1)
        return text
