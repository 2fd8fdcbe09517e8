"""Double precision."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.precisions:TruePrecision",
    summary="Double precision: model and inputs in float64.",
    provides=("float64-parameters",),
    preset={"dtype": "float64"},
    retired=dict.fromkeys(("fp64", "float64", "double"), "use precision='64-true'."),
)
short = Plugin(alias_of="64-true", summary="Short for 64-true.")
