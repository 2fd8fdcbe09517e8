"""Composed strategies in a running job: one mesh, and each strategy on its own axes of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from plugframe.core.planning.composition import COMPOSED
from plugframe.core.planning.plan import Choice, Plan
from plugframe.core.registry.catalogue import Catalogue
from plugframe.core.runtime.binding import BoundHooks
from plugframe.errors import PluginContractError
from plugframe.hooks.context import Context


class Composed:
    """The strategies of a plan that divide a model rather than the batch.

    Attributes:
        plan: the plan, with the object of the strategy that divides the batch.
        others: the other strategies, in the order in which they are applied to a module.
    """

    def __init__(self, plan: Plan, catalogue: Catalogue) -> None:
        base = plan.choices[COMPOSED]
        self.others: list[tuple[Choice, Any]] = []
        self._applied = False
        self._led: Any = None
        if plan.composed:
            own = catalogue.describe(base.entry) if base.entry is not None else base.descriptor
            base = replace(base, instance=base.make(catalogue).strategy_compose())
            for choice in plan.composed:
                plugin = choice.make(catalogue).strategy_compose()
                if plugin.strategy_lead(own):
                    self._led, base = base.instance, replace(base, instance=plugin)
                else:
                    self.others.append((choice, plugin))
        self.plan = replace(plan, choices={**plan.choices, COMPOSED: base})

    def check_applied(self, module: Any) -> None:
        """Raise if the strategy that divides the batch has set up a module without the other strategies.

        Raises:
            PluginContractError: naming both.
        """
        applied, self._applied = self._applied, False
        if self.others and not applied and any(True for _ in module.parameters()):
            base, others = self.plan.choices[COMPOSED], " and ".join(repr(choice.name) for choice, _ in self.others)
            raise PluginContractError(
                f"strategy {base.origin} set a {type(module).__name__} up without {others}: it has axes, so it must "
                "call context.parallelize(module)."
            )

    def start(self, context: Context, hooks: BoundHooks, undo: ExitStack) -> Context:
        """Make the mesh and set up the other strategies; return the context of the one that divides the batch.

        Called on every rank, once the collective is set up.
        """
        # Imported late: a job without a mesh does not need it.
        from plugframe.base.device_mesh import make_device_mesh

        layout, base = self.plan.mesh, self.plan.choices[COMPOSED]
        assert layout is not None
        mesh = make_device_mesh(context, layout.names, layout.sizes)
        context = replace(context, mesh=mesh, averaged=layout.averaged(base.name))
        for choice, plugin in self.others:
            undo.callback(plugin.strategy_teardown)
            plugin.strategy_setup(context=replace(context, axes=layout.owned_by(choice.name)))
        shard = layout.data_shard(context.world.global_rank)
        undo.callback(setattr, hooks, "strategy_data_shard", hooks.strategy_data_shard)
        vars(hooks)["strategy_data_shard"] = lambda: shard
        parallelize = self._parallelize if self.others else None
        return replace(context, axes=layout.owned_by(base.name), parallelize=parallelize, base=self._led)

    def _parallelize(self, module: Any) -> None:
        self._applied = True
        for _, plugin in self.others:
            plugin.strategy_parallelize(module=module)
