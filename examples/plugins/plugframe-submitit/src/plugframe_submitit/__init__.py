"""A launcher that submits the job through submitit: to SLURM, or as a local process."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_submitit.launcher:Submitit",
    summary="Submits the job through submitit, streams its output and returns its result.",
    # Functions are pickled by value, so interactive ones work. One command starts all nodes.
    provides=("script", "function", "interactive", "nodes"),
    requires=("submitit", "cloudpickle"),
    extra="submitit",
    options=(
        Option("folder", str, "submitit", "Folder of submissions, outputs and results, visible to all nodes."),
        Option("cluster", str, None, "Where the job runs; unset: slurm if sbatch is available.", ("slurm", "local")),
        Option("timeout_min", int, 60, "Time limit of the job in minutes.", minimum=1),
        Option("gpus_per_node", int, None, "GPUs per node to request from SLURM.", minimum=1),
        Option("slurm", dict[str, str], None, "More SLURM parameters, such as partition=big,account=lab."),
    ),
)
