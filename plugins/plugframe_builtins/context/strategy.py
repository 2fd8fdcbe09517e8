"""Sequence parallelism beside a strategy that divides the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from plugframe.base import Strategy, tell
from plugframe.hooks import hookimpl
from plugframe_builtins.context import plugin
from plugframe_builtins.context.axis import SequenceAxis
from plugframe_builtins.context.blocks import find_blocks, refuse_batch_norms, refuse_compiled
from plugframe_builtins.context.region import Region


class ContextParallel(Strategy):
    """Divide the tokens of a sequence over the axis ``context`` while the blocks of a model run.

    Before the first block each rank keeps a chunk of the hidden states, and after the last one the chunks are gathered:
    what is outside of the blocks (embeddings, head, loss) is computed on the complete sequence on every rank. Calls of
    ``torch.nn.functional.scaled_dot_product_attention`` within the blocks attend to the complete sequence.

    Args:
        dim: the sequence dimension of the hidden states.
        blocks: paths of the consecutive blocks, with ``*`` for one component: ``["blocks.*"]``. By default the model's
            own attribute ``context_parallel_blocks``, or its only list of repeated blocks.
        attention: ``"all_to_all"`` exchanges tokens for heads, and gathers keys and values where the number of heads
            is no multiple of the axis; ``"gather"`` always does that; with ``"ring"`` they go round the ranks.
        arguments: whether a block's argument, by name, is ``"split"`` along the sequence or left ``"whole"``, where
            its name and shape do not tell.
        check: compare the first forwards of each block with the undivided ones, and raise if they differ.
    """

    def __init__(
        self,
        *,
        dim: int = 1,
        blocks: Sequence[str] | None = None,
        attention: str = "all_to_all",
        arguments: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> None:
        given = {
            "blocks": None if blocks is None else list(blocks),
            "arguments": dict(arguments) if arguments else None,
        }
        plugin.validate(self, dim=dim, attention=attention, check=check, **given)
        self.dim = dim
        self.blocks = blocks
        self.attention = attention
        self.arguments = dict(arguments or {})
        self.check = check
        self._regions: list[Region] = []

    @hookimpl
    def strategy_parallelize(self, module: nn.Module) -> None:
        assert self.context.mesh is not None
        mesh = self.context.mesh["context"]
        if mesh.size() == 1:
            return
        blocks = find_blocks(module, self.blocks)
        refuse_batch_norms(blocks)
        refuse_compiled(module, blocks)
        group = mesh.get_group()
        axis = SequenceAxis(self.context.hooks, group, mesh.get_local_rank(), mesh.size(), self.context.device)
        region = Region(
            blocks,
            axis,
            dim=self.dim,
            attention=self.attention,
            arguments=self.arguments,
            check=self.check,
            say=self._say,
        )
        self._regions.append(region)

    def _say(self, text: str) -> None:
        if self.context.world.global_rank == 0:
            tell(text)

    @hookimpl
    def strategy_teardown(self) -> None:
        for region in self._regions:
            region.close()
        self._regions.clear()
