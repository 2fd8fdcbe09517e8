"""Tell when a metric is the best so far, to keep the checkpoint."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.best_model.extension:BestModel",
    summary="Tells on all ranks when a logged metric is the best so far, to save that checkpoint.",
    options=(
        Option("monitor", str, "val_loss", "The metric, by the name that lite.log gets."),
        Option("mode", str, "min", "Whether a smaller or a larger value is better.", ("min", "max")),
        Option("min_delta", float, 0.0, "The least change that is an improvement.", minimum=0),
    ),
)
