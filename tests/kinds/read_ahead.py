"""The weight of an uneven batch follows the batch, whenever it was read."""

# variants: plain prefetch list chunks added
# strategies: single ddp fsdp
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from plugframe import Lite

variant = sys.argv[1]
rows = torch.randn(13, 3, generator=torch.Generator().manual_seed(4))


def prefetch(loader: Any) -> Iterator[Any]:
    iterator = iter(loader)
    held = list(itertools.islice(iterator, 2))
    for batch in iterator:
        held.append(batch)
        yield held.pop(0)
    yield from held


def groups(loader: Any) -> Iterator[list[Any]]:
    """What one optimizer step is computed from."""
    if variant in ("chunks", "added"):
        iterator = iter(loader)
        while chunk := list(itertools.islice(iterator, 2)):
            yield chunk
    else:
        source = {"plain": iter, "prefetch": prefetch, "list": list}[variant]
        yield from ([batch] for batch in source(loader))


def train(model: Any, optimizer: Any, loader: Any, backward: Any) -> None:
    for chunk in groups(loader):
        optimizer.zero_grad()
        losses = [model(x).square().mean() / len(chunk) for x in chunk]
        for loss in [sum(losses)] if variant == "added" else losses:
            backward(loss)
        optimizer.step()


def make() -> tuple[Any, Any]:
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.2)


lite = Lite()
model, optimizer = lite.setup(*make())
size = 4 // lite.world_size
train(model, optimizer, lite.setup_dataloaders(DataLoader(rows, batch_size=size)), lite.backward)
other, other_optimizer = make()
train(other, other_optimizer, DataLoader(rows, batch_size=4), torch.Tensor.backward)
with torch.no_grad():
    off = float((model(rows) - other.to(lite.device)(rows.to(lite.device))).abs().max())
print(f"right {variant}" if off < 1e-4 else f"WRONG {variant}: outputs are off by {off}")
sys.exit(off >= 1e-4)
