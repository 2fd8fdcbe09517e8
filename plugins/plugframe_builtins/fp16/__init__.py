"""Half precision (float16)."""

from plugframe import Plugin

mixed = Plugin(
    factory="plugframe_builtins.precisions:MixedPrecision",
    summary="Parameters in float32, arithmetic in float16 where that is safe, the loss scaled.",
    provides=("autocast", "loss-scaling"),
    preset={"dtype": "float16"},
    retired=dict.fromkeys(("fp16", "float16", "half"), "use precision='16-mixed', or '16-true' for all in float16."),
)
short = Plugin(alias_of="16-mixed", summary="Short for 16-mixed.")
true = Plugin(
    factory="plugframe_builtins.precisions:TruePrecision",
    summary="Model and inputs in float16; half the memory, a narrow range.",
    provides=("float16-parameters",),
    preset={"dtype": "float16"},
)
