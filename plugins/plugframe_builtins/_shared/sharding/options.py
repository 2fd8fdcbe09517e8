"""Options common to strategies with sharded parameters."""

from __future__ import annotations

from plugframe import Option

OPTIONS = (
    Option("units", list[str], "auto", "Classes of the blocks that are gathered and freed as one."),
    Option("unit_min_numel", int, 100_000_000, "Under units=auto, modules of this many elements are units.", minimum=1),
    Option("reshard_after_forward", bool, None, "Free a unit after its forward; unset: the strategy decides."),
    Option("cpu_offload", bool, False, "Keep parameters, gradients and optimizer state in CPU memory."),
    Option("activation_checkpointing", bool, False, "Recompute the units' activations in backward."),
    Option("prefetch", int, None, "Number of units to gather ahead; unset: torch decides.", minimum=0),
    Option("compile", bool, False, "Compile every unit separately."),
)
