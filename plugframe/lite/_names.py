"""The names of the built-in plugins, for editors alone: nothing imports this module while a script runs.

Written by .ci/names.py from the entry points in pyproject.toml.
"""

from typing import Literal

AcceleratorName = Literal["auto", "cpu", "cuda", "mps", "accel", "gpu"]
StrategyName = Literal[
    "auto",
    "single",
    "ddp",
    "ddp_spawn",
    "ddp_fork",
    "ddp_notebook",
    "fsdp",
    "tensor_parallel",
    "context",
    "expert",
    "pipeline",
    "deepspeed",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "deepspeed_stage_1_offload",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3_offload",
    "deepspeed_stage_3_offload_nvme",
]
PrecisionName = Literal[
    "auto",
    "32-true",
    "32",
    "64-true",
    "64",
    "16-mixed",
    "16",
    "16-true",
    "bf16-mixed",
    "bf16",
    "bf16-true",
]
CollectiveName = Literal["auto", "single", "torch", "simulate"]
CheckpointName = Literal["auto", "safetensors", "dcp", "remote"]
EnvironmentName = Literal["auto", "manual", "torchelastic", "slurm", "mpi", "lsf", "kubeflow", "local", "simulate"]
LauncherName = Literal["auto", "elastic", "spawn", "fork"]
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"]
ExtensionName = Literal[
    "advise",
    "best-model",
    "costs",
    "drift-guard",
    "early-stopping",
    "ema",
    "grad-norm",
    "lockstep",
    "lr-monitor",
    "nan-guard",
    "oom-retry",
    "profiler",
    "swa",
    "throughput",
]
