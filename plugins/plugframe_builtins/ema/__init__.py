"""An exponential moving average of the weights, for evaluation."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.ema.extension:EMA",
    summary="Keeps an exponential moving average of the weights, for evaluation.",
    options=(
        Option("decay", float, 0.999, "Weight of the old average in each update.", minimum=0, maximum=0.999999),
        Option("every", int, 1, "Optimizer steps per update.", minimum=1),
        Option("warm_up", bool, True, "Use a smaller decay, (1 + n) / (10 + n), in the first updates."),
    ),
)
