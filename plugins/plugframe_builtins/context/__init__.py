"""Sequence parallelism: the tokens of a sequence divided over ranks, beside a strategy that divides the batch."""

from plugframe import Axis, Option, Plugin

_ATTENTION = ("all_to_all", "gather", "ring")

plugin = Plugin(
    factory="plugframe_builtins.context.strategy:ContextParallel",
    summary="The tokens of long sequences divided over ranks, beside fsdp or ddp.",
    divides="sequence",
    axes=(Axis("context", averages=True),),
    options=(
        Option("dim", int, 1, "Dimension of the hidden states that is the sequence.", minimum=0),
        Option("blocks", list[str], None, "Paths of the consecutive blocks that run on a part of the sequence."),
        Option("attention", str, "all_to_all", "Over heads, with gathered keys, or in a ring.", _ATTENTION),
        Option("arguments", dict[str, str], None, "Arguments of blocks to split or not.", ("split", "whole")),
        Option("check", bool, True, "Compare the first forwards with undivided ones."),
    ),
    needs={"collective": ("process-group",)},
    conflicts={"precision": ("tensor-subclasses",)},
)
