"""Tensor parallelism: layers split over ranks, and sharded over the data axis."""

from plugframe import Axis, Option, Plugin
from plugframe_builtins._shared.sharding.options import OPTIONS

_STYLES = ("colwise", "rowwise", "sequence", "colwise_gather")

plugin = Plugin(
    factory="plugframe_builtins.tensor_parallel.strategy:TensorParallel",
    summary="Layers split over ranks by a plan, and sharded over the data axis (DTensor, FSDP2).",
    provides=("sharded",),
    divides="tensors",
    axes=(Axis("data", samples=True, size=1, optional=True), Axis("tensor")),
    options=(
        Option("plan", dict[str, str], None, "How each layer is split; unset: the model's own plan.", _STYLES),
        Option("mesh", dict[str, int], None, "Ranks of an axis: data=2,tensor=4.", minimum=-1),
        *OPTIONS,
    ),
    needs={"collective": ("process-group",)},
    prefers={"checkpoint": ("sharded",)},
    conflicts={"precision": ("tensor-subclasses",)},
)
