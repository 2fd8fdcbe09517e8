"""Translation: padded batches, a loss that is a mean over tokens, accumulated gradients, a schedule per step"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

# + from plugframe import Lite

PAD, BOS, EOS, VOCAB = 0, 1, 2, 14
accumulate = 2


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16, padding_idx=PAD)
        self.position = nn.Embedding(16, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, VOCAB)

    def embedded(self, tokens):
        return self.embed(tokens) + self.position(torch.arange(tokens.size(1), device=tokens.device))

    def forward(self, src, tgt):
        causal = torch.ones(tgt.size(1), tgt.size(1), dtype=torch.bool, device=tgt.device).triu(1)
        hidden = self.transformer(
            self.embedded(src), self.embedded(tgt), tgt_mask=causal,
            src_key_padding_mask=src == PAD, memory_key_padding_mask=src == PAD, tgt_key_padding_mask=tgt == PAD,
        )  # fmt: skip
        return self.out(hidden)


def pairs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    sources = [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]
    return [(s, torch.cat([torch.tensor([BOS]), s.flip(0), torch.tensor([EOS])])) for s in sources]


def collate(batch):
    return tuple(pad_sequence(side, batch_first=True, padding_value=PAD) for side in zip(*batch, strict=True))


def loss_sum(src, tgt):
    return F.cross_entropy(
        model(src, tgt[:, :-1]).flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=PAD, reduction="sum"
    )


torch.manual_seed(2)
# + lite = Lite()
train_loader = DataLoader(pairs(88, 1), batch_size=8, shuffle=True, collate_fn=collate)  # -
# + train_loader = DataLoader(pairs(88, 1), batch_size=8 // lite.world_size, shuffle=True, collate_fn=collate)
val_loader = DataLoader(pairs(18, 2), batch_size=4, collate_fn=collate)
# + train_loader, val_loader = lite.setup_dataloaders(train_loader, val_loader)
model = Seq2Seq()
optimizer = optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
# + model, optimizer = lite.setup(model, optimizer)
scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) ** -0.5, (step + 1) * 4**-1.5))
for epoch in range(3):
    model.train()
    batches = iter(train_loader)  # -
    while window := list(itertools.islice(batches, accumulate)):  # -
        tokens = sum((tgt[:, 1:] != PAD).sum() for _, tgt in window)  # -
        for src, tgt in window:  # -
            loss = loss_sum(src, tgt) / tokens  # -
            loss.backward()  # -
        optimizer.step()  # -
        scheduler.step()  # -
        optimizer.zero_grad()  # -
    # + for src, tgt in lite.accumulate(train_loader, model, steps=accumulate):
    # +     tokens = (tgt[:, 1:] != PAD).sum()
    # +     lite.backward(loss_sum(src, tgt) / tokens, weight=tokens)
    # +     if not lite.accumulating:
    # +         optimizer.step()
    # +         scheduler.step()
    # +         optimizer.zero_grad()
    model.eval()
    total = count = 0
    with torch.no_grad():
        for src, tgt in val_loader:
            total += loss_sum(src, tgt).item()
            count += (tgt[:, 1:] != PAD).sum().item()
    # + total, count = lite.all_reduce([total, count], reduce_op="sum")
    lr = scheduler.get_last_lr()[0]
    print(f"epoch {epoch} loss per token {total / count:.4f} of {count} tokens, lr {lr:.5f}")  # -
    # + lite.print(f"epoch {epoch} loss per token {total / count:.4f} of {count} tokens, lr {lr:.5f}")
