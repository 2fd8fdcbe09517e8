"""Stop a run whose metric no longer improves."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.early_stopping.extension:EarlyStopping",
    summary="Requests the end of the loop when a logged metric no longer improves.",
    options=(
        Option("monitor", str, "val_loss", "The metric, by the name that lite.log gets."),
        Option("mode", str, "min", "Whether a smaller or a larger value is better.", ("min", "max")),
        Option("patience", int, 3, "Values without an improvement after which the run stops.", minimum=1),
        Option("min_delta", float, 0.0, "The least change that is an improvement.", minimum=0),
    ),
)
