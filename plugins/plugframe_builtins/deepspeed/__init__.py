"""DeepSpeed's ZeRO: sharded optimizer state, gradients and parameters."""

from plugframe import Plugin
from plugframe_builtins.deepspeed.options import OPTIONS


def _named(what: str, **preset: object) -> Plugin:
    return Plugin(
        factory="plugframe_builtins.deepspeed.strategy:DeepSpeed",
        summary=f"DeepSpeed ZeRO {what}.",
        conflicts={"precision": ("float64-parameters", "float16-parameters", "tensor-subclasses")},
        provides=("sharded",),
        needs={"collective": ("process-group",)},
        prefers={"checkpoint": ("sharded",)},
        requires=("deepspeed",),
        extra="plugframe[deepspeed]",
        options=OPTIONS,
        preset=preset,
    )


plugin = _named("2: sharded optimizer state and gradients; other stages are an option")
stage_1 = _named("1: sharded optimizer state", stage=1)
stage_2 = _named("2: sharded optimizer state and gradients", stage=2)
stage_3 = _named("3: sharded optimizer state, gradients and parameters", stage=3)
stage_1_offload = _named("1, optimizer on the host", stage=1, offload_optimizer="cpu")
stage_2_offload = _named("2, optimizer on the host", stage=2, offload_optimizer="cpu")
stage_3_offload = _named("3, all of it on the host", stage=3, offload_optimizer="cpu", offload_params="cpu")
stage_3_offload_nvme = _named("3, all of it on NVMe disks", stage=3, offload_optimizer="nvme", offload_params="nvme")
