"""Compare every collective call across ranks before it runs."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.lockstep.extension:Lockstep",
    summary="Compares every collective, backward, step and save across ranks before it runs; a difference is an error.",
    options=(Option("sites", bool, True, "Also compare the lines of the code that the calls come from."),),
)
