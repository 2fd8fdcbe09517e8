"""Fully sharded data parallelism with ``torch.distributed.fsdp.fully_shard`` (FSDP2)."""

from __future__ import annotations

from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy


class FSDP(FullyShardedStrategy):
    """Shard every parameter, gradient and optimizer state over ranks, and gather a unit when it runs.

    Parameters and buffers are broadcast from rank 0 at set-up of a module, and buffers (running statistics) after each
    optimizer step. After set-up parameters are ``DTensor``, also after tear-down: save the model first. An optimizer
    made before set-up keeps its groups, settings and state.

    Args:
        units: blocks that are gathered and freed as one: ``"auto"`` (repeated blocks of lists, and any module of
            `unit_min_numel` elements), a set of classes or their names, or ``f(module) -> bool``. The rest of
            the model is a unit too.
        unit_min_numel: see `units`.
        reshard_after_forward: free a unit after its forward and gather it again for backward (True), keep it
            (False), or reshard to that many ranks; by default True for all but the outermost unit.
        mp_policy: dtypes to gather and to reduce in, a ``MixedPrecisionPolicy`` or a dict of its fields;
            overrides the precision.
        cpu_offload: keep parameters, gradients and optimizer state in CPU memory.
        mesh: ``{"replicate": 2, "shard": 4}`` shards within groups of 4 ranks and averages over 2 such groups;
            by default all ranks shard.
        activation_checkpointing: recompute activations of these blocks in backward: True for the units,
            or blocks selected as in `units`.
        prefetch: number of units to gather ahead; by default torch decides.
        compile: compile every unit separately: True, or arguments of ``torch.compile``.
    """

    name = "fsdp"
    axes = ("replicate", "shard")
