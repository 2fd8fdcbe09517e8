"""Models that strategy context cannot divide, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from context_models import WIDTH, Block, Model, angles, turned


class LocalPositions(Block):
    """Makes its positions from the number of tokens it gets."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = (turned(each, *angles(x.shape[1], 4)) for each in (q, k))
        return self.rest(x, F.scaled_dot_product_attention(q, k, v))


class LocalMask(Block):
    """Makes its mask from the number of tokens it gets."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.rest(x, F.scaled_dot_product_attention(*self.qkv(x), attn_mask=mask))


class ByHand(Block):
    """Attends with a softmax of its own."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x)
        return self.rest(x, (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v)


class Silent(LocalPositions):
    """Hides its attention at first: the output projection begins with zeros."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.out.weight)


class Pooling(Block):
    """Adds the mean of the tokens it gets."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


class NoAttention(Block):
    """Treats each token by itself."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.down(self.up(x))


class Norming(Block):
    """Has statistics over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)


class Weights(nn.Module):
    """Asks for the weights of attention, as ``nn.MultiheadAttention`` gives them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(x, x, x)[0]
        return out


class Early(Model):
    """Leaves after the second block."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places
        for block in self.blocks[:2]:
            x = block(x)
        out: Tensor = self.head(x.mean(1, keepdim=True).expand(-1, 8, -1))
        return out


class Deep(Model):
    """Predicts from the hidden states between blocks too."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, logits = self.words(tokens) + self.places, 0
        for block in self.blocks:
            x = block(x)
            logits = logits + self.head(x)
        out: Tensor = torch.as_tensor(logits)
        return out


class Skipping(Model):
    """Leaves the first block out."""

    def apply_block(self, block: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
        return x if block is self.blocks[0] else super().apply_block(block, x, tokens)


class Odd(Model):
    """A sequence that two ranks cannot share."""

    def apply_block(self, block: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
        return super().apply_block(block, x[:, :7], tokens)


#: What would be wrong: model, and the message.
WRONG: tuple[tuple[Callable[[], nn.Module], str], ...] = (
    (
        lambda: Model(block=LocalPositions),
        "'blocks.0' .LocalPositions. is not the same .*queries of its attention",
    ),
    (lambda: Model(block=Silent), "'blocks.0' .Silent. is not the same .*queries of its attention"),
    (lambda: Model(block=LocalMask), r"'blocks.0' got a mask of shape .4, 4., for 8 queries"),
    (lambda: Model(block=ByHand), "'blocks.0' .ByHand. is not the same on a part .*its output 0 is"),
    (lambda: Model(block=Pooling), "'blocks.0' .Pooling. is not the same on a part .*its output 0 is"),
    (lambda: Model(block=NoAttention), "No block called torch.nn.functional.scaled_dot_product_attention"),
    (lambda: Model(block=Norming), "BatchNorm1d 'blocks.0.statistics' computes statistics"),
    (lambda: Model(block=Weights), "'blocks.0' is called with need_weights=True"),
    (Early, r"mean.. of the hidden states after block 'blocks.1'"),
    (Deep, r"add.. of the hidden states after block 'blocks.1'"),
    (Skipping, "'blocks.1' got hidden states of all tokens, .* needs the blocks from 'blocks.0' to 'blocks.2'"),
    (Odd, "'blocks.0' got 7 tokens along dim=1, .* pad the sequences to a multiple of 2"),
    (lambda: nn.Linear(3, 3), "cannot tell which blocks of this Linear .*it has no list of repeated blocks"),
)
