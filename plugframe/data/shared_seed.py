"""Give ranks whose seed was drawn from the operating system the seed of rank 0."""

from __future__ import annotations

from plugframe.data.seed import PROCESS, seed_generators
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class SharedSeed:
    """Seeds every rank with rank 0's seed, where its own was drawn and is another."""

    @hookimpl
    def on_connect(self, context: Context) -> None:
        if context.world.world_size == 1:
            return
        import torch

        # In two halves, which fit into 31 bits each: every backend can carry them.
        seed = PROCESS.seed
        words = [0, 0, 0] if seed is None else [1, seed >> 16, seed & 0xFFFF]
        sent = torch.tensor(words, dtype=torch.int32).to(context.device)
        everyone = context.hooks.collective_all_gather(tensor=sent, group=None, sync_grads=False)
        given, high, low = everyone[0].tolist()
        first = (high << 16) | low
        if PROCESS.drawn and given and first != seed:
            PROCESS.seed = first
            seed_generators(first)
            context.hooks.accelerator_seed(seed=first)
