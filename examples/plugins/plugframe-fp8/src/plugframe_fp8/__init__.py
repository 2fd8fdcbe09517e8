"""fp8, emulated on any device: linear layers compute on 8-bit numbers, forward and backward."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_fp8.precision:Fp8Mixed",
    summary="Linear layers in scaled fp8 (emulated), everything else as in bf16-mixed; parameters in float32.",
    provides=("autocast",),
    options=(
        Option(
            "gradients",
            str,
            "e5m2",
            "Format of the output gradients of linear layers: more range or more precision.",
            choices=("e5m2", "e4m3"),
        ),
    ),
)
