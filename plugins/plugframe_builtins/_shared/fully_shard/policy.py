"""The dtypes in which parameters are all-gathered and gradients reduced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from plugframe.errors import SettingError, closest
from plugframe.hooks import Dtypes

_FIELDS = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")


def check_policy(policy: Any) -> None:
    """Raise if `policy` is not a mixed precision policy.

    Raises:
        SettingError: with the accepted values.
    """
    if policy is None or isinstance(policy, MixedPrecisionPolicy):
        return
    if not isinstance(policy, Mapping):
        raise SettingError(f"mp_policy={policy!r} of strategy 'fsdp' must be a MixedPrecisionPolicy or a dict.")
    for name, value in policy.items():
        if name not in _FIELDS:
            raise SettingError(f"mp_policy of strategy 'fsdp' has no {name!r}.{closest(name, _FIELDS)}")
        if name.endswith("dtype"):
            _dtype(name, value)


def check_switches(strategy: str, reshard_after_forward: Any, compile: Any) -> None:
    """Raise if an option has a wrong type.

    Raises:
        SettingError: with the accepted values.
    """
    if reshard_after_forward is not None and not isinstance(reshard_after_forward, int):
        raise SettingError(
            f"reshard_after_forward={reshard_after_forward!r} of strategy {strategy!r} must be True, False or a "
            "number of ranks."
        )
    if not isinstance(compile, (bool, Mapping)):
        raise SettingError(
            f"compile={compile!r} of strategy {strategy!r} must be True, False or a dict of arguments of torch.compile."
        )


def make_policy(policy: MixedPrecisionPolicy | Mapping[str, Any] | None, dtypes: Dtypes) -> MixedPrecisionPolicy:
    """Return a precision's policy, overridden by `policy`.

    Where a precision computes in a dtype other than the parameters', parameters are gathered in the compute dtype and
    gradients are reduced in the parameters' dtype.
    """
    if isinstance(policy, MixedPrecisionPolicy):
        return policy
    own = MixedPrecisionPolicy()
    if dtypes.compute != dtypes.parameter:
        own = MixedPrecisionPolicy(param_dtype=dtypes.compute, reduce_dtype=dtypes.parameter)
    given: dict[str, Any] = {}
    for name, value in (policy or {}).items():
        given[name] = _dtype(name, value) if name.endswith("dtype") else value
    return replace(own, **given)


def _dtype(name: str, value: Any) -> torch.dtype | None:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if (dtype is not None and not isinstance(dtype, torch.dtype)) or (dtype is None and value is not None):
        raise SettingError(
            f"mp_policy of strategy 'fsdp': {name}={value!r} is not a dtype: use 'bfloat16', for example."
        )
    return dtype
