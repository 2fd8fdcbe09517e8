"""Fabric's ``DeepSpeedStrategy``."""

from __future__ import annotations

from typing import Any

from plugframe.errors import SettingError
from plugframe_builtins._shared.fabric_arguments import refuse_settings, refuse_unknown
from plugframe_builtins.deepspeed.strategy import DeepSpeed

#: Options of the same name.
_SAME = ("sub_group_size", "allgather_bucket_size", "reduce_bucket_size", "overlap_comm", "nvme_path")
#: Where the others are in DeepSpeed's configuration.
_CONFIG: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("contiguous_gradients", "allgather_partitions", "reduce_scatter"), ("zero_optimization",)),
    **dict.fromkeys(("block_size", "queue_depth", "single_submit", "overlap_events", "thread_count"), ("aio",)),
    **dict.fromkeys(("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"), ("fp16",)),
    "min_loss_scale": ("fp16",),
    "partition_activations": ("activation_checkpointing",),
    "cpu_checkpointing": ("activation_checkpointing",),
    "contiguous_memory_optimization": ("activation_checkpointing",),
    "synchronize_checkpoint_boundary": ("activation_checkpointing",),
    "max_in_cpu": ("zero_optimization", "offload_param"),
    "params_buffer_count": ("zero_optimization", "offload_param"),
    "params_buffer_size": ("zero_optimization", "offload_param"),
    "optimizer_buffer_count": ("zero_optimization", "offload_optimizer"),
}
_RENAMED = {
    "params_buffer_count": "buffer_count",
    "params_buffer_size": "buffer_size",
    "optimizer_buffer_count": "buffer_count",
}
_OWN = (
    "zero_optimization",
    "stage",
    "offload_optimizer",
    "offload_parameters",
    "offload_params_device",
    "offload_optimizer_device",
    "config",
)
#: Without effect on the numbers, and without a counterpart: any optimizer is taken, nothing is logged, and every
#: checkpoint loads.
_ALWAYS = ("zero_allow_untested_optimizer", "logging_batch_size_per_gpu", "logging_level", "load_full_weights")
_JOB = ("accelerator", "parallel_devices", "cluster_environment", "precision", "process_group_backend", "timeout")


class DeepSpeedStrategy:
    """Make the strategy `DeepSpeed` from the arguments of Fabric's ``DeepSpeedStrategy``.

    Args:
        options: Fabric's. ``config`` overrides the others.
    """

    def __new__(cls, **options: Any) -> DeepSpeed:  # type: ignore[misc]
        """Return the strategy.

        Raises:
            SettingError: for an argument that is a setting of the job, or has no counterpart.
        """
        options = refuse_settings(cls.__name__, options, _JOB)
        refuse_unknown(cls.__name__, options, (*_OWN, *_SAME, *_CONFIG, *_ALWAYS))
        config = options.get("config")
        raw: dict[str, Any] = {}
        for name, path in _CONFIG.items():
            if name in options:
                place = raw
                for key in path:
                    place = place.setdefault(key, {})
                place[_RENAMED.get(name, name)] = options[name]
        if config is not None and raw:
            names = ", ".join(name for name in _CONFIG if name in options)
            raise SettingError(f"DeepSpeedStrategy(config=…) and {names}: write those into the configuration.")
        optimizer = options.get("offload_optimizer_device", "cpu") if options.get("offload_optimizer") else None
        parameters = options.get("offload_params_device", "cpu") if options.get("offload_parameters") else None
        return DeepSpeed(
            stage=options.get("stage", 2) if options.get("zero_optimization", True) else 0,
            offload_optimizer=optimizer,
            offload_params=parameters,
            config=raw or None if config is None else config,
            **{name: options[name] for name in _SAME if name in options},
        )
