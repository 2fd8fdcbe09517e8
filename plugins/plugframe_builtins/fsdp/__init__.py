"""Fully sharded data parallelism: sharded parameters, gradients and optimizer state."""

from plugframe import Axis, Option, Plugin
from plugframe_builtins._shared.sharding.options import OPTIONS

plugin = Plugin(
    factory="plugframe_builtins.fsdp.strategy:FSDP",
    summary="The model sharded over ranks, for models larger than a device (FSDP2).",
    provides=("sharded", "averages-axes"),
    axes=(Axis("replicate", samples=True, size=1), Axis("data", samples=True, aliases=("shard",))),
    options=(
        *OPTIONS,
        Option("mesh", dict[str, int], None, "Ranks of an axis: replicate=2,shard=4.", minimum=-1),
    ),
    needs={"collective": ("process-group",)},
    prefers={"checkpoint": ("sharded",)},
    conflicts={"precision": ("tensor-subclasses",)},
    retired=dict.fromkeys(
        ("fsdp_native", "fsdp2", "fsdp_cpu_offload"), "use strategy='fsdp'; its options are arguments of FSDP(…)."
    ),
)
