"""Runs recorded with Trackio."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.trackio_logger.logger:TrackioLogger",
    summary="Metrics, hyperparameters and artifacts for Trackio, in a local database or on a Space.",
    requires=("trackio",),
    extra="plugframe[trackio]",
    options=(
        Option("project", str, "plugframe", "The project of the run."),
        Option("group", str, "", "The group of runs that this one belongs to."),
        Option("space", str, "", "The Hugging Face Space to record on; empty for the database in $TRACKIO_DIR."),
        Option("resume", bool, True, "Continue the run of a loaded checkpoint; False records a new run."),
    ),
)
