"""An evaluation sees each sample once, however the script says that it evaluates."""

# variants: none one inference gradients outside
# strategies: single ddp fsdp
import sys
from contextlib import nullcontext

import torch
from torch.utils.data import DataLoader

from plugframe import Lite

variant = sys.argv[1]
lite = Lite()
first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
first, _ = lite.setup(first, torch.optim.SGD(first.parameters(), lr=0.1))
second, _ = lite.setup(second, torch.optim.SGD(second.parameters(), lr=0.1))
loader = lite.setup_dataloaders(DataLoader(torch.arange(9.0)[:, None], batch_size=2))
if variant in ("one", "gradients"):
    first.eval()
inside = {"inference": torch.inference_mode, "gradients": nullcontext, "outside": nullcontext}.get(
    variant, torch.no_grad
)
seen = 0
with torch.no_grad() if variant == "outside" else nullcontext():
    for x in loader:
        with inside():
            first(x)
        seen += len(x)
number = int(lite.all_reduce(seen, reduce_op="sum"))
print(f"right {variant}" if number == 9 else f"WRONG {variant}: {number} of 9 samples")
sys.exit(number != 9)
