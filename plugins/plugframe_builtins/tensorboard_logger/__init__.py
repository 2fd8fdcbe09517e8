"""Metrics for TensorBoard."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.tensorboard_logger.logger:TensorBoardLogger",
    summary="Metrics for TensorBoard: runs/tensorboard/version_N.",
    options=(
        Option("folder", str, "runs/tensorboard", "Parent folder of the runs."),
        Option("resume", bool, True, "Continue the run of a loaded checkpoint; False records a new run."),
    ),
    requires=("tensorboard",),
    extra="plugframe[tensorboard]",
)
