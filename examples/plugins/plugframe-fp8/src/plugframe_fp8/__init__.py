"""fp8, emulated on any device: linear layers see 8-bit numbers, forward and backward."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_fp8.precision:Fp8Mixed",
    summary="Linear layers in scaled fp8 (emulated), all else as bf16-mixed; parameters in float32.",
    options=(
        Option(
            "gradients",
            str,
            "e5m2",
            "Format of the gradients that enter a linear layer's backward: range or accuracy.",
            choices=("e5m2", "e4m3"),
        ),
    ),
)
