"""DeepSpeed's global state: set for one session, and restored."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.optim import Optimizer

from plugframe.errors import UnsupportedError
from plugframe.hooks.context import Context
from plugframe.utils.environment import preserved_environment
from plugframe_builtins.deepspeed.build import build
from plugframe_builtins.deepspeed.library import library

#: DeepSpeed compiles this on a CPU, for inference only.
SHARED_MEMORY_OP = "deepspeed_shm_comm"
#: Set by torch when its compiler is imported, which DeepSpeed does.
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def start(context: Context, *, shared_memory_op: bool, build_timeout_s: float) -> ExitStack:
    """Import DeepSpeed and connect it to the process group; return a stack that undoes it. Every rank must call it.

    Args:
        shared_memory_op: whether to compile and load DeepSpeed's communication between processes of one host.
        build_timeout_s: timeout of waiting for another process that compiles it.

    Raises:
        UnsupportedError: if DeepSpeed uses another device type in this process, or cannot be compiled.
    """
    undo = ExitStack()
    if _INDUCTOR not in os.environ:
        undo.callback(os.environ.pop, _INDUCTOR, None)
    if "LOCAL_RANK" not in os.environ:  # stage 3 reads it in every step, and not every launcher sets it
        undo.callback(os.environ.pop, "LOCAL_RANK", None)
    with undo, variables_of(context):
        deepspeed = _imported()
        device = library("accelerator").get_accelerator().device_name()
        if device != context.device.type:
            raise UnsupportedError(
                f"DeepSpeed serves {device!r} in this process, and the job runs on {context.device.type!r}: set "
                f"DS_ACCELERATOR={context.device.type} before anything imports deepspeed."
            )
        connects = deepspeed.comm.comm
        if connects.cdb is None:
            undo.callback(_disconnect, connects)
            if shared_memory_op and context.device.type == "cpu":
                _build_shared_memory_op(context, build_timeout_s)
                _connect(deepspeed)
            else:
                with _nothing_to_compile(deepspeed.ops):
                    _connect(deepspeed)
            _use_new_names(connects.cdb)
        kept = undo.pop_all()
    os.environ.setdefault("LOCAL_RANK", str(context.world.local_rank))
    return kept


@contextmanager
def variables_of(context: Context) -> Iterator[None]:
    """Set DeepSpeed's environment variables; on exit, undo all changes made meanwhile."""
    with preserved_environment():
        os.environ["LOCAL_RANK"] = str(context.world.local_rank)
        os.environ.setdefault("DS_ACCELERATOR", context.device.type)
        yield


def _imported() -> Any:
    """Import DeepSpeed and its lazily imported modules, while torch's warnings about itself are no errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        library("runtime.zero.muon.muon_optimizer")
        return library()


def initialize(context: Context, module: nn.Module, optimizer: Optimizer | None, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine over a module. Every rank must call it."""
    with variables_of(context), _quiet():
        return library().initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop DeepSpeed's prints, unless its log level is below warning."""
    if logging.getLogger("DeepSpeed").isEnabledFor(logging.INFO):
        yield
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            yield


def _connect(deepspeed: Any) -> None:
    with _quiet():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)


def _use_new_names(backend: Any) -> None:
    """Map two torch functions DeepSpeed calls to their current names; the old ones warn."""
    backend.all_gather_function = getattr(torch.distributed, "all_gather_single", backend.all_gather_function)
    backend.reduce_scatter_function = getattr(
        torch.distributed, "reduce_scatter_single", backend.reduce_scatter_function
    )


def _disconnect(connects: Any) -> None:
    connects.cdb = None
    # They would keep destroyed process groups alive.
    library("utils.groups")._release_process_group_references()


@contextmanager
def _nothing_to_compile(ops: Any) -> Iterator[None]:
    """Report to DeepSpeed that nothing can be compiled: training does not use what it would compile."""
    missing = object()
    before = vars(ops).get("__compatible_ops__", missing)
    ops.__compatible_ops__ = {}
    try:
        yield
    finally:
        if before is missing:
            del ops.__compatible_ops__
        else:
            ops.__compatible_ops__ = before


def _build_shared_memory_op(context: Context, timeout_s: float) -> None:
    def load() -> None:
        with _quiet():
            library("accelerator").get_accelerator().create_op_builder("ShareMemCommBuilder").load()

    build(
        SHARED_MEMORY_OP,
        load,
        builds=context.world.local_rank == 0,
        hooks=context.hooks,
        timeout_s=timeout_s,
    )
