"""Data parallelism: every rank holds the whole model, gradients are averaged."""

from plugframe import Plugin

_FSDP = "use strategy='fsdp', which shards parameters, gradients and optimizer states."

plugin = Plugin(
    factory="plugframe_builtins.ddp.strategy:DDP",
    summary="The whole model on every rank, gradients averaged (DistributedDataParallel).",
    priority=10,
    needs={"collective": ("process-group",)},
    retired={
        "dp": "its ranks were threads of one process; use strategy='ddp'.",
        "ddp2": "use strategy='ddp'.",
        "ddp_find_unused_parameters_true": "it is an option; use strategy=DDP(find_unused_parameters=True).",
        **dict.fromkeys(("ddp_sharded", "ddp_sharded_spawn", "ddp_fully_sharded"), _FSDP),
    },
)
spawn = Plugin(alias_of="ddp", implies={"launcher": "spawn"}, summary="ddp, ranks started by spawn.")
fork = Plugin(alias_of="ddp", implies={"launcher": "fork"}, summary="ddp, ranks forked.")
notebook = Plugin(alias_of="ddp", implies={"launcher": "fork"}, summary="ddp, ranks forked from a notebook.")
