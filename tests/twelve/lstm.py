"""A word language model: the hidden state is carried over slices of the text, and weights are updated by hand"""

import math

import torch
from torch import nn

# + from plugframe import Lite

ntokens, bptt, clip = 15, 6, 0.25


class RNNModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(ntokens, 12)
        self.rnn = nn.LSTM(12, 16, 2)
        self.decoder = nn.Linear(16, ntokens)

    def forward(self, tokens, hidden):
        output, hidden = self.rnn(self.encoder(tokens), hidden)
        return torch.log_softmax(self.decoder(output).view(-1, ntokens), dim=1), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return weight.new_zeros(2, bsz, 16), weight.new_zeros(2, bsz, 16)


def batchify(data, bsz):
    nbatch = data.size(0) // bsz
    return data.narrow(0, 0, nbatch * bsz).view(bsz, -1).t().contiguous()


def get_batch(source, i):
    seq_len = min(bptt, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].reshape(-1)


def repackage_hidden(h):
    return h.detach() if isinstance(h, torch.Tensor) else tuple(map(repackage_hidden, h))


def evaluate(source):
    model.eval()
    total_loss = 0.0
    hidden = model.init_hidden(source.size(1))
    with torch.no_grad():
        for i in range(0, source.size(0) - 1, bptt):
            data, targets = get_batch(source, i)
            output, hidden = model(data, hidden)
            total_loss += len(data) * criterion(output, targets).item()
    return total_loss / (len(source) - 1)  # -
    # + return lite.reduce_mean(total_loss / (len(source) - 1), weight=1).item()


def train(lr):
    model.train()
    hidden = model.init_hidden(train_data.size(1))
    for i in range(0, train_data.size(0) - 1, bptt):
        data, targets = get_batch(train_data, i)
        model.zero_grad()
        hidden = repackage_hidden(hidden)
        output, hidden = model(data, hidden)
        loss = criterion(output, targets)
        loss.backward()  # -
        # + lite.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)


torch.manual_seed(1111)
# + lite = Lite()
corpus = (torch.arange(700) * torch.arange(700) // 11) % ntokens
train_data, val_data = batchify(corpus[:500], 8), batchify(corpus[500:], 4)
# + mine = slice(lite.global_rank, None, lite.world_size)
# + train_data, val_data = lite.to_device((train_data[:, mine], val_data[:, mine]))
model = RNNModel()
# + model = lite.setup(model)
criterion = nn.NLLLoss()
lr, best_val_loss = 20.0, None
for epoch in range(1, 4):
    train(lr)
    val_loss = evaluate(val_data)
    print(f"epoch {epoch} valid loss {val_loss:.3f} ppl {math.exp(val_loss):.2f} lr {lr}")  # -
    # + lite.print(f"epoch {epoch} valid loss {val_loss:.3f} ppl {math.exp(val_loss):.2f} lr {lr}")
    if not best_val_loss or val_loss < best_val_loss:
        best_val_loss = val_loss
    else:
        lr /= 4.0
