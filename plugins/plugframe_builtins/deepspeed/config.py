"""DeepSpeed's configuration: from named options, with a raw one merged over them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plugframe.errors import SettingError, UnsupportedError
from plugframe.hooks import Dtypes

Config = dict[str, Any]

#: Sections and keys that plugframe or the script controls, with what to use instead.
_ELSEWHERE = {
    "optimizer": "make a torch optimizer in the script and pass it to lite.setup()",
    "scheduler": "make a torch scheduler in the script",
    "train_batch_size": "set it in the DataLoader",
    "train_micro_batch_size_per_gpu": "set it in the DataLoader",
    "managed_gradient_accumulation": "accumulate with lite.no_backward_sync()",
    "torch_autocast": "choose the precision, as with precision='bf16-mixed'",
    "amp": "choose the precision, as with precision='16-mixed'",
    "pipeline": "there is no pipeline under this strategy",
    "tensor_parallel": "use strategy='tensor_parallel'",
    "sequence_parallel_size": "there is no sequence parallelism under this strategy",
    "data_parallel_size": "it is the number of ranks, --devices",
    "elasticity": "use --num-nodes and --max-restarts",
    "autotuning": "it starts processes of its own",
    "hybrid_engine": "there is no hybrid engine under this strategy",
    "compile": "use torch.compile on the module",
    "data_efficiency": "set it in the DataLoader",
    "curriculum_learning": "set it in the DataLoader",
    "dump_state": "use --dry-run",
}
#: DeepSpeed's section for each dtype of the arithmetic.
_SECTION = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The named options; None if not given."""

    stage: int = 2
    offload_optimizer: str | None = None
    offload_params: str | None = None
    nvme_path: str | None = None
    reduce_bucket_size: int | None = None
    allgather_bucket_size: int | None = None
    overlap_comm: bool | None = None
    param_persistence_threshold: int | None = None
    prefetch_bucket_size: int | None = None
    sub_group_size: int | None = None
    zero_hpz_partition_size: int | None = None

    def check(self) -> None:
        """Raise for options without effect.

        Raises:
            SettingError: with the option to change.
        """
        for name, least in _LEAST_STAGE.items():
            value = getattr(self, name)
            if value not in (None, False) and self.stage < least:
                raise SettingError(
                    f"{name}={value!r} of strategy 'deepspeed' has no effect in stage {self.stage}: leave it out, or "
                    f"use stage={least}."
                )
        if self.offload_optimizer == "nvme" and self.stage < 3:
            raise SettingError("offload_optimizer='nvme' of strategy 'deepspeed' needs stage=3; 'cpu' works from 1 on.")
        if self.nvme_path is not None and "nvme" not in (self.offload_optimizer, self.offload_params):
            raise SettingError(
                f"nvme_path={self.nvme_path!r} of strategy 'deepspeed' has no effect: nothing is offloaded to 'nvme'."
            )


_LEAST_STAGE = {
    "offload_optimizer": 1,
    "offload_params": 3,
    "reduce_bucket_size": 1,
    "allgather_bucket_size": 1,
    "overlap_comm": 2,
    "param_persistence_threshold": 3,
    "prefetch_bucket_size": 3,
    "sub_group_size": 3,
    "zero_hpz_partition_size": 3,
}
#: DeepSpeed's names of the options of stage 3.
_STAGE_3 = {
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "sub_group_size": "sub_group_size",
    "zero_hpz_partition_size": "zero_hpz_partition_size",
}


def read_raw(config: Mapping[str, Any] | str | Path | None) -> Config:
    """Return a raw configuration from a mapping or a JSON file.

    Raises:
        SettingError: if the file is missing or holds no JSON object, or for a key that is set elsewhere.
    """
    if config is None:
        return {}
    if isinstance(config, (str, Path)):
        try:
            raw = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise SettingError(
                f"config={str(config)!r} of strategy 'deepspeed' is not a JSON file: {error}."
            ) from error
    else:
        raw = copy.deepcopy(dict(config)) if isinstance(config, Mapping) else config
    if not isinstance(raw, dict):
        raise SettingError(f"config={config!r:.60} of strategy 'deepspeed' must be a mapping or a path to a JSON file.")
    _check_raw(raw)
    return raw


def _check_raw(raw: Config) -> None:
    for key, instead in _ELSEWHERE.items():
        if key in raw:
            raise SettingError(f"config[{key!r}] of strategy 'deepspeed' is not used: {instead}, and leave it out.")
    if raw.get("gradient_accumulation_steps", 1) != 1:
        raise SettingError(
            f"config['gradient_accumulation_steps']={raw['gradient_accumulation_steps']!r} of strategy 'deepspeed' "
            "must be 1: accumulate with lite.no_backward_sync(model)."
        )
    for path, value in _walk(raw):
        if value == "auto":
            raise SettingError(f"config[{path!r}]='auto' of strategy 'deepspeed': write the value, or leave it out.")


def _walk(raw: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in raw.items():
        found += _walk(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def final_config(options: Options, raw: Config, dtypes: Dtypes | None, precision: str = "") -> Config:
    """Return DeepSpeed's configuration: the named options, overridden by `raw`.

    Args:
        dtypes: of the precision; None if not resolved yet.
        precision: its name, for messages.

    Raises:
        SettingError: if `raw` contradicts the precision, or lacks settings for offloading.
        UnsupportedError: for a precision that this stage does not support.
    """
    config = _from_options(options)
    if dtypes is not None:
        config = merged(config, _from_precision(dtypes, precision))
        _check_precision(raw, dtypes, precision)
    config = merged(config, raw)
    zero = config["zero_optimization"]
    if zero["stage"] not in (0, 1, 2, 3):
        raise SettingError(f"config['zero_optimization.stage']={zero['stage']!r} must be 0, 1, 2 or 3.")
    if zero["stage"] < 2 and zero.get("overlap_comm"):
        raise SettingError(
            f"config['zero_optimization.overlap_comm']=True has no effect in stage {zero['stage']}: leave it out."
        )
    if zero["stage"] == 0 and dtypes is not None and dtypes.compute in _SECTION:
        raise UnsupportedError(
            f"stage=0 of strategy 'deepspeed' trains in float32, and precision={precision!r} was asked for: use "
            "stage=1, or strategy='ddp'."
        )
    _check_nvme(zero)
    return config


def _check_nvme(zero: Config) -> None:
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section) or {}
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            raise SettingError(
                f"{section} to NVMe needs a folder on the disk: use DeepSpeed(stage=3, offload_optimizer='nvme', "
                "offload_params='nvme', nvme_path='/local_nvme')."
            )


def _from_options(options: Options) -> Config:
    stage = options.stage
    zero: Config = {"stage": stage}
    if stage < 2:
        zero["overlap_comm"] = False
    elif options.overlap_comm is not None:
        zero["overlap_comm"] = options.overlap_comm
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if getattr(options, name) is not None:
            zero[name] = getattr(options, name)
    if stage == 3:
        # It replaces a torch function permanently.
        zero["memory_efficient_linear"] = False
        values = {key: getattr(options, name) for name, key in _STAGE_3.items()}
        zero.update({key: value for key, value in values.items() if value is not None})
    for name, section in (("offload_optimizer", "offload_optimizer"), ("offload_params", "offload_param")):
        device = getattr(options, name)
        if device is not None:
            zero[section] = {"device": device}
            if device == "nvme" and options.nvme_path is not None:
                zero[section]["nvme_path"] = str(options.nvme_path)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's own default clips to a norm of 1.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _from_precision(dtypes: Dtypes, precision: str) -> Config:
    pair = (dtypes.parameter, dtypes.compute)
    if pair == (torch.float32, torch.float32):
        return {}
    if pair == (torch.bfloat16, torch.bfloat16):
        return {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    section = _SECTION.get(dtypes.compute)
    if section is None or dtypes.parameter is not torch.float32:
        raise UnsupportedError(
            f"precision={precision!r} has parameters in {dtypes.parameter} and computes in {dtypes.compute}, which "
            "strategy 'deepspeed' does not: use precision='bf16-mixed' or '32-true', or strategy='fsdp'."
        )
    # Micro-batches are accumulated in full precision.
    return {section: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def _check_precision(raw: Config, dtypes: Dtypes, precision: str) -> None:
    wanted = _SECTION.get(dtypes.compute)
    for section, names in (("bf16", "'bf16-mixed'"), ("fp16", "'16-mixed'")):
        asked = raw.get(section)
        enabled = asked.get("enabled", False) if isinstance(asked, Mapping) else bool(asked)
        if enabled and section != wanted:
            raise SettingError(
                f"config['{section}.enabled']=True contradicts precision={precision!r}: use precision={names}, and "
                "leave it out."
            )
        if asked and not enabled and section == wanted and "enabled" in asked:
            raise SettingError(
                f"config['{section}.enabled']=False contradicts precision={precision!r}: leave it out, or use "
                "precision='32-true'."
            )


def merged(below: Config, above: Mapping[str, Any]) -> Config:
    """Return `below` recursively updated with `above`."""
    result = dict(below)
    for key, value in above.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return result


def lines(config: Config) -> list[str]:
    """Return the configuration as lines, one per top-level key."""
    return [f"{key}: {json.dumps(value, sort_keys=True, default=str)}" for key, value in config.items()]
