"""Test at set-up, on tiny copies, whether an optimizer updates a flat tensor as it updates the parameters in it.

Under DeepSpeed an optimizer updates pieces of flat tensors that hold many parameters. This equals one process
only if every element is updated independently, and only through ``param_groups``. Optimizers that scale by a norm of
each parameter (LARS, LAMB), factor a matrix (Adafactor, Shampoo, Muon), or step through a parameter list of their own
do not qualify; since users write their own, a list of names would not be enough.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from plugframe.errors import UnsupportedError
from plugframe_builtins.deepspeed.library import library

#: torch's elementwise optimizers, which need no trial.
_ELEMENTWISE = (SGD, ASGD, Adadelta, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)
#: Largest size of a dimension in the trial.
_SIZE = 3
_STEPS = 3
#: Attributes of an optimizer that hold parameters by torch's rules, and hooks, which must not run in a trial.
_OWN = ("param_groups", "state", "defaults")
_INSTEAD = "use strategy='ddp', or an optimizer that treats every element by itself, such as SGD or AdamW"


def check_elementwise(optimizer: Optimizer, *, num_parts: int, apart: bool) -> None:
    """Raise if an optimizer updates flat tensors differently from their parameters.

    Args:
        optimizer: the user's optimizer; it is not changed.
        num_parts: number of shards of a flat tensor.
        apart: whether groups are stepped one after another (stage 3).

    Raises:
        UnsupportedError: with its class, and the attribute that refers to parameters if there is one.
    """
    cls = type(optimizer)
    if isinstance(optimizer, LBFGS):
        raise UnsupportedError(
            f"{cls.__name__} evaluates a closure several times in a step, with sums over all parameters (its attribute "
            f"'_params'), which strategy 'deepspeed' cannot: {_INSTEAD}."
        )
    if cls in _ELEMENTWISE or _is_deepspeeds(optimizer):
        return
    held = next(references(optimizer), None)
    try:
        with _own_random(optimizer):
            reason = _difference(optimizer, num_parts=num_parts, apart=apart)
    except Exception as error:  # noqa: BLE001 - the optimizer is the user's: anything may happen in it
        reason = f"its step() by itself fails on small tensors: {type(error).__name__}: {error}"
    if reason is None:
        return
    where = f" Its attribute {held!r} refers to parameters by itself." if held else ""
    raise UnsupportedError(
        f"{cls.__name__} cannot update the flat tensors in which strategy 'deepspeed' keeps parameters: "
        f"{reason}.{where} {_INSTEAD[0].upper()}{_INSTEAD[1:]}."
    )


def _is_deepspeeds(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is one of DeepSpeed's own, which cannot be copied."""
    if not type(optimizer).__module__.startswith(("deepspeed.", "apex.")):
        return False
    return bool(library("runtime.zero.utils").is_zero_supported_optimizer(optimizer))


def references(optimizer: Optimizer) -> Iterator[str]:
    """Yield the paths of attributes that refer to the optimizer's parameters, outside of its groups and state."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    seen: set[int] = {id(optimizer.param_groups), id(optimizer.state)}

    def refers(value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in held
        if id(value) in seen:
            return isinstance(value, list) and value is optimizer.param_groups
        seen.add(id(value))
        if isinstance(value, Optimizer):
            return any(map(refers, vars(value).values()))
        if isinstance(value, Mapping):
            return any(refers(item) for pair in value.items() for item in pair)
        return isinstance(value, (list, tuple, set)) and any(map(refers, value))

    for name, value in vars(optimizer).items():
        if name not in _OWN and refers(value):
            yield name


def own_lists(optimizer: Optimizer) -> list[list[Any]]:
    """Return the optimizer's lists, besides its groups, that hold exactly the parameters it trains.

    Many optimizers step through such a list; DeepSpeed's flat tensors replace the parameters there during a step.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    return [
        value
        for name, value in vars(optimizer).items()
        if name not in _OWN and type(value) is list and value and {id(item) for item in value} == trained
    ]


def _own_random(optimizer: Optimizer) -> Any:
    device = next(p for group in optimizer.param_groups for p in group["params"]).device
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")


def _difference(optimizer: Optimizer, *, num_parts: int, apart: bool) -> str | None:
    """Return how steps on flat tensors differ from those on parameters, None if they are equal."""
    expected = _Copy(optimizer)
    groups = [number for number, pieces in enumerate(expected.trained) if pieces]
    flats = [torch.cat([p.detach().reshape(-1) for p in expected.trained[number]]) for number in groups]
    parts = [_Copy(optimizer) for _ in range(num_parts)]
    own = [part.flatten(groups, index, num_parts) for index, part in enumerate(parts)]
    gradients = [_gradients(flat, expected.trained[number]) for number, flat in zip(groups, flats, strict=True)]
    for turn in range(_STEPS):
        for number, gradient in zip(groups, gradients, strict=True):
            expected.fill(number, gradient * (turn + 1))
        expected.optimizer.step()
        for index, (part, flat) in enumerate(zip(parts, own, strict=True)):
            for tensor, gradient in zip(flat, gradients, strict=True):
                tensor.grad = _share(gradient * (turn + 1), index, num_parts)
            part.step(groups, flat, apart=apart)
    for place, number in enumerate(groups):
        wanted = torch.cat([p.detach().reshape(-1) for p in expected.trained[number]])
        got = torch.cat([flat[place].detach() for flat in own])[: wanted.numel()]
        if not torch.allclose(got, wanted, rtol=1e-4, atol=1e-6):
            moved = not torch.equal(got, flats[place])
            return (
                "on a part of them it takes another step than on the parameters themselves"
                if moved
                else "it does not step on what param_groups hold then"
            )
    return None


def _gradients(flat: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """Return a gradient with different magnitudes per parameter and per element."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.cat([torch.full((p.numel(),), 3.0 ** (number % 4 - 1)) for number, p in enumerate(pieces)])
    return (torch.randn(flat.numel(), generator=generator) * scales).to(flat)


def _share(flat: Tensor, index: int, num_parts: int) -> Tensor:
    """Return one of equal shards of a flat tensor, padded with zeros."""
    size = -(-flat.numel() // num_parts)
    return nn.functional.pad(flat, (0, size * num_parts - flat.numel()))[index * size : (index + 1) * size].clone()


class _Copy:
    """A copy of an optimizer over tiny parameters.

    Attributes:
        optimizer: the copy.
        trained: its trained parameters, by group.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        memo: dict[int, Any] = {}
        generator = torch.Generator().manual_seed(0)
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if id(parameter) not in memo:
                memo[id(parameter)] = _tiny(parameter, generator)
        memo[id(optimizer.state)] = defaultdict(dict)
        self.optimizer: Optimizer = _copied(optimizer, memo)
        for group in self.optimizer.param_groups:
            if "lr" in group:
                group["lr"] = 0.01  # schedules may begin with 0, where all optimizers agree
        self._lists = own_lists(self.optimizer)
        self.trained = [[p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups]

    def fill(self, number: int, gradient: Tensor) -> None:
        """Set the gradients of a group's parameters."""
        sizes = [parameter.numel() for parameter in self.trained[number]]
        for parameter, piece in zip(self.trained[number], torch.split(gradient, sizes), strict=True):
            parameter.grad = piece.clone().reshape(parameter.shape)

    def flatten(self, groups: Sequence[int], index: int, num_parts: int) -> list[nn.Parameter]:
        """Replace each group's parameters by a flat shard; return the shards."""
        made = []
        for number in groups:
            flat = torch.cat([p.detach().reshape(-1) for p in self.trained[number]])
            made.append(nn.Parameter(_share(flat, index, num_parts)))
        self.optimizer.param_groups[:] = [self.optimizer.param_groups[number] for number in groups]
        self._point(made)
        return made

    def _point(self, flat: Sequence[nn.Parameter | None]) -> None:
        for group, tensor in zip(self.optimizer.param_groups, flat, strict=True):
            group["params"] = [] if tensor is None else [tensor]
        for own in self._lists:
            own[:] = [tensor for tensor in flat if tensor is not None]

    def step(self, groups: Sequence[int], flat: Sequence[nn.Parameter], *, apart: bool) -> None:
        """Step as DeepSpeed does."""
        if not apart:
            self.optimizer.step()
            return
        for place in range(len(groups)):
            self._point([tensor if number == place else None for number, tensor in enumerate(flat)])
            self.optimizer.step()


def _tiny(parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    values = torch.randn([min(size, _SIZE) for size in shape], generator=generator)
    return nn.Parameter(values.to(parameter.device, torch.float32), parameter.requires_grad)


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Return a copy with all attributes: copying a torch optimizer drops those of its subclass."""
    pairs = []
    for each in _nested(optimizer):
        memo[id(each)] = type(each).__new__(type(each))
        pairs.append((each, memo[id(each)]))
        memo.setdefault(id(each.state), defaultdict(dict))
    for each, made in pairs:
        # A scheduler has replaced step on the instance by one that holds the original.
        kept = {key: value for key, value in vars(each).items() if key != "step" and not key.startswith("_plugframe")}
        for key in kept:
            if key.startswith("_optimizer_"):  # hooks
                kept[key] = OrderedDict()
        made.__dict__.update(copy.deepcopy(kept, memo))
    copied: Optimizer = memo[id(optimizer)]
    return copied


def _nested(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer and those nested in it."""
    found: list[Optimizer] = []

    def walk(value: Any, depth: int) -> None:
        if isinstance(value, Optimizer):
            if all(value is not each for each in found):
                found.append(value)
                walk(list(vars(value).values()), depth)
        elif isinstance(value, (list, tuple)) and depth < 4:
            for item in value:
                walk(item, depth + 1)
        elif isinstance(value, dict) and depth < 4:
            walk(list(value.values()), depth)

    walk(optimizer, 0)
    return found
