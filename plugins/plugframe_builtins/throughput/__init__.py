"""Log samples and tokens per second, the part of the device's peak, and its memory."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.throughput.extension:Throughput",
    summary="Adds samples/s, tokens/s, the part of the device's peak (MFU) and memory to what the script logs.",
    options=(
        Option(
            "flops_per_sample",
            float,
            0.0,
            "Operations of a training step per sample, for MFU; 0: six per parameter and token, if there are tokens.",
            minimum=0,
        ),
        Option("peak_flops", float, 0.0, "Operations per second of one device at its peak; 0: as known.", minimum=0),
    ),
)
