"""Fully sharded data parallelism over ``torch.distributed.fsdp.fully_shard`` (FSDP2)."""

from __future__ import annotations

from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy


class FSDP(FullyShardedStrategy):
    """Keep a part of every parameter, gradient and optimizer state on each rank, and gather a unit when it runs.

    Parameters and buffers are rank 0's when a module is set up, and buffers (running statistics) again after each
    optimizer step. From set-up on parameters are ``DTensor``, also after tear-down: save the model first. An optimizer
    made before set-up keeps its groups, settings and state.

    Args:
        units: which blocks are gathered and freed as one: ``"auto"`` (repeated blocks of lists, and anything of
            `unit_min_numel` elements), a set of classes or their names, or ``f(module) -> bool``. The rest of
            the model is one more unit.
        unit_min_numel: see `units`.
        reshard_after_forward: free a unit after its forward and gather it again for backward (True), keep it
            (False), or reshard to that many ranks; by default True for all but the outermost unit.
        mp_policy: dtypes to gather and to reduce in, a ``MixedPrecisionPolicy`` or a dict of its fields, over
            what the precision says.
        cpu_offload: keep parameters, gradients and optimizer state in the host's memory.
        mesh: ``{"replicate": 2, "shard": 4}`` shards within groups of 4 ranks and averages over 2 such groups;
            by default all ranks shard.
        activation_checkpointing: compute activations of these blocks again in backward: True for the units,
            or what `units` takes.
        prefetch: how many units ahead are gathered; by default torch decides.
        compile: compile every unit by itself: True, or arguments of ``torch.compile``.
    """

    name = "fsdp"
    axes = ("replicate", "shard")
