"""Data parallelism: replicated models, averaged gradients."""

from plugframe import Axis, Plugin
from plugframe_builtins.ddp.options import OPTIONS

_SHARDED = "torch has retired it; use strategy='fsdp', or 'ddp' where the model fits."

plugin = Plugin(
    factory="plugframe_builtins.ddp.strategy:DDP",
    summary="The complete model on every rank, gradients averaged in backward.",
    priority=10,
    provides=("local-backward", "averages-axes"),
    needs={"collective": ("process-group",)},
    # The second is for `fully_shard`, which averages for it beside other strategies.
    axes=(Axis("data", samples=True), Axis("shard", size=1)),
    options=OPTIONS,
    retired={
        "dp": "its ranks were threads of one process; use strategy='ddp'.",
        "ddp2": "use strategy='ddp'.",
        "ddp_find_unused_parameters_true": "use strategy='ddp' with --strategy.find-unused-parameters, or "
        "strategy=DDP(find_unused_parameters=True), from plugframe_builtins.ddp.strategy.",
        **dict.fromkeys(("ddp_sharded", "ddp_sharded_spawn", "ddp_fully_sharded"), _SHARDED),
    },
)
spawn = Plugin(alias_of="ddp", implies={"launcher": "spawn"}, summary="ddp, ranks started by spawn.")
fork = Plugin(alias_of="ddp", implies={"launcher": "fork"}, summary="ddp, ranks forked.")
notebook = Plugin(alias_of="ddp", implies={"launcher": "fork"}, summary="ddp, ranks forked from a notebook.")
