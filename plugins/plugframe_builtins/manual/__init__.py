"""Processes started by hand, one for each rank."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.manual.environment:Manual",
    summary="Processes started by hand with LOCAL_RANK, NODE_RANK, MASTER_ADDR, MASTER_PORT and a number of ranks.",
    # Real launchers have more information.
    priority=10,
    provides=("by-hand",),
    own_variables=(
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT"),
    ),
)
