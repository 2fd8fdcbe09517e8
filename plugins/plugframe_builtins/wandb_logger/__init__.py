"""Runs recorded with Weights & Biases."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.wandb_logger.logger:WandbLogger",
    summary="Metrics, hyperparameters and artifacts for Weights & Biases.",
    requires=("wandb",),
    extra="plugframe[wandb]",
    options=(
        Option("project", str, "plugframe", "The project of the run."),
        Option("run_name", str, "", "The name of the run; empty for wandb's own choice."),
        Option("group", str, "", "The group of runs that this one belongs to."),
        Option("entity", str, "", "The user or team that owns the run; empty for the default of the account."),
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
