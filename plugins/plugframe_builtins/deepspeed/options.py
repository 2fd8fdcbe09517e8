"""Options of strategy ``deepspeed``."""

from __future__ import annotations

from plugframe import Option

_PLACES = ("cpu", "nvme")
OPTIONS = (
    Option("stage", int, 2, "Sharded: 1 optimizer state, 2 also gradients, 3 also parameters.", (0, 1, 2, 3)),
    Option("offload_optimizer", str, None, "Location of the optimizer's state (nvme: stage 3).", _PLACES),
    Option("offload_params", str, None, "Location of parameters (stage 3).", _PLACES),
    Option("nvme_path", str, None, "The folder for what is offloaded to nvme."),
    Option("reduce_bucket_size", int, None, "Elements of gradients averaged at once.", minimum=1),
    Option("allgather_bucket_size", int, None, "Elements of parameters gathered at once.", minimum=2),
    Option("overlap_comm", bool, None, "Average gradients during backward (from stage 2 on)."),
    Option("param_persistence_threshold", int, None, "Smaller parameters stay gathered (stage 3).", minimum=0),
    Option("prefetch_bucket_size", int, None, "Elements gathered ahead (stage 3).", minimum=0),
    Option("sub_group_size", int, None, "Elements updated at once (stage 3).", minimum=1),
    Option("zero_hpz_partition_size", int, None, "Ranks that hold a second copy of parameters (stage 3).", minimum=1),
    Option("config", str, None, "A JSON file, DeepSpeed's own configuration, overrides the other options."),
    Option("shared_memory_op", bool, False, "Compile DeepSpeed's own communication, for inference on a CPU."),
    Option("build_timeout_s", float, 600.0, "Seconds to wait for another process that compiles.", above=0),
)
