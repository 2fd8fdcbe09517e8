"""Expert parallelism beside another strategy: it divides experts, and the other one does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plugframe.base import Strategy
from plugframe.errors import SettingError, UnsupportedError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.sharding.mesh import averaged_axes, group_of_axes
from plugframe_builtins.expert.axis import ExpertAxis
from plugframe_builtins.expert.exchange import Exchange
from plugframe_builtins.expert.layer import Layers, ListLayer, StackedLayer
from plugframe_builtins.expert.plan import Experts, Plan, find_experts
from plugframe_builtins.expert.weights import Entry, Weights

AXIS = "expert"


class DividedExperts(Strategy):
    """Divide the experts of a module over the axis ``expert``.

    Args:
        plan: see `ExpertParallel`.
    """

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan
        self._layers = Layers()
        self._ranks: Ranks | None = None
        self._others: list[Any] = []

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        mesh = context.mesh
        assert mesh is not None
        axes = averaged_axes("expert", mesh, context)
        self._ranks = Ranks(mesh[axes], group_of_axes(mesh, axes, context)) if AXIS in axes else None
        sizes = dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=True))
        # Of ranks that read the same samples, or have other stages of the model.
        others = [name for name, size in sizes.items() if size > 1 and name not in context.averaged]
        self._others = [mesh.get_group(name) for name in others]

    @hookimpl
    def strategy_parallelize(self, module: nn.Module) -> None:
        divide(module, self._ranks, self.plan, self.context, self._layers, self._others)

    @hookimpl
    def strategy_teardown(self) -> None:
        self._layers.close()


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks over which experts are sharded.

    Attributes:
        mesh: of the axes over which gradients are averaged, ``expert`` among them.
        group: of all ranks of it, None for those of the job.
    """

    mesh: DeviceMesh
    group: Any


def divide(
    module: nn.Module,
    ranks: Ranks | None,
    plan: Plan | None,
    context: Context,
    layers: Layers,
    others: Sequence[Any] = (),
) -> None:
    """Divide the experts of a module over the axis ``expert``, in place. Called on every rank.

    Args:
        ranks: None if the axis has one rank: the plan is checked only.
        plan: None for the model's own one.
        layers: that get the module's.
        others: groups of the ranks along axes that do not average.

    Raises:
        SettingError: if there is no plan, or it does not fit the module.
        UnsupportedError: for experts that cannot be divided.
    """
    found = find_experts(module, plan)
    _check_owners(module, found)
    if ranks is None:
        return
    copies = _copies([experts.path for experts in found], others, context)
    if not found:
        return
    dtypes = context.hooks.precision_dtypes()
    dtype = dtypes.compute if dtypes.compute != dtypes.parameter else None
    axis = ExpertAxis(context.hooks, ranks.mesh, ranks.group, AXIS, context.device, dtype, copies)
    for experts in found:
        if experts.parent is not None:
            _divide_list(experts, axis, layers)
        else:
            _divide_stacked(experts, axis, layers)


def _copies(paths: Sequence[str], others: Sequence[Any], context: Context) -> list[Any]:
    """Return those of the groups whose ranks have the same experts; those of a pipeline have other stages."""
    found = []
    for group in others:
        everyone = context.hooks.collective_all_gather_object(obj=list(paths), group=group)
        if paths and all(each == list(paths) for each in everyone):
            found.append(group)
    return found


def _check_owners(module: nn.Module, found: Sequence[Experts]) -> None:
    """Raise if experts share parameters or keep statistics, or a module runs two lists of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parents: dict[int, str] = {}
    for experts in found:
        for parameter in experts.module.parameters():
            if isinstance(parameter, DTensor):
                raise UnsupportedError(
                    f"{names[id(parameter)][0]!r} of the experts {experts.path!r} is split by another strategy, and "
                    "strategy 'expert' divides complete experts over ranks: leave them out of the other one's plan."
                )
            if len(names[id(parameter)]) > 1:
                raise UnsupportedError(
                    f"{' and '.join(map(repr, names[id(parameter)]))} are one parameter, and strategy 'expert' divides "
                    f"the experts {experts.path!r} over ranks: experts share no parameters."
                )
        for path, part in experts.module.named_modules():
            if isinstance(getattr(part, "running_mean", None), Tensor):
                raise UnsupportedError(
                    f"{type(part).__name__} {path!r} of the experts {experts.path!r} keeps running statistics, and "
                    "strategy 'expert' runs each expert on some ranks only: use LayerNorm or RMSNorm."
                )
        if experts.parent is None:
            continue
        other = parents.setdefault(id(experts.parent), experts.path)
        if other != experts.path:
            raise UnsupportedError(
                f"A {type(experts.parent).__name__} runs the lists of experts {other!r} and {experts.path!r}: strategy "
                "'expert' needs each list in a module of its own."
            )


def _bounds(experts: Experts, number: int, size: int) -> list[int]:
    if number < size:
        raise SettingError(
            f"{experts.path!r} has {number} experts, and strategy 'expert' divides them over {size} ranks: give the "
            f"axis {number} ranks or fewer, as in mesh=data=2,expert={number}."
        )
    return [number * index // size for index in range(size + 1)]


def _divide_list(experts: Experts, axis: ExpertAxis, layers: Layers) -> None:
    members = list(experts.module.children())
    bounds = _bounds(experts, len(members), axis.size)
    owners = [next(k for k in range(axis.size) if number < bounds[k + 1]) for number in range(len(members))]
    entries = [
        Entry(part, name, number, owners[number])
        for number, member in enumerate(members)
        for part in member.modules()
        for name in _parameter_names(part)
    ]
    local = members[bounds[axis.index] : bounds[axis.index + 1]]

    def run(rows: list[Tensor]) -> Sequence[Tensor | None]:
        pairs = zip(local, rows, strict=True)
        found: Sequence[Tensor | None] = layer.running(lambda: [e(each) if len(each) else None for e, each in pairs])
        return found

    exchange = Exchange(experts.path, experts.module, axis, Weights(axis, entries), bounds, run)
    assert experts.parent is not None
    layer = ListLayer(experts.path.rpartition(".")[0], experts.parent, members, exchange, axis)
    layers.add(experts.parent, layer, members)


def _divide_stacked(experts: Experts, axis: ExpertAxis, layers: Layers) -> None:
    entries = [Entry(part, name, None, None) for part in experts.module.modules() for name in _parameter_names(part)]
    shapes = {f"{type(entry.module).__name__}.{entry.name}": _shape(entry) for entry in entries}
    numbers = {shape[0] for shape in shapes.values()}
    flat = next((name for name, shape in shapes.items() if len(shape) < 2), None)
    if len(numbers) != 1 or flat is not None:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
        raise SettingError(
            f"The parameters of the experts {experts.path!r} must have the number of experts as their first dimension, "
            f"and one more at least, for strategy 'expert' to divide them over ranks: {listed}."
        )
    bounds = _bounds(experts, numbers.pop(), axis.size)
    weights = Weights(axis, entries)
    # torch's chunks of the first dimension.
    sizes = [axis.shape_on(axis.column[index], entries[0].sharded)[0] for index in range(axis.size)]
    bounds = [sum(sizes[:index]) for index in range(axis.size + 1)]
    if 0 in sizes:
        raise SettingError(
            f"{bounds[-1]} experts of {experts.path!r} leave some of {axis.size} ranks without one: give the axis "
            f"{len([size for size in sizes if size])} ranks, or a divisor of {bounds[-1]}."
        )

    def run(rows: list[Tensor]) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = layer.run_rows(rows)
        return found

    made = Exchange(experts.path, experts.module, axis, weights, bounds, run)
    assert experts.dispatch is not None
    layer = StackedLayer(experts.path, made, experts.dispatch)
    layers.add(experts.module, layer)


def _parameter_names(part: nn.Module) -> list[str]:
    return [name for name, parameter in part._parameters.items() if parameter is not None]


def _shape(entry: Entry) -> tuple[int, ...]:
    parameter = entry.module._parameters[entry.name]
    assert parameter is not None
    return tuple(parameter.shape)
