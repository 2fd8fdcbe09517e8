"""Tensor parallelism with ``torch.distributed.tensor.parallel``, and FSDP2 over the data axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy
from plugframe_builtins._shared.sharding.mesh import make_mesh
from plugframe_builtins.tensor_parallel.plan import Plan, check_plan
from plugframe_builtins.tensor_parallel.split import ATTRIBUTE, Split, split

__all__ = ["ATTRIBUTE", "TensorParallel"]


class TensorParallel(FullyShardedStrategy):
    """Split layers over a tensor group, and shard everything over the data axis as strategy ``fsdp`` does.

    The ranks of a tensor group read the same batches. They must draw the same random numbers (dropout): seed them
    equally, as ``lite.seed_everything`` does.

    Args:
        plan: how each layer is split: module paths (``*`` for one component) to ``"colwise"``, ``"rowwise"``,
            ``"sequence"``, ``"colwise_gather"`` (full outputs on every rank) or a ``ParallelStyle`` of torch. By
            default the model's own attribute ``tensor_parallel_plan``, or the ``tp_plan`` of a Hugging Face model.
        parallelize: a function ``f(module, mesh)`` instead of a plan; `mesh` is that of the tensor group.
        mesh: ``{"data": 2, "tensor": 4}``; by default all ranks form one tensor group.
        options: those of strategy ``fsdp``, for the data axis. By default `reshard_after_forward` is True for the
            outermost unit too.
    """

    name = "tensor_parallel"
    axes = ("data", "tensor")
    graph_remedy = "use strategy='fsdp' with reshard_after_forward=False, or 'ddp'"

    def __init__(
        self,
        *,
        plan: Plan | None = None,
        parallelize: Callable[[nn.Module, DeviceMesh], Any] | None = None,
        mesh: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(mesh=mesh, **options)
        self._options = {"mesh": mesh, **options} if mesh is not None else options
        if plan is not None and parallelize is not None:
            raise SettingError("strategy 'tensor_parallel' takes one of plan= and parallelize=, got both.")
        if plan is not None:
            check_plan(plan, "plan= of strategy 'tensor_parallel'")
        if parallelize is not None and not callable(parallelize):
            raise SettingError(f"parallelize={parallelize!r} of strategy 'tensor_parallel' must be f(module, mesh).")
        self.plan = plan
        self.parallelize = parallelize

    def _own_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        super()._own_mesh(mesh)  # for its check
        return mesh

    def _make_mesh(self, context: Context) -> DeviceMesh:
        return make_mesh(self.name, self.mesh or {"tensor": -1}, self.axes, context)

    @property
    def _data_mesh(self) -> DeviceMesh:
        return self._job_mesh[self.axes[0]]

    @property
    def _job_mesh(self) -> DeviceMesh:
        return super()._data_mesh

    def _reshards_after_forward(self) -> bool | int | None:
        """Reshard the outermost unit too: a gathered parameter is a torch DTensor here, not a plain tensor.

        Terms over parameters outside of a forward (an L2 penalty) would mix the two.
        """
        return True if self.reshard_after_forward is None else self.reshard_after_forward

    def _parallelize(self, module: nn.Module) -> None:
        split(module, self._job_mesh[self.axes[1]], self.plan, self.parallelize)

    @hookimpl
    def strategy_compose(self) -> Split:
        if self._options:
            name, value = next(iter(self._options.items()))
            raise SettingError(
                f"{name}={value!r} of strategy 'tensor_parallel' has no effect beside another strategy: give it to "
                "that one."
            )
        return Split(self.plan, self.parallelize)

    @hookimpl
    def strategy_data_shard(self) -> tuple[int, int]:
        data = self._data_mesh
        return data.get_local_rank(), data.size()
