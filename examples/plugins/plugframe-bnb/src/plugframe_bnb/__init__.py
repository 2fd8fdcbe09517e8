"""Weights in 4 bits by bitsandbytes, with adapters that train."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_bnb.precision:NF4",
    summary="Frozen linear layers in 4 bits (nf4) by bitsandbytes, each with a low-rank adapter that trains.",
    provides=("replaces-modules",),
    requires=("bitsandbytes",),
    extra="plugframe-bnb[bitsandbytes]",
    options=(
        Option("rank", int, 8, "Rank of the adapters.", minimum=1),
        Option("alpha", float, 16.0, "Scale of the adapters, divided by their rank.", above=0),
        Option("skip", list[str], [], "Linear layers to leave alone: words that their names contain, such as lm_head."),
    ),
)
