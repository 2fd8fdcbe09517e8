"""The mean of the weights along the last part of training, for evaluation."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.swa.extension:SWA",
    summary="Keeps the mean of the weights from a step on (stochastic weight averaging), for evaluation.",
    options=(
        Option("start", int, 0, "Optimizer steps before the first that is averaged.", minimum=0),
        Option("every", int, 1, "Optimizer steps per update, such as those of an epoch.", minimum=1),
    ),
)
