"""Ranks in the pods of Kubeflow's PyTorchJob, one in each pod."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.kubeflow.environment:Kubeflow",
    summary="Kubeflow: the pods of a PyTorchJob, one process in each.",
    priority=20,
    variables=("KUBERNETES_PORT", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"),
    own_variables=("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "PET_*"),
)
