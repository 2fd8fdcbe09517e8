"""Run torch's own step, ``zero_grad`` and loader iteration without what serves profilers only, while there is none.

Torch labels these calls with ``record_function``, which goes through the Python dispatcher: 8 to 10 µs each, whether
or not a profiler runs. Here torch's C++ class makes the label, for observers that are no profiler of this thread, and
the call is torch's own whenever a profiler runs, a hook is registered or code is compiled.

This is a hack, since it looks into torch's functions (2.11 to 2.14): one that is not as known stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import _C
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.utils.data import dataloader as torch_dataloader

# `from torch.optim import optimizer` is unknown to type checkers.
_torch_optimizer: Any = sys.modules[Optimizer.__module__]
_Label: Any = getattr(getattr(_C, "_profiler", None), "_RecordFunctionFast", None)
_global_pre_hooks: Any = getattr(_torch_optimizer, "_global_optimizer_pre_hooks", None)
_global_post_hooks: Any = getattr(_torch_optimizer, "_global_optimizer_post_hooks", None)

#: All names in the code of torch's wrapper of a step that labels it and runs its hooks.
_STEP_NAMES = """
cast Optimizer __class__ __name__ torch autograd profiler record_function chain _global_optimizer_pre_hooks values
_optimizer_step_pre_hooks isinstance tuple len RuntimeError _optimizer_step_code _optimizer_step_post_hooks
_global_optimizer_post_hooks
"""
#: In that of torch's decorator of most steps, which sets the gradient mode.
_GRADIENT_MODE_NAMES = """
torch._dynamo cast Optimizer is_grad_enabled set_grad_enabled defaults _dynamo graph_break
"""
#: In that of the loader's iteration.
_NEXT_NAMES = """
torch autograd profiler record_function _profile_name _sampler_iter _reset _next_data _num_yielded _dataset_kind
_DatasetKind Iterable _IterableDataset_len_called _dataset _num_workers warnings warn
"""


def without_label(step: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the ``step`` of an optimizer class without its label, or `step` itself if it is not torch's as known.

    Args:
        name: name of the optimizer's class.
    """
    labelled = _body(step, _STEP_NAMES)
    if labelled is None or _Label is None:
        return step
    inner = _body(labelled, _GRADIENT_MODE_NAMES)
    body = labelled if inner is None else _in_gradient_mode(inner)
    label = f"Optimizer.step#{name}.step"
    pre_hooks, post_hooks = _global_pre_hooks, _global_post_hooks

    @functools.wraps(step)
    def quick(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            is_compiling()
            or _profiler_enabled()
            or pre_hooks
            or post_hooks
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
        ):
            return step(self, *args, **kwargs)
        with _Label(label):
            return body(self, *args, **kwargs)

    return quick


def _in_gradient_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``step`` that computes gradients only if the optimizer is differentiable, as torch's decorator does."""
    is_grad_enabled, set_grad_enabled = torch.is_grad_enabled, _C._set_grad_enabled

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = is_grad_enabled()
        set_grad_enabled(self.defaults["differentiable"])
        try:
            return step(self, *args, **kwargs)
        finally:
            set_grad_enabled(before)

    return run


def zero_grad_without_label(zero_grad: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the ``zero_grad`` of an optimizer class without its label, or `zero_grad` itself if it is not torch's.

    Args:
        name: name of the optimizer's class.
    """
    if zero_grad is not Optimizer.zero_grad or _Label is None:
        return zero_grad
    label = f"Optimizer.zero_grad#{name}.zero_grad"

    @functools.wraps(zero_grad)
    def quick(self: Any, set_to_none: bool = True) -> None:
        if not set_to_none or is_compiling() or _profiler_enabled():
            zero_grad(self, set_to_none)
            return
        with _Label(label):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad = None

    return quick


def iterator_without_label(iterator: Iterator[Any]) -> Iterator[Any]:
    """Return an iterator over the rest of a loader's pass without its label, or `iterator` itself if it is not torch's.

    Over a stream it is torch's own, which compares the length of the stream with the batches read.
    """
    base: Any = torch_dataloader._BaseDataLoaderIter
    if (
        _Label is None
        or getattr(type(iterator), "__next__", None) is not base.__next__
        or not _uses(base.__next__, _NEXT_NAMES)
        or getattr(iterator, "_dataset_kind", None) != torch_dataloader._DatasetKind.Map
    ):
        return iterator
    return _Unlabelled(iterator)


class _Unlabelled:
    """The rest of a pass over a map-style loader."""

    __slots__ = ("_iterator", "_label")

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self._label = iterator._profile_name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        iterator = self._iterator
        if _profiler_enabled():
            return next(iterator)
        with _Label(self._label):
            if iterator._sampler_iter is None:
                iterator._reset()
            data = iterator._next_data()
            iterator._num_yielded += 1
            return data


def _body(function: Any, names: str) -> Any:
    """Return what one of torch's decorators of a step wraps; None if `function` is not made by it."""
    known = getattr(function, "__globals__", None) is vars(_torch_optimizer) and _uses(function, names)
    return getattr(function, "__wrapped__", None) if known else None


def _uses(function: Any, names: str) -> bool:
    """Return whether the code of a function uses exactly these names: whether it is the one that is known."""
    return set(function.__code__.co_names) == set(names.split())
