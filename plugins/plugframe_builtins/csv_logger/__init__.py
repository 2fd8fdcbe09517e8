"""Metrics in a CSV file."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.csv_logger.logger:CSVLogger",
    summary="Metrics in a CSV file, a row for each step: runs/version_N/metrics.csv.",
    options=(
        Option("folder", str, "runs", "Parent folder of the runs."),
        Option("flush_rows", int, 100, "Rows kept in memory before they are written.", minimum=1),
        Option("resume", bool, True, "Continue the run of a loaded checkpoint; False records a new run."),
    ),
)
