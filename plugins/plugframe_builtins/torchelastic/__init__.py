"""Ranks launched by torchrun, or by hand with the variables of ``env://``."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.torchelastic.environment:TorchElastic",
    summary="torchrun, or RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set by hand.",
    # Highest priority, as the innermost launcher: torchrun may run under srun, mpirun and in pods.
    priority=60,
    variables=("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    own_variables=(
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "ROLE_NAME"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*"),
    ),
)
