"""Pipeline parallelism: the stages of a model on different ranks, fed with micro-batches."""

from plugframe import Axis, Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.pipeline.strategy:Pipeline",
    summary="Stages of a model on different ranks, fed with micro-batches (torch.distributed.pipelining).",
    provides=("sharded",),
    divides="stages",
    axes=(Axis("pipeline"), Axis("data", samples=True, size=1, optional=True)),
    options=(
        Option("stages", int, None, "Stages the model is cut into; unset: one per rank.", minimum=1),
        Option("split", list[str], None, "Module paths that start a new stage; unset: the model's own plan."),
        Option(
            "schedule",
            str,
            None,
            "Order of the micro-batches: gpipe, 1f1b, interleaved, zero_bubble, or a schedule of torch's kind as "
            "package.module:Class; unset: 1f1b if the model returns its loss, else gpipe.",
        ),
        Option("micro_batches", int, None, "Micro-batches of a batch; unset: as many as stages.", minimum=1),
    ),
    needs={"collective": ("process-group",)},
    prefers={"checkpoint": ("sharded",)},
    # Under a loss scaler a schedule's backward would run before the loss is scaled.
    conflicts={"precision": ("loss-scaling", "float16-parameters", "tensor-subclasses")},
)
