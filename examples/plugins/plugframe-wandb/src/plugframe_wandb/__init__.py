"""A logger that records runs with Weights & Biases."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_wandb.logger:WandbLogger",
    summary="Metrics, hyperparameters and artifacts for Weights & Biases.",
    requires=("wandb",),
    extra="plugframe-wandb",
    options=(
        Option("project", str, "plugframe", "The project of the run."),
        Option("folder", str, "runs", "Where wandb keeps its folder 'wandb'."),
        Option(
            "mode",
            str,
            "online",
            "Where runs go: to the server, or to the folder until `wandb sync`.",
            ("online", "offline"),
        ),
        Option("resume", bool, True, "Continue the run of a loaded checkpoint; False records a new run."),
    ),
)
