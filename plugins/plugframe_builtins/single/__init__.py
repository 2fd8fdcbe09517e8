"""One rank: no parallelism and no communication."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.single.strategy:SingleRank",
    summary="One process, without parallelism.",
    ranks="one",
    priority=100,
    provides=("local-backward",),
)
collective = Plugin(
    factory="plugframe_builtins.single.one_rank:OneRank",
    summary="One process: every collective returns its own input.",
    ranks="one",
    priority=100,
)
