"""Imports of the processes from which the ranks and commands of the tests fork, besides those of plugframe's own.

Each rank would spend a tenth of a second on the built-in plugins, and more than one on deepspeed and torch's compiler.
Importing them starts no thread, which a fork would not survive.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import plugframe_builtins

#: Not these: tests look at whether they were imported, or they need packages that not everybody has.
_APART = ("convert", "wandb_logger", "mlflow_logger", "trackio_logger", "tensorboard_logger", "remote_checkpoint")

for _found in pkgutil.walk_packages(plugframe_builtins.__path__, "plugframe_builtins."):
    if _found.name.split(".")[1] not in _APART:
        importlib.import_module(_found.name)

for _name in (
    "torch.distributed.pipelining",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.ops.op_builder.all_ops",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
