"""A launcher that runs each rank in an actor of Ray."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_ray.launcher:Ray",
    summary="Runs a function with each rank in an actor of a Ray cluster, or of this machine.",
    # Functions are pickled by value, so interactive ones work; the actors are on any nodes of the cluster.
    provides=("function", "interactive", "nodes"),
    requires=("ray",),
    extra="plugframe-ray[ray]",
    options=(
        Option("address", str, None, "The cluster: an address, or auto; unset: one of this machine, for this job."),
        Option("cpus_per_rank", float, 1.0, "CPUs to reserve for each rank.", above=0),
        Option("gpus_per_rank", float, 0.0, "GPUs to reserve for each rank.", minimum=0),
    ),
)
