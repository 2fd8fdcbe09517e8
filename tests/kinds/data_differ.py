"""Ranks that hold different data, or data that are divided already, are refused."""

# variants: split lengths files stream
# strategies: single ddp fsdp
import os
import sys
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from plugframe import Lite

variant = sys.argv[1]
rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Files(Dataset[str]):
    """Files in an order of this node's own."""

    def __init__(self) -> None:
        self.files = [f"/data/{(at + rank) % 12}.txt" for at in range(12)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return self.files[index]


class Stream(IterableDataset[int]):
    """A stream that reads its rank's share."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(rank, 12, ranks))


lite = Lite()
torch.manual_seed(rank)
everything = TensorDataset(torch.arange(12))
data: Dataset[object] = {
    "split": lambda: random_split(everything, [8, 4])[0],
    "lengths": lambda: list(range(12 - rank)),
    "files": Files,
    "stream": Stream,
}[variant]()
for _ in lite.setup_dataloaders(DataLoader(data, batch_size=2)):
    pass
lite.barrier()
print(f"right {variant}" if ranks == 1 else f"WRONG {variant}: nothing was said")
sys.exit(ranks > 1)
