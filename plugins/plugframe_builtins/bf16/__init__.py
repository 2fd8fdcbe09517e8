"""bfloat16: the range of float32 in 16 bits."""

from plugframe import Plugin

mixed = Plugin(
    factory="plugframe_builtins.precisions:MixedPrecision",
    summary="Parameters in float32, arithmetic in bfloat16 where that is safe.",
    provides=("autocast",),
    preset={"dtype": "bfloat16"},
    retired={"bfloat16": "use precision='bf16-mixed', or 'bf16-true' for all in bfloat16."},
)
short = Plugin(alias_of="bf16-mixed", summary="Short for bf16-mixed.")
true = Plugin(
    factory="plugframe_builtins.precisions:TruePrecision",
    summary="Model and inputs in bfloat16; half the memory, the range of float32.",
    provides=("bfloat16-parameters",),
    preset={"dtype": "bfloat16"},
)
