"""Options common to strategies with sharded parameters."""

from __future__ import annotations

from plugframe import Option

OPTIONS = (
    Option("units", list[str], "auto", "Classes of the blocks that are gathered and freed as one."),
    Option("unit_min_numel", int, 100_000_000, "Under units=auto a module of so many elements is one.", minimum=1),
    Option("reshard_after_forward", bool, None, "Free a unit after its forward; unset: all but the outermost."),
    Option("cpu_offload", bool, False, "Keep parameters, gradients and optimizer state in the host's memory."),
    Option("activation_checkpointing", bool, False, "Compute the units' activations again in backward."),
    Option("prefetch", int, None, "How many units ahead are gathered; unset: torch decides.", minimum=0),
    Option("compile", bool, False, "Compile every unit by itself."),
)
