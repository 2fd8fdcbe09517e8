"""A small language model on batches drawn by hand, with two parameter groups and clipping."""

# ranks: 2
import torch
import torch.nn as nn
from torch.nn import functional as F

batch_size, block_size = 4, 6
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(1337)
data = torch.randint(0, 9, (200,))


def get_batch():
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in ix])
    y = torch.stack([data[i + 1 : i + block_size + 1] for i in ix])
    x, y = x.to(device), y.to(device)
    return x, y


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 9, bias=False)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.norm(self.wte(idx)))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1)) if targets is not None else None
        return logits, loss

    def configure_optimizers(self, weight_decay, learning_rate):
        decay = [p for p in self.parameters() if p.dim() >= 2]
        nodecay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": nodecay, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate)

    @torch.no_grad()
    def generate(self, idx, count):
        for _ in range(count):
            logits, _ = self(idx)
            idx = torch.cat((idx, logits[:, -1:].argmax(-1)), dim=1)
        return idx


model = GPT()
model.to(device)
optimizer = model.configure_optimizers(0.1, 0.05)
for step in range(5):
    X, Y = get_batch()
    logits, loss = model(X, Y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"step {step}: loss {loss.item():.5f}")
print(model.generate(torch.zeros((1, 1), dtype=torch.long, device=device), 4).tolist())
