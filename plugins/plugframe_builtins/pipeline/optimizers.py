"""Optimizers under a pipeline: every rank steps the parameters of its own stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import LBFGS, Optimizer

from plugframe.errors import UnsupportedError
from plugframe.utils.swap import plain_class
from plugframe_builtins.pipeline.stand_in import OtherParameter, OtherStage, stand_in, tensors_of

#: Marks, in an optimizer's own ``state_dict()``, the state that other ranks have.
_ELSEWHERE = "other_stage"


def is_other(optimizer: Optimizer) -> list[bool]:
    """Return for each parameter of the optimizer, by its number, whether it is in another rank's stage."""
    return [isinstance(each, OtherParameter) for group in optimizer.param_groups for each in group["params"]]


def split_optimizer(optimizer: Optimizer) -> None:
    """Drop the state of other stages' parameters; make ``state_dict()`` raise where it is saved or copied.

    Raises:
        UnsupportedError: for LBFGS, which computes with all parameters together.
    """
    if not any(is_other(optimizer)):
        return
    if isinstance(optimizer, LBFGS):
        raise UnsupportedError(
            "LBFGS computes with all parameters together, and strategy 'pipeline' has those of a stage on each rank: "
            "use another optimizer, or strategy='ddp'."
        )
    for parameter in [key for key in optimizer.state if isinstance(key, OtherParameter)]:
        del optimizer.state[parameter]
    optimizer.register_state_dict_post_hook(_mark)
    optimizer.register_load_state_dict_pre_hook(_unmark)


def own_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's ``state_dict()`` with the entries of this rank's parameters only."""
    state = optimizer.state_dict()
    others = {number for number, other in enumerate(is_other(optimizer)) if other}
    return {**state, "state": {key: entry for key, entry in state["state"].items() if key not in others}}


def _mark(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Add an entry for each parameter of another stage, which raises when it is saved or copied."""
    entries = state["state"]
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if not entries:
        return state
    marks: dict[Any, Any] = {}
    for number, parameter in enumerate(parameters):
        if isinstance(parameter, OtherParameter):
            origin = f"the optimizer's state of {parameter.origin}"
            marks[number] = {_ELSEWHERE: stand_in(parameter, origin, parameter.home)}
    return {**state, "state": {**entries, **marks}}


def _unmark(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Leave out the entries of `_mark`."""
    entries = {
        key: entry
        for key, entry in state["state"].items()
        if not any(isinstance(tensor, OtherStage) for tensor in tensors_of(entry))
    }
    return {**state, "state": entries}


def _steps_as_torch(optimizer: Optimizer) -> bool:
    steps: type = next(cls for cls in plain_class(optimizer).__mro__ if "step" in vars(cls))
    return steps.__module__.startswith("torch.optim.")


@contextmanager
def own_parameters(optimizer: Optimizer) -> Iterator[None]:
    """Hide other stages' parameters from a step of torch's own optimizers, which treat each parameter by itself.

    Any other optimizer sees all parameters. What it computes for those of other stages has no effect; a norm over all
    of them raises.
    """
    if not _steps_as_torch(optimizer) or not any(is_other(optimizer)):
        yield
        return
    held = [list(group["params"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"][:] = [each for each in group["params"] if not isinstance(each, OtherParameter)]
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, held, strict=True):
            group["params"][:] = before
