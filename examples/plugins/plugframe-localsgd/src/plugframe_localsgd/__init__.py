"""Local SGD and DiLoCo: ranks train independently and average their parameters every few steps."""

from plugframe import Option, Plugin


def _options(sync_every: int, outer_lr: float, outer_momentum: float) -> tuple[Option, ...]:
    return (
        Option(
            "sync_every", int, sync_every, "Optimizer steps per round; parameters are averaged after each.", minimum=1
        ),
        Option("outer_lr", float, outer_lr, "Learning rate of the outer optimizer; 1 takes the average.", above=0),
        Option("outer_momentum", float, outer_momentum, "Nesterov momentum of the outer optimizer.", minimum=0),
    )


local_sgd = Plugin(
    factory="plugframe_localsgd.strategy:LocalSGD",
    summary="Ranks train independently; parameters are averaged every few steps (local SGD).",
    options=_options(8, 1.0, 0.0),
    # Gradients are not communicated, so they differ between ranks.
    provides=("local-gradients",),
    needs={"collective": ("process-group",)},
)
diloco = Plugin(
    factory="plugframe_localsgd.strategy:DiLoCo",
    summary="Local SGD with an outer optimizer with momentum (DiLoCo).",
    options=_options(50, 0.7, 0.9),
    provides=("local-gradients",),
    needs={"collective": ("process-group",)},
)
