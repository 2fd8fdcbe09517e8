"""Ranks launched by mpirun or mpiexec."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.mpi.environment:MPI",
    summary="mpirun of Open MPI, MPICH or Intel MPI.",
    # Above slurm, since it runs inside SLURM jobs; below lsf, whose jsrun also sets Open MPI's variables.
    priority=40,
    own_variables=("OMPI_COMM_WORLD_*", "OMPI_UNIVERSE_SIZE", "PMI_*", "PMIX_*", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
