"""A ring of TCP connections as a torch.distributed backend in pure Python."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_ringgather.collective:RingCollective",
    summary="A ring: each rank communicates with its two neighbours only (a c10d backend in pure Python).",
    devices=("cpu",),
    options=(
        Option("timeout_s", float, None, "Timeout of a collective in seconds; unset: --timeout, else 1800.", above=0),
        Option("interface", str, None, "Address at which a rank listens for its neighbour; unset: the host's."),
    ),
    # It is a torch.distributed process group: code built on process groups runs over it.
    provides=("process-group",),
)
