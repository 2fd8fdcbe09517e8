"""Runs recorded with MLflow."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.mlflow_logger.logger:MLflowLogger",
    summary="Metrics, hyperparameters and artifacts for MLflow.",
    requires=("mlflow",),
    extra="plugframe[mlflow]",
    options=(
        Option(
            "uri",
            str,
            "",
            "The server or database, such as sqlite:///mlflow.db; empty for MLflow's own choice.",
        ),
        Option("experiment", str, "plugframe", "The experiment of the run; created if there is none."),
        Option("run_name", str, "", "The name of the run; empty for MLflow's own choice."),
        Option("artifacts", str, "", "Where a new experiment keeps its artifacts; empty for MLflow's own choice."),
        Option("resume", bool, True, "Continue the run of a loaded checkpoint; False records a new run."),
    ),
)
