"""Set up modules, optimizers and loaders in place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from plugframe.adopt import (
    adopt_module,
    adopt_optimizer,
    release_module,
    release_optimizer,
    state_of,
)
from plugframe.adopt.batch_norm import tell_of_local_batch_norm, use_cpu_sync_batch_norm
from plugframe.adopt.module import checked_name
from plugframe.adopt.settings_check import SettingsCheck
from plugframe.data.consistency import check_consistent, check_unsharded, existing_sharding, signature
from plugframe.data.iterables import adopt_iterable, as_loader, release_iterable
from plugframe.data.loader import (
    adopt_loader,
    check_unread,
    has_sharded_sampler,
    release_loader,
    sampling_generators,
    transform_generators,
)
from plugframe.data.random_check import RandomStreamCheck
from plugframe.data.random_streams import RankStreams
from plugframe.data.shuffle import Shuffle
from plugframe.data.stream_check import check_first_window
from plugframe.deferred.module import check_values, resuming
from plugframe.errors import OrderError, SettingError
from plugframe.lite import checks, lightning_module, loop, pretrained, raw_scripts
from plugframe.lite.conversion import Before, check_conversion
from plugframe.state.parameter_names import ParameterNames, names_of
from plugframe.utils.logging import warn_caller
from plugframe.utils.rng import get_state, set_state
from plugframe.utils.stores import fresh_prefix

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

M = TypeVar("M", bound=nn.Module)


def setup(
    lite: Lite,
    module: nn.Module,
    optimizers: tuple[Optimizer, ...],
    *,
    scheduler: object,
    move_to_device: bool,
    forward_methods: Iterable[str | Callable[..., object]],
) -> object:
    """Set up a module and its optimizers in place, and return them; see `Lite.setup`."""
    names = _check_module(lite, module, forward_methods)
    checks.check_optimizers(optimizers)
    checks.check_ownership(module, optimizers)
    module = _prepare(lite, module, move_to_device, "setup")
    lite._replaced_parameters.update_optimizers(optimizers)
    called = [names_of(optimizer, [module]) for optimizer in optimizers]
    setup = lite._hooks.strategy_setup_module_and_optimizers
    engine, prepared = setup(module=module, optimizers=optimizers)
    _adopt(lite, module, engine, names, prepared)
    for optimizer, own in zip(prepared, called, strict=True):
        _adopt_optimizer(lite, optimizer, own)
    _after_setup(lite, module)
    extra = () if scheduler is None else (scheduler,)
    return (module, *prepared, *extra) if optimizers or extra else module


def setup_module(
    lite: Lite, module: M, *, move_to_device: bool, forward_methods: Iterable[str | Callable[..., object]]
) -> M:
    """Set up a module without an optimizer in place, and return it."""
    names = _check_module(lite, module, forward_methods)
    module = _prepare(lite, module, move_to_device, "setup_module")
    engine = lite._hooks.strategy_setup_module(module=module)
    _adopt(lite, module, engine, names)
    _after_setup(lite, module)
    return module


def setup_optimizers(lite: Lite, optimizers: tuple[Optimizer, ...]) -> object:
    """Set up optimizers after their module, and return them."""
    if not optimizers:
        raise SettingError("setup_optimizers() takes at least one optimizer, got none.")
    checks.check_optimizers(optimizers)
    lite._started("setup_optimizers")
    _check_modules(lite)
    lite._replaced_parameters.update_optimizers(optimizers)
    called = [names_of(optimizer, lite._living()) for optimizer in optimizers]
    known = {id(parameter) for module in lite._living() for parameter in module.parameters()}
    prepared = lite._hooks.strategy_setup_optimizers(module=None, optimizers=optimizers)
    _check_stray(lite, prepared, known)
    for optimizer, own in zip(prepared, called, strict=True):
        _adopt_optimizer(lite, optimizer, own)
    return prepared[0] if len(prepared) == 1 else tuple(prepared)


def setup_dataloaders(
    lite: Lite,
    given: tuple[Any, ...],
    *,
    use_distributed_sampler: bool,
    move_to_device: bool,
    weigh_uneven: bool,
    replace_sampler: bool | None,
) -> object:
    """Shard loaders over the ranks in place, and return them; see `Lite.setup_dataloaders`."""
    if replace_sampler is not None:
        if not use_distributed_sampler and replace_sampler:
            raise SettingError("setup_dataloaders() takes use_distributed_sampler=, got replace_sampler= as well.")
        warn_caller(
            f"replace_sampler= is deprecated: write use_distributed_sampler={replace_sampler}.", deprecated=True
        )
        use_distributed_sampler = replace_sampler
    checks.check_loaders(given)
    dataloaders = [as_loader(each) for each in given]
    context = lite._started("setup_dataloaders")
    shard = lite._hooks.strategy_data_shard()
    for loader in dataloaders:
        check_unread(loader)
    shared = dataloaders if use_distributed_sampler else []
    divided = [loader for loader in shared if not has_sharded_sampler(loader, *shard)]
    for loader in shared if lite.is_global_zero and lite.world_size > 1 else ():
        raw_scripts.tell_of_sampler(loader)
    seed = _agree(lite, divided, shared)
    _count_exchanges(lite)
    compare = _comparison(lite) if any(isinstance(d.dataset, IterableDataset) for d in shared) else None
    for loader in dataloaders:
        shuffle = Shuffle(seed, lite._loaders.number())
        state = adopt_loader(
            loader,
            hooks=lite._hooks,
            device=context.device if move_to_device else None,
            shuffle=shuffle,
            shard=shard,
            training=functools.partial(_training, lite),
            split=use_distributed_sampler,
            weigh=weigh_uneven,
        )
        if state.iterable is not None and state.iterable.comparable and compare is not None:
            state.compare, state.iterable.compare = compare, True
        lite._loaders.add(state)
        lite._session.release_on_close(loader, _if_adopted(release_loader))
    for each, loader in zip(given, dataloaders, strict=True):
        if each is not loader:
            adopt_iterable(each, loader)
            lite._session.release_on_close(each, _if_adopted(release_iterable))
    return given[0] if len(given) == 1 else list(given)


def _prepare(lite: Lite, module: M, move_to_device: bool, call: str) -> M:
    context = lite._started(call)
    raw_scripts.check_current_device(context)
    # A deferred module is converted and moved without values too.
    before, layout = dict(module.named_parameters(remove_duplicate=False)), Before.of(module)
    with resuming(module, context.device):
        with pretrained.exact_buffers(module):
            module = lite._hooks.precision_convert_module(module=module)
        check_conversion(lite, layout, module)
        if move_to_device:
            check_values(module)
            module = module.to(context.device)
    lite._replaced_parameters.record(before, module)
    # Its sums are over all ranks: where some read the same samples, or have other layers, torch's own error stays.
    if context.device.type == "cpu" and 1 < lite.world_size == lite._hooks.strategy_data_shard()[1]:
        undo = use_cpu_sync_batch_norm(module)
        if undo is not None:
            lite._session.on_close(undo)
    return module


def _check_module(lite: Lite, module: nn.Module, forward_methods: Iterable[Any]) -> tuple[Any, ...]:
    """Validate all arguments before anything is changed, and return the forward methods."""
    checks.check_module(module, [m for m in (reference() for reference in lite._modules) if m is not None])
    names = (forward_methods,) if isinstance(forward_methods, str) else tuple(forward_methods)
    for name in names:
        checked_name(module, name)
    return (*names, *lightning_module.step_methods(module), *pretrained.running_methods(module))


def _check_modules(lite: Lite) -> None:
    if not lite._modules:
        raise OrderError("setup_optimizers() before any model was set up: call lite.setup_module(model) first.")


def _check_stray(lite: Lite, optimizers: Iterable[Optimizer], known: set[int]) -> None:
    """Warn if an optimizer has parameters of no module that was set up: ranks would update them independently."""
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        stray = sum(id(p) not in known for p in held)
        if stray and lite.world_size > 1 and lite.is_global_zero:
            warn_caller(
                f"{stray} of the {len(held)} parameters of this {type(optimizer).__name__} belong to no module "
                "that was set up: their gradients are each rank's own. Call lite.setup_module() for their module, "
                "and make the optimizer after it; or exchange them with lite.all_reduce()."
            )


def _adopt(
    lite: Lite, module: nn.Module, engine: Any, names: tuple[Any, ...], optimizers: Sequence[Optimizer] = ()
) -> None:
    lite._composed.check_applied(module)
    job, device = lite._job_state, lite.device
    adopt_module(module, hooks=lite._hooks, engine=engine, job=job, forward_methods=names, device=device)
    state_of(module).on_first_call = functools.partial(raw_scripts.check_autocast, lite, device.type)
    lightning_module.connect(lite, module, optimizers)
    pretrained.connect(lite, module)
    lite._modules[:] = [reference for reference in lite._modules if reference() is not None]
    lite._modules.append(weakref.ref(module))
    lite._session.release_on_close(module, _if_adopted(release_module))
    if lite._hooks.on_setup is not None:
        lite._hooks.on_setup(module=module)


def _adopt_optimizer(lite: Lite, optimizer: Optimizer, names: ParameterNames | None) -> None:
    lite._hooks.precision_setup_optimizer(optimizer=optimizer)
    mean = compare = None
    if lite.world_size > 1:
        mean = functools.partial(loop.mean_loss, lite)
        known = {id(p) for module in lite._living() for p in module.parameters()}
        # Parameters of no module may differ between ranks, and so may their settings.
        if all(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            compare = SettingsCheck(optimizer, lite._hooks.strategy_gather_later, lite._job_state)
    adopt_optimizer(
        optimizer,
        hooks=lite._hooks,
        names=names,
        job=lite._job_state,
        check_backward=lite.is_global_zero,
        mean=mean,
        compare=compare,
        skip=loop.skip_vote(lite),
        on_first_step=functools.partial(raw_scripts.check_grad_scaler, lite),
    )
    lite._session.release_on_close(optimizer, _if_adopted(release_optimizer))


def _agree(lite: Lite, loaders: Sequence[DataLoader[Any]], shared: Sequence[DataLoader[Any]]) -> int:
    """Return rank 0's seed, and give the user's generators rank 0's state, so that all ranks draw the same numbers.

    Args:
        loaders: whose generators are made alike.
        shared: whose data must be the same on all ranks.

    Raises:
        SettingError: on all ranks, if the data of a loader differ, or are divided already.
    """
    sources = [source for loader in loaders for source in sampling_generators(loader)]
    if lite.world_size == 1:
        return torch.initial_seed()
    # Ranks that read the same batches must apply the same transforms.
    held = (
        [transform_generators(loader) for loader in loaders]
        if lite._hooks.strategy_data_shard()[1] < lite.world_size
        else []
    )
    found = [(signature(d, deep=lite._loaders.is_new(d.dataset)), existing_sharding(d)) for d in shared]
    states = [get_state(source) for source in sources] if lite.is_global_zero else None
    states_held = [{path: get_state(source) for path, source in each.items()} for each in held]
    if not lite.is_global_zero:
        states_held = []
    mine = (torch.initial_seed(), states, states_held, found)
    everyone = lite._hooks.collective_all_gather_object(obj=mine, group=None)
    check_consistent([[each for each, _ in found] for *_, found in everyone])
    check_unsharded([[name for _, name in found] for *_, found in everyone])
    seed, states, states_held, _ = everyone[0]
    for source, state in zip(sources, states, strict=True):
        set_state(source, state)
    for each, of_rank_0 in zip(held, states_held, strict=True):
        for path in each.keys() & of_rank_0.keys():
            set_state(each[path], of_rank_0[path])
    return int(seed)


def _count_exchanges(lite: Lite) -> None:
    """Count collectives, if a forward makes none, to detect whether the script reduces its metrics."""
    group = lite._hooks.collective_process_group()
    counter = getattr(group, "_get_sequence_number_for_group", None)  # not public; there in torch 2.4 to 2.13
    provides = lite.plan.choices["strategy"].descriptor.provides
    with suppress(RuntimeError):  # a third-party backend may not count
        if lite.world_size == 1 or counter is None or "sharded" in provides:
            return
        counter()
        lite._job_state.weights.num_collectives = counter
        lite._job_state.weights.warns = lite.is_global_zero


def _comparison(lite: Lite) -> Callable[..., None] | None:
    """Return a function that compares the first windows of streams through the ranks' store; None without a store."""
    group = lite._hooks.collective_process_group()
    if lite.world_size == 1 or not hasattr(group, "get_group_store"):
        return None
    store = group.get_group_store()
    # One store may serve several jobs, if the user's own process group stays.
    prefix = fresh_prefix(store, "streams", lite.global_rank)
    return functools.partial(
        check_first_window, store=store, prefix=prefix, rank=lite.global_rank, num_ranks=lite.world_size
    )


def _after_setup(lite: Lite, module: nn.Module) -> None:
    draw_apart(lite)
    if lite.is_global_zero and lite._hooks.strategy_data_shard()[1] > 1:
        tell_of_local_batch_norm(module)


def draw_apart(lite: Lite) -> None:
    """Start the random streams of the ranks, at the first set-up of a model."""
    if lite._streams is not None:
        return
    index, count = lite._hooks.strategy_data_shard()
    lite._streams = RankStreams(index=index, count=count, hooks=lite._hooks)
    lite._session.on_close(lite._streams.close)
    lite._streams.open()
    if lite.world_size > 1 and not lite.plan.simulated:
        context = lite._session.started()
        lite._job_state.random_check = RandomStreamCheck(
            index=index, hooks=lite._hooks, context=context, loaders=lite._loaders
        )


def _training(lite: Lite) -> bool:
    return torch.is_grad_enabled() and any(module.training for module in lite._living())


def _if_adopted(release: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `release`, which then has no effect on an object that was released before."""
    return lambda obj: release(obj) if state_of(obj) is not None else None
