"""Fabric's ``ModelParallelStrategy``: a function that splits the model over a mesh with Fabric's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from plugframe.errors import SettingError, UnsupportedError
from plugframe.hooks.context import Context
from plugframe_builtins._shared.fabric_arguments import refuse_settings
from plugframe_builtins._shared.sharding.mesh import make_mesh
from plugframe_builtins.tensor_parallel import plugin
from plugframe_builtins.tensor_parallel.strategy import TensorParallel

_JOB = ("process_group_backend", "timeout")


class ModelParallelStrategy(TensorParallel):
    """Split a model by a function over ``mesh["tensor_parallel"]``, and shard it over ``mesh["data_parallel"]``.

    The function need not shard: what it leaves is sharded over the data axis by the strategy.

    Args:
        parallelize_fn: ``f(model, mesh) -> model``, which changes the model in place.
        data_parallel_size: number of ranks of the data axis; ``"auto"`` is all that are left, or the number of nodes.
        tensor_parallel_size: number of ranks of the tensor axis; ``"auto"`` is all that are left.
        save_distributed_checkpoint: True: the format is the job's, ``checkpoint=``.
        options: Fabric's, at their defaults.
    """

    plugin = replace(plugin, factory=f"{__name__}:ModelParallelStrategy", divides="batch", axes=(), options=())
    axes = ("data_parallel", "tensor_parallel")

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], Any],
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        **options: Any,
    ) -> None:
        more = refuse_settings(type(self).__name__, options, _JOB)
        if more:
            raise SettingError(f"ModelParallelStrategy() has no argument {next(iter(more))!r}.")
        if not save_distributed_checkpoint:
            raise SettingError(
                "ModelParallelStrategy(save_distributed_checkpoint=False): pass checkpoint='safetensors' to Fabric, "
                "which gives a single file."
            )
        super().__init__(parallelize=parallelize_fn)
        self._sizes = (_size("data", data_parallel_size), _size("tensor", tensor_parallel_size))

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh of all ranks, with the axes ``data_parallel`` and ``tensor_parallel``."""
        return self._job_mesh

    def _make_mesh(self, context: Context) -> DeviceMesh:
        data, tensor = self._sizes
        if data == tensor == -1:
            data = context.world.num_nodes
        return make_mesh("ModelParallelStrategy", dict(zip(self.axes, (data, tensor), strict=True)), self.axes, context)

    def _parallelize(self, module: nn.Module) -> None:
        assert self.parallelize is not None
        found = self.parallelize(module, self._job_mesh)
        if found is not module and found is not None:
            raise SettingError(
                f"parallelize_fn returned another {type(found).__name__}: change the model in place, and return it."
            )
        for name, part in module.named_modules():
            if isinstance(part, FSDPModule):
                raise UnsupportedError(
                    f"parallelize_fn calls fully_shard on {name or 'the model'!r}: leave it out, ModelParallelStrategy "
                    "shards the model over the data axis itself."
                )


def _size(axis: str, size: Any) -> int:
    if size == "auto":
        return -1
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SettingError(f"ModelParallelStrategy({axis}_parallel_size={size!r}): it is 'auto', or an integer from 1.")
    return size
