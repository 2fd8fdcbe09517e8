"""Ranks launched by SLURM's srun."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.slurm.environment:Slurm",
    summary="SLURM: the tasks of srun.",
    # Below mpi: the job's variables are also set for an mpirun inside it.
    priority=30,
    variables=("SLURM_JOB_ID",),
    own_variables=(
        *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_GTIDS"),
        *("SLURM_TASK_PID", "SLURM_STEPID", "SLURM_STEP_*"),
    ),
)
