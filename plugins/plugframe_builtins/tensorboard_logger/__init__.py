"""Metrics for TensorBoard."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.tensorboard_logger.logger:TensorBoardLogger",
    summary="Metrics for TensorBoard: runs/tensorboard/version_N.",
    requires=("tensorboard",),
    extra="plugframe[tensorboard]",
)
