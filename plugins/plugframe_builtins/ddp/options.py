"""Options of strategy ``ddp``."""

from __future__ import annotations

from plugframe import Option

OPTIONS = (
    Option(
        "find_unused_parameters",
        bool,
        False,
        "Accepted for scripts for torch's DDP: forwards may leave parameters out.",
    ),
    Option("static_graph", bool, False, "Accepted for scripts for torch's DDP: has no effect."),
    Option("gradient_as_bucket_view", bool, False, "Keep gradients in the communication buffers, saving their size."),
    Option("bucket_cap_mb", int, None, "Size of a communication buffer in MiB; torch's is 25.", above=0),
    Option("broadcast_buffers", bool, True, "Broadcast rank 0's buffers after each optimizer step."),
    Option("timeout_s", float, None, "Seconds a gradient exchange may take, in a group of its own.", above=0),
    Option("gradient_compression", str, None, "Send gradients approximately.", ("fp16", "bf16", "powersgd")),
    Option("sync_batchnorm", bool, False, "Normalise over the batches of all ranks; on accelerators only."),
)
