"""Fault-tolerant data parallelism on torchft."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_torchft.strategy:TorchFT",
    summary="Data parallelism over replicas of one rank each that die and come back, by torchft.",
    ranks="one",
    requires=("torchft",),
    extra="plugframe-torchft[torchft]",
    options=(
        Option("replica", int, 0, "Number of this replica, from 0.", minimum=0),
        Option("num_replicas", int, 1, "Replicas that share the data.", minimum=1),
        Option("min_replicas", int, 1, "Replicas without which no step is made.", minimum=1),
        Option("lighthouse", str, None, "Address of torchft_lighthouse; by default TORCHFT_LIGHTHOUSE."),
        Option("timeout_s", float, 60.0, "Seconds after which a replica that does not answer counts as dead.", above=0),
    ),
)
