"""Metrics in a CSV file."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.csv_logger.logger:CSVLogger",
    summary="Metrics in a CSV file, a row for each step: runs/version_N/metrics.csv.",
)
