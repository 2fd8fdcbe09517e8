"""Expert parallelism, and FSDP2 for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy
from plugframe_builtins._shared.sharding.mesh import make_mesh
from plugframe_builtins.expert.divide import AXIS, DividedExperts, Ranks, divide
from plugframe_builtins.expert.layer import Layers
from plugframe_builtins.expert.plan import ATTRIBUTE, Plan, check_plan

__all__ = ["ATTRIBUTE", "ExpertParallel"]


class ExpertParallel(FullyShardedStrategy):
    """Divide the experts of a mixture over the axis ``expert``, and shard everything else as strategy ``fsdp`` does.

    Ranks along the axis read different samples. Each runs its own experts on the tokens of all of them: tokens are sent
    there, and outputs back. Parameters of experts are sharded over all ranks while they do not run.

    Args:
        plan: module paths (``*`` for one component) of experts, and how they are called: ``"modules"`` for a list of
            modules, which a loop runs; ``"grouped"`` or ``"batched"`` for a module that stacks their weights, or a
            function, see `plugframe_builtins.expert.dispatch`. By default the model's own attribute ``expert_plan``,
            or its lists of alike modules that are called ``experts``. ``{}`` for a model without experts.
        mesh: ``{"data": 2, "expert": 4}``; by default all ranks form one group.
        options: those of strategy ``fsdp``. By default `reshard_after_forward` is True for the outermost unit too.
    """

    name = "expert"
    axes = ("data", AXIS)
    graph_remedy = "use strategy='fsdp' with reshard_after_forward=False, or 'ddp'"

    def __init__(self, *, plan: Plan | None = None, mesh: Mapping[str, int] | None = None, **options: Any) -> None:
        super().__init__(mesh=mesh, **options)
        self._options = {"mesh": mesh, **options} if mesh is not None else options
        if plan is not None:
            check_plan(plan, "plan= of strategy 'expert'")
        self.plan = plan
        self._layers = Layers()

    def _make_mesh(self, context: Context) -> DeviceMesh:
        mesh = self.mesh or {AXIS: -1}
        return make_mesh(self.name, mesh, self.axes if "data" in mesh else (AXIS,), context)

    def _reshards_after_forward(self) -> bool | int | None:
        return True if self.reshard_after_forward is None else self.reshard_after_forward

    def _parallelize(self, module: nn.Module) -> None:
        mesh = self._data_mesh
        names = mesh.mesh_dim_names or ()
        several = AXIS in names and mesh.size(names.index(AXIS)) > 1
        divide(module, Ranks(mesh, None) if several else None, self.plan, self.context, self._layers)

    @hookimpl
    def strategy_compose(self) -> DividedExperts:
        if self._options:
            name, value = next(iter(self._options.items()))
            raise SettingError(
                f"{name}={value!r} of strategy 'expert' has no effect beside another strategy: give it to that one."
            )
        return DividedExperts(self.plan)

    @hookimpl
    def strategy_teardown(self) -> None:
        self._layers.close()
        super().strategy_teardown()
