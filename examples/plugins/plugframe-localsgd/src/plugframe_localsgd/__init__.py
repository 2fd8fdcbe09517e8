"""Local SGD and DiLoCo: ranks train by themselves and average their parameters every few steps."""

from plugframe import Option, Plugin


def _options(sync_every: int, outer_lr: float, outer_momentum: float) -> tuple[Option, ...]:
    return (
        Option(
            "sync_every", int, sync_every, "Optimizer steps of a round, after which parameters are averaged.", minimum=1
        ),
        Option("outer_lr", float, outer_lr, "How far to go to the average, or beyond it: 1 is all the way.", above=0),
        Option("outer_momentum", float, outer_momentum, "Nesterov's momentum from round to round.", minimum=0),
    )


local_sgd = Plugin(
    factory="plugframe_localsgd.strategy:LocalSGD",
    summary="Ranks train by themselves; their parameters are averaged every few steps (local SGD).",
    options=_options(8, 1.0, 0.0),
    # Gradients differ between ranks: that is what it saves.
    provides=("local-gradients",),
    needs={"collective": ("process-group",)},
)
diloco = Plugin(
    factory="plugframe_localsgd.strategy:DiLoCo",
    summary="Local SGD whose averages are the steps of an outer optimizer with momentum (DiLoCo).",
    options=_options(50, 0.7, 0.9),
    provides=("local-gradients",),
    needs={"collective": ("process-group",)},
)
