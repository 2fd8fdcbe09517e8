"""Skip optimizer steps on losses or gradients that are not finite."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_nan_guard.guard:NaNGuard",
    summary="Skip optimizer steps on losses or gradients that are not finite.",
    options=(Option("max_in_a_row", int, 10, "Skipped steps in a row after which the run stops.", minimum=1),),
)
