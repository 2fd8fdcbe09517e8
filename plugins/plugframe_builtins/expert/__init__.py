"""Expert parallelism: the experts of a mixture divided over ranks, and tokens sent to them."""

from plugframe import Axis, Option, Plugin
from plugframe_builtins._shared.sharding.options import OPTIONS

#: How a module of experts is called; see `plugframe_builtins.expert.dispatch`.
STYLES = ("modules", "grouped", "batched")

plugin = Plugin(
    factory="plugframe_builtins.expert.strategy:ExpertParallel",
    summary="The experts of a mixture divided over ranks by a plan, tokens sent to them (all-to-all).",
    provides=("sharded", "averages-axes"),
    divides="experts",
    axes=(Axis("data", samples=True, size=1, optional=True), Axis("expert", samples=True, averages=True)),
    options=(
        Option("plan", dict[str, str], None, "How each module of experts is called; unset: the model's plan.", STYLES),
        Option("mesh", dict[str, int], None, "Ranks of an axis: data=2,expert=4.", minimum=-1),
        *OPTIONS,
    ),
    needs={"collective": ("process-group",)},
    prefers={"checkpoint": ("sharded",)},
    conflicts={"precision": ("tensor-subclasses",)},
)
