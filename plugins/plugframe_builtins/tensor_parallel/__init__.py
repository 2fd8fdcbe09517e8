"""Tensor parallelism: single layers spread over ranks, and the data axis sharded on top."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.tensor_parallel.strategy:TensorParallel",
    summary="Layers split over ranks by a plan, and sharded over the data axis (DTensor, FSDP2).",
    provides=("sharded",),
    needs={"collective": ("process-group",)},
    prefers={"checkpoint": ("sharded",)},
    precisions=("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"),
)
