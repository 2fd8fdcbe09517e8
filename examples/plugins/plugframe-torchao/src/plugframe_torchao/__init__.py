"""Precisions of torchao."""

from typing import Any

from plugframe import Option, Plugin

#: Linear layers whose names contain one of these words stay as they are.
SKIP = Option("skip", list[str], [], "Linear layers to leave alone: words that their names contain, such as lm_head.")
COMMON: dict[str, Any] = {"requires": ("torchao",), "options": (SKIP,)}

fp8 = Plugin(
    factory="plugframe_torchao.precision:Float8",
    summary="Linear layers in fp8 by torchao; emulated on devices without fp8 arithmetic.",
    provides=("replaces-modules",),
    **COMMON,
)
int8 = Plugin(
    factory="plugframe_torchao.precision:Int8Mixed",
    summary="Linear layers multiply in int8 by torchao, forward and backward; weights stay in float32.",
    provides=("replaces-modules",),
    **COMMON,
)
qat = Plugin(
    factory="plugframe_torchao.precision:QuantizationAware",
    summary="Quantization-aware training by torchao: lite.finalize(model) returns integer weights.",
    provides=("replaces-modules",),
    requires=("torchao",),
    options=(
        SKIP,
        Option("bits", int, 8, "Bits of the weights.", (4, 8)),
        Option("group_size", int, 32, "Weights that share a scale.", minimum=1),
    ),
)
