"""Token classification with padding: a mean over the tokens of a batch."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader


def collate(batch):
    return pad_sequence(batch, batch_first=True, padding_value=0)


torch.manual_seed(0)
sentences = [torch.randint(1, 8, (3 + i % 4,)) for i in range(16)]
train_dl = DataLoader(sentences, batch_size=8, collate_fn=collate)
layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.Embedding(8, 8, padding_idx=0), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 8))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for epoch in range(2):
    for tokens in train_dl:
        mask = (tokens != 0).float()
        per_token = nn.functional.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none")
        loss = (per_token * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
    print(f"{epoch} | {loss.item():.5f}")
