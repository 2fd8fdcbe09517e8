"""Metrics for TensorBoard."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.tensorboard_logger.logger:TensorBoardLogger",
    summary="Metrics for TensorBoard: runs/tensorboard/version_N.",
    options=(Option("folder", str, "runs/tensorboard", "Where the folders of the runs are."),),
    requires=("tensorboard",),
    extra="plugframe[tensorboard]",
)
