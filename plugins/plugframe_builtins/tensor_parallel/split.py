"""Tensor parallelism beside another strategy: it splits layers, and the other one does the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plugframe.base import Strategy
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe_builtins.tensor_parallel.plan import Plan, apply_plan, check_plan, of_hugging_face

#: The attribute of a model's own plan, and those of Hugging Face's models.
ATTRIBUTE, _HUGGING_FACE = "tensor_parallel_plan", ("tp_plan", "_tp_plan")

Parallelize = Callable[[nn.Module, DeviceMesh], Any]


class Split(Strategy):
    """Split the layers of a module over the axis ``tensor``.

    Args:
        plan: see `TensorParallel`.
        parallelize: see `TensorParallel`.
    """

    def __init__(self, plan: Plan | None, parallelize: Parallelize | None) -> None:
        self.plan = plan
        self.parallelize = parallelize

    @hookimpl
    def strategy_parallelize(self, module: nn.Module) -> None:
        assert self.context.mesh is not None
        split(module, self.context.mesh["tensor"], self.plan, self.parallelize)


def split(module: nn.Module, mesh: DeviceMesh, plan: Plan | None, parallelize: Parallelize | None) -> None:
    """Split the layers of a module over the ranks of `mesh`, by a function, a plan, or the model's own plan.

    Raises:
        SettingError: if there is no plan, or it does not fit the module.
    """
    if parallelize is not None:
        parallelize(module, mesh)
        return
    where = "plan= of strategy 'tensor_parallel'"
    if plan is None:
        name = next((name for name in (ATTRIBUTE, *_HUGGING_FACE) if getattr(module, name, None)), ATTRIBUTE)
        plan, where = getattr(module, name, None), f"{type(module).__name__}.{name}"
        if plan is None:
            raise SettingError(
                f"strategy 'tensor_parallel' has no plan to split this {type(module).__name__}: pass "
                f'TensorParallel(plan={{"blocks.*.up": "colwise", …}}), or give the model such an attribute '
                f"{ATTRIBUTE}."
            )
        if name in _HUGGING_FACE:
            plan = of_hugging_face(module, plan, where)
        check_plan(plan, where)
    apply_plan(module, plan, mesh, where)
