"""Share the seed of rank 0 with ranks that drew theirs from the operating system."""

from __future__ import annotations

from plugframe.data.seed import PROCESS, seed_generators
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class SharedSeed:
    """Seed every rank with the seed of rank 0, where its own was drawn and differs."""

    @hookimpl
    def on_connect(self, context: Context) -> None:
        if context.world.world_size == 1:
            return
        import torch

        # Two halves of at most 31 bits each, which every backend can send.
        seed = PROCESS.seed
        words = [0, 0, 0] if seed is None else [1, seed >> 16, seed & 0xFFFF]
        sent = torch.tensor(words, dtype=torch.int32).to(context.device)
        gathered = context.hooks.collective_all_gather(tensor=sent, group=None, sync_grads=False)
        has_seed, high, low = gathered[0].tolist()
        first = (high << 16) | low
        if PROCESS.drawn and has_seed and first != seed:
            PROCESS.seed = first
            seed_generators(first)
            context.hooks.accelerator_seed(seed=first)
