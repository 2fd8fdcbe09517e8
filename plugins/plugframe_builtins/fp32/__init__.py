"""Single precision."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.precisions:FullPrecision",
    summary="Single precision: dtypes stay as the script made them.",
    priority=10,
    retired=dict.fromkeys(("fp32", "float32", "float", "full", "no"), "use precision='32-true'."),
)
short = Plugin(alias_of="32-true", summary="Short for 32-true.")
