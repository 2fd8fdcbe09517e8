"""docs/migration.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from plugframe import Lite

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
#: Public names of `accelerate.Accelerator` 1.15.
ACCELERATOR = [
    "split_between_processes",
    "on_main_process",
    "on_local_main_process",
    "on_last_process",
    "on_process",
    "on_local_process",
    "main_process_first",
    "local_main_process_first",
    "no_sync",
    "trigger_sync_in_backward",
    "accumulate",
    "join_uneven_inputs",
    "print",
    "prepare",
    "prepare_model",
    "deepspeed_ulysses_dl_adapter",
    "prepare_data_loader",
    "prepare_optimizer",
    "prepare_scheduler",
    "backward",
    "set_trigger",
    "check_trigger",
    "unscale_gradients",
    "clip_grad_norm_",
    "clip_grad_value_",
    "gather",
    "gather_for_metrics",
    "reduce",
    "pad_across_processes",
    "unwrap_model",
    "wait_for_everyone",
    "init_trackers",
    "get_tracker",
    "log",
    "end_training",
    "save",
    "save_model",
    "register_save_state_pre_hook",
    "save_state",
    "register_load_state_pre_hook",
    "load_state",
    "free_memory",
    "clear",
    "get_state_dict",
    "register_for_checkpointing",
    "maybe_context_parallel",
    "autocast",
    "profile",
    "skip_first_batches",
    "verify_device_map",
    "lomo_backward",
    "deepspeed_plugin",
    "use_distributed",
    "multi_device",
    "distributed_type",
    "num_processes",
    "process_index",
    "local_process_index",
    "device",
    "split_batches",
    "dispatch_batches",
    "even_batches",
    "use_seedable_sampler",
    "non_blocking",
    "use_stateful_dataloader",
    "project_dir",
    "logging_dir",
    "save_iteration",
    "is_main_process",
    "is_local_main_process",
    "is_last_process",
    "mixed_precision",
    "is_fsdp2",
    "is_composable_parallelism_enabled",
    "parallelism_config",
    "torch_device_mesh",
    "should_save_model",
    "tensor_parallel_rank",
    "pipeline_parallel_rank",
    "context_parallel_rank",
    "data_parallel_rank",
    "data_parallel_shard_rank",
    "sync_gradients",
    "gradient_accumulation_steps",
    "optimizer_step_was_skipped",
    "fp8_backend",
]


def test_every_method_that_the_page_names_exists() -> None:
    """What stands after `lite.` or `fabric.` is an attribute of `Lite`."""
    named = set(re.findall(r"\b(?:lite|fabric)\.([a-z_]+)\(?", PAGE)) - {"utilities", "strategies", "plugins"}
    missing = {name for name in named if not hasattr(Lite, name) and name not in ("plan", "is_wrapped")}
    assert not missing


def test_every_name_of_accelerate_is_in_the_table() -> None:
    """Each public name of `Accelerator` has its line."""
    section = PAGE[PAGE.index("Every public name of `Accelerator`") : PAGE.index("## Scripts for raw DDP")]
    first_column = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    words = set(re.findall(r"\w+", first_column))
    assert not [name for name in ACCELERATOR if name not in words]
