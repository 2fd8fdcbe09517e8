"""A launcher that submits the job through submitit: to SLURM, or as a process here."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_submitit.launcher:Submitit",
    summary="Submits the job through submitit, follows its output and gives its result.",
    # A function is sent by value, so that one typed at a prompt will do. One command starts all nodes.
    provides=("script", "function", "interactive", "nodes"),
    requires=("submitit", "cloudpickle"),
    extra="submitit",
    options=(
        Option("folder", str, "submitit", "Where submissions, outputs and results are, seen by all nodes."),
        Option("cluster", str, None, "Where the job runs; unset: slurm if there is an sbatch.", ("slurm", "local")),
        Option("timeout_min", int, 60, "Minutes the job may take.", minimum=1),
        Option("gpus_per_node", int, None, "GPUs to ask SLURM for on each node.", minimum=1),
        Option("slurm", dict[str, str], None, "More for SLURM, as in partition=big,account=lab."),
    ),
)
