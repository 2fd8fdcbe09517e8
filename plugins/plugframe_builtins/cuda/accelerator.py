"""CUDA devices as an accelerator."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from plugframe.base import Accelerator
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class CUDA(Accelerator):
    """The GPUs of torch's ``cuda`` device type, one for each rank."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._undo = ExitStack()

    @hookimpl
    def accelerator_is_available(self) -> bool:
        # Through NVML where available: torch.cuda.is_available() would initialise the
        # CUDA runtime in this process, and ranks forked from it could not use a GPU.
        return torch.cuda.device_count() > 0

    @hookimpl
    def accelerator_device_count(self) -> int:
        return torch.cuda.device_count()

    @hookimpl
    def accelerator_setup(self, context: Context) -> None:
        # As a context manager: restoring the previous device does not then initialise CUDA on it, which would take
        # hundreds of megabytes of the first GPU for every rank.
        self._undo.enter_context(torch.cuda.device(context.device))
        self._undo.callback(torch.cuda.empty_cache)

    @hookimpl
    def accelerator_teardown(self) -> None:
        self._undo.close()

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return "cpu:gloo,cuda:nccl"

    @hookimpl
    def accelerator_supports_dtype(self, dtype: torch.dtype, device: torch.device) -> bool:
        if dtype is not torch.bfloat16:
            return True
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    @hookimpl
    def accelerator_seed(self, seed: int) -> None:
        torch.cuda.manual_seed_all(seed)

    @hookimpl
    def accelerator_rng_state(self, device: torch.device) -> Tensor | None:
        return torch.cuda.get_rng_state(device)

    @hookimpl
    def accelerator_set_rng_state(self, state: Tensor, device: torch.device) -> None:
        torch.cuda.set_rng_state(state.to("cpu", torch.uint8), device)

    @hookimpl
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        free, total = torch.cuda.mem_get_info(device)
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "free_bytes": free,
            "total_bytes": total,
        }

    @hookimpl
    def accelerator_synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
