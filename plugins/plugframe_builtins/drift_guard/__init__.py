"""Verify that the ranks' models stay equal."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.drift_guard.extension:DriftGuard",
    summary="Compares a hash of parameters and optimizer state across ranks every few steps.",
    options=(Option("every", int, 100, "Optimizer steps between two comparisons.", minimum=1),),
)
