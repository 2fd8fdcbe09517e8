"""Replace references to parameters by the parameters that replaced them."""

from __future__ import annotations

import gc
import sys
import types
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from plugframe.errors import OrderError
from plugframe_builtins._shared.sharding.gradient_hooks import move_hooks
from plugframe_builtins._shared.sharding.parameter import as_sharded

#: Attribute with the name of a replaced parameter.
_NAME = "_plugframe_name"
#: References held by the (old, new) pair and by ``sys.getrefcount``.
_OWN_REFERENCES = 2
#: Up to this many objects ``gc.get_referrers`` is faster than a search of the heap.
_FEW = 64


class Replaced(nn.Parameter):
    """A parameter that was replaced at set-up: using it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        old = next((each for each in _flat(args) if isinstance(each, Replaced)), None)
        if name == "__hash__" or old is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        called = old.__dict__[_NAME]
        if name in ("__repr__", "__format__"):
            return f"<parameter {called!r}, replaced at set-up>"
        raise OrderError(
            f"This is the parameter {called!r} of before lite.setup(), which does not train: the model's parameters "
            "were sharded. Take it from the model after set-up."
        )


class OptimizerRemapping:
    """Map replaced parameters to their replacements."""

    def __init__(self) -> None:
        # An old parameter that an optimizer holds keeps its replacement alive.
        self._successor: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimizerRemapping, ()  # a strategy unpickled in another process has other parameters

    def note(
        self,
        before: Mapping[str, nn.Parameter],
        after: Mapping[str, nn.Parameter],
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        """Record replaced parameters by name: attributes, hooks and references move to the new ones.

        Lists, dicts, sets, attributes and closures are changed in place, wherever they are. Other references (a local
        variable, a C object) keep the old parameter, which raises when it is used.
        """
        replaced: dict[int, tuple[Tensor, Tensor]] = {}
        for name, old in before.items():
            new = after[name]
            if new is old or id(old) in replaced:
                continue
            self._successor[old] = new
            replaced[id(old)] = (old, new)
            vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new)})
            move_hooks(old, new)
        self.carry_over(optimizers)
        # The heap is searched only for parameters with further references: usually there are none.
        names = Counter(id(parameter) for parameter in before.values())
        held = {key: pair for key, pair in replaced.items() if sys.getrefcount(pair[0]) > names[key] + _OWN_REFERENCES}
        if held:
            _Repointing(held, ignored=(before, after, replaced, held)).run()
        for name, old in before.items():
            if id(old) in replaced and type(old) is not Replaced:
                vars(old)[_NAME] = name
                old.__class__ = Replaced

    def carry_over(self, optimizers: Iterable[Optimizer]) -> None:
        """Replace parameters in the optimizers' groups, with their state.

        Tensors in the optimizer's own lists that match a parameter and its shape (slow weights in a list of
        lists) are sharded as it is.
        """
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                held = group["params"]
                held[:] = [self._carried(optimizer, parameter) for parameter in held]
            _shard_beside(optimizer)

    def _carried(self, optimizer: Optimizer, old: Tensor) -> Tensor:
        new = self._successor.get(old, old)
        for key in dict.fromkeys((old, new)):
            if key in optimizer.state:
                optimizer.state[new] = alike(optimizer.state.pop(key), new)
        return new  # type: ignore[no-any-return]


class _Repointing:
    """Find references to old parameters through the garbage collector, and replace them.

    Args:
        replaced: old and new parameters by the old ones' id.
        ignored: containers that keep the old ones.
    """

    def __init__(self, replaced: Mapping[int, tuple[Tensor, Tensor]], ignored: tuple[Any, ...]) -> None:
        self._replaced = replaced
        own = (getattr(old, "__dict__", None) for old, _ in replaced.values())
        self._ignored = {id(each) for each in (*ignored, *replaced.values(), *own)}

    def run(self) -> None:
        for holder in self._holders():
            self._repoint(holder)

    def _holders(self) -> list[Any]:
        kinds = (type, types.FunctionType, types.CodeType, types.ModuleType, types.FrameType, Tensor)
        if len(self._replaced) <= _FEW:
            holders = gc.get_referrers(*(old for old, _ in self._replaced.values()))
            return [each for each in holders if not issubclass(type(each), kinds) and id(each) not in self._ignored]
        # get_referrers compares every reference with every object; here ids are looked up in a set.
        ids = set(self._replaced)
        found = []
        for each in gc.get_objects():
            # By type alone: isinstance() reads __class__, and some proxies warn.
            if issubclass(type(each), kinds) or id(each) in self._ignored:
                continue
            if not ids.isdisjoint(map(id, gc.get_referents(each))):
                found.append(each)
        return found

    def _new(self, value: Any) -> Any:
        pair = self._replaced.get(id(value))
        return value if pair is None else pair[1]

    def _repoint(self, holder: Any) -> None:
        if isinstance(holder, list):
            holder[:] = [self._new(value) for value in holder]
        elif isinstance(holder, dict):
            self._repoint_dict(holder)
        elif isinstance(holder, deque):
            for number, value in enumerate(holder):
                holder[number] = self._new(value)
        elif isinstance(holder, set):
            new = {self._new(value) for value in holder}
            holder.clear()
            holder.update(new)
        elif isinstance(holder, tuple):
            self._repoint_tuple(holder)
        elif isinstance(holder, types.CellType):
            holder.cell_contents = self._new(holder.cell_contents)
        elif hasattr(holder, "__dict__"):  # attributes that Python keeps in the object itself
            self._repoint_dict(vars(holder))

    def _repoint_dict(self, holder: dict[Any, Any]) -> None:
        if any(id(key) in self._replaced for key in holder):
            # The order of keys stays, and values that belong to a parameter are sharded as it is.
            items = [
                (self._new(key), alike(value, self._new(key)) if id(key) in self._replaced else value)
                for key, value in holder.items()
            ]
            holder.clear()
            holder.update(items)
        for key, value in list(holder.items()):
            if id(value) in self._replaced:
                holder[key] = self._new(value)

    def _repoint_tuple(self, holder: tuple[Any, ...]) -> None:
        """Replace this tuple in the containers that hold it: ``[(name, parameter), …]`` is the usual case."""
        values = [self._new(value) for value in holder]
        made = type(holder)(*values) if hasattr(holder, "_fields") else type(holder)(values)
        inner = _Repointing({id(holder): (holder, made)}, ())  # type: ignore[dict-item]
        for each in gc.get_referrers(holder):
            if isinstance(each, (list, dict, deque, types.CellType)) and each is not inner._replaced:
                inner._repoint(each)


def alike(value: Any, parameter: Tensor) -> Any:
    """Return an optimizer's value for a parameter, in any nesting, sharded as the parameter is."""
    if isinstance(value, Tensor):
        return _shard_like_parameter(value, parameter)
    if isinstance(value, dict):
        for key, each in value.items():
            value[key] = alike(each, parameter)
        return value
    if type(value) is list:
        value[:] = [alike(each, parameter) for each in value]
    return value


def _shard_like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or isinstance(value, (DTensor, nn.Parameter)) or not value.dim():
        return value
    # Values of another shape (rows and columns of a factorised moment) are replicated.
    mesh = parameter.device_mesh
    placements = parameter.placements if value.shape == parameter.shape else [Replicate()] * mesh.ndim
    with torch.no_grad():
        made = distribute_tensor(value.detach().to(parameter.device), mesh, placements, src_data_rank=None)
    return as_sharded(made)  # type: ignore[no-any-return]


def _shard_beside(optimizer: Optimizer) -> None:
    """Shard tensors in the optimizer's own lists that match its parameters, by group or in one list."""
    groups = [group["params"] for group in optimizer.param_groups]
    flat = [parameter for group in groups for parameter in group]
    for key, value in vars(optimizer).items():
        if key in ("param_groups", "state") or not isinstance(value, list):
            continue
        rows = value if all(isinstance(each, list) for each in value) else [value]
        beside = groups if rows is value else [flat]
        if [len(row) for row in rows] != [len(row) for row in beside]:
            continue
        for row, parameters in zip(rows, beside, strict=True):
            if all(isinstance(t, Tensor) and t.shape == p.shape for t, p in zip(row, parameters, strict=True)):
                row[:] = [_shard_like_parameter(t, p) for t, p in zip(row, parameters, strict=True)]


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
