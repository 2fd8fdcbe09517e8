"""Setting up: the user's objects, adopted in place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

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
from plugframe.adopt.module import checked_name
from plugframe.adopt.settings_check import SettingsCheck
from plugframe.data.consistency import check_consistent, check_unsharded, existing_sharding, signature
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
from plugframe.lite import checks
from plugframe.lite.core import Core
from plugframe.state.parameter_names import ParameterNames, names_of
from plugframe.utils.logging import warn_caller
from plugframe.utils.rng import get_state, set_state
from plugframe.utils.stores import fresh_prefix


class SetUp(Core):
    """Prepares modules, optimizers and loaders."""

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        forward_methods: Iterable[str | Callable[..., Any]] = (),
    ) -> Any:
        """Prepare a module and its optimizers, in place, and return them. Every rank must call it.

        Args:
            scheduler: returned as it is; schedulers need no set-up.
            move_to_device: whether to move the module to this rank's device; a strategy that shards always does.
            forward_methods: methods besides ``forward`` that run the module's parts and so must run under
                precision and strategy.

        Returns:
            The module alone, or a tuple of module, optimizers and scheduler, as they were given.
        """
        names = self._check_module(module, forward_methods)
        checks.check_optimizers(optimizers)
        checks.check_ownership(module, optimizers)
        module = self._prepare(module, move_to_device, "setup")
        self._replaced_parameters.update_optimizers(optimizers)
        called = [names_of(optimizer, [module]) for optimizer in optimizers]
        setup = self._hooks.strategy_setup_module_and_optimizers
        engine, prepared = setup(module=module, optimizers=optimizers)
        self._adopt(module, engine, names)
        for optimizer, own in zip(prepared, called, strict=True):
            self._adopt_optimizer(optimizer, own)
        self._draw_apart()
        extra = () if scheduler is None else (scheduler,)
        return (module, *prepared, *extra) if optimizers or extra else module

    def setup_module(
        self,
        module: nn.Module,
        move_to_device: bool = True,
        forward_methods: Iterable[str | Callable[..., Any]] = (),
    ) -> Any:
        """Prepare a module alone, in place, and return it. Every rank must call it."""
        names = self._check_module(module, forward_methods)
        module = self._prepare(module, move_to_device, "setup_module")
        engine = self._hooks.strategy_setup_module(module=module)
        self._adopt(module, engine, names)
        self._draw_apart()
        return module

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepare optimizers alone, after their module, and return them. Every rank must call it."""
        if not optimizers:
            raise SettingError("setup_optimizers() takes at least one optimizer, got none.")
        checks.check_optimizers(optimizers)
        self._started("setup_optimizers")
        self._check_modules()
        self._replaced_parameters.update_optimizers(optimizers)
        called = [names_of(optimizer, self._living()) for optimizer in optimizers]
        known = {id(parameter) for module in self._living() for parameter in module.parameters()}
        prepared = self._hooks.strategy_setup_optimizers(module=None, optimizers=optimizers)
        self._check_stray(prepared, known)
        for optimizer, own in zip(prepared, called, strict=True):
            self._adopt_optimizer(optimizer, own)
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def setup_dataloaders(
        self,
        *dataloaders: DataLoader[Any],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        weigh_uneven: bool = True,
    ) -> Any:
        """Divide the samples of loaders between the ranks, in place, and return the loaders. Every rank must call it.

        The order of samples depends on the seed, the loader and the epoch alone: it is the same for any number
        of ranks. While training, all ranks take the same number of steps. While evaluating (gradients off, or
        every model in eval mode) every sample is read exactly once.

        Args:
            use_distributed_sampler: False leaves the samples undivided.
            move_to_device: whether batches come on this rank's device.
            weigh_uneven: whether `backward` weighs a last batch that is smaller on some ranks, so that the mean
                over ranks stays the mean over samples; it is meant for losses that are means, see `backward`.

        Raises:
            SettingError: on all ranks, if their data differ (lengths, indices, file lists, tensors; no sample is read),
                or if a dataset is known to divide itself between ranks. A stream whose first samples differ between
                ranks is refused when they are read.
        """
        checks.check_loaders(dataloaders)
        context = self._started("setup_dataloaders")
        shard = self._hooks.strategy_data_shard()
        for loader in dataloaders:
            check_unread(loader)
        shared = list(dataloaders) if use_distributed_sampler else []
        divided = [loader for loader in shared if not has_sharded_sampler(loader, *shard)]
        seed = self._agree(divided, shared)
        self._count_exchanges()
        compare = self._comparison() if any(isinstance(d.dataset, IterableDataset) for d in shared) else None
        for loader in dataloaders:
            shuffle = Shuffle(seed, self._loaders.number())
            state = adopt_loader(
                loader,
                hooks=self._hooks,
                device=context.device if move_to_device else None,
                shuffle=shuffle,
                shard=shard,
                training=self._training,
                split=use_distributed_sampler,
                weigh=weigh_uneven,
            )
            if state.iterable is not None and compare is not None:
                state.compare, state.iterable.compare = compare, True
            self._loaders.add(state)
            self._session.release_on_close(loader, _if_adopted(release_loader))
        return dataloaders[0] if len(dataloaders) == 1 else list(dataloaders)

    def _prepare(self, module: nn.Module, move_to_device: bool, call: str) -> nn.Module:
        context = self._started(call)
        # A module that was built without values is converted and moved without them as well.
        before = dict(module.named_parameters(remove_duplicate=False))
        with resuming(module, context.device):
            module = self._hooks.precision_convert_module(module=module)
            if move_to_device:
                check_values(module)
                module = module.to(context.device)
        self._replaced_parameters.record(before, module)
        return module

    def _check_module(self, module: nn.Module, forward_methods: Iterable[Any]) -> tuple[Any, ...]:
        """Look at everything before anything is done, and return the forward methods."""
        checks.check_module(module, [m for m in (reference() for reference in self._modules) if m is not None])
        names = (forward_methods,) if isinstance(forward_methods, str) else tuple(forward_methods)
        for name in names:
            checked_name(module, name)
        return names

    def _check_modules(self) -> None:
        if not self._modules:
            raise OrderError("setup_optimizers() before any model was set up: call lite.setup_module(model) first.")

    def _check_stray(self, optimizers: Iterable[Optimizer], known: set[int]) -> None:
        """Say so where an optimizer updates what no module that was set up holds: ranks would update it apart."""
        for optimizer in optimizers:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            stray = sum(id(p) not in known for p in held)
            if stray and self.world_size > 1 and self.is_global_zero:
                warn_caller(
                    f"{stray} of the {len(held)} parameters of this {type(optimizer).__name__} belong to no module "
                    "that was set up: their gradients are each rank's own. Call lite.setup_module() for their module, "
                    "and make the optimizer after it; or exchange them with lite.all_reduce()."
                )

    def _adopt(self, module: nn.Module, engine: Any, names: tuple[Any, ...]) -> None:
        adopt_module(module, hooks=self._hooks, engine=engine, job=self._phase, forward_methods=names)
        self._modules[:] = [reference for reference in self._modules if reference() is not None]
        self._modules.append(weakref.ref(module))
        self._session.release_on_close(module, _if_adopted(release_module))
        if self._hooks.on_setup is not None:
            self._hooks.on_setup(module=module)

    def _adopt_optimizer(self, optimizer: Optimizer, names: ParameterNames | None) -> None:
        self._hooks.precision_setup_optimizer(optimizer=optimizer)
        mean = compare = None
        if self.world_size > 1:
            lite: Any = self  # it knows the weight of the batch
            mean = lite._mean_loss
            known = {id(p) for module in self._living() for p in module.parameters()}
            # What no module has is each rank's own, and so may be its settings.
            if all(id(p) in known for group in optimizer.param_groups for p in group["params"]):
                compare = SettingsCheck(optimizer, self._hooks.strategy_gather_later, self._phase)
        adopt_optimizer(
            optimizer,
            hooks=self._hooks,
            names=names,
            job=self._phase,
            check_backward=self.is_global_zero,
            mean=mean,
            compare=compare,
        )
        self._session.release_on_close(optimizer, _if_adopted(release_optimizer))

    def _agree(self, loaders: Sequence[DataLoader[Any]], shared: Sequence[DataLoader[Any]]) -> int:
        """Return rank 0's seed, and give the users' own generators rank 0's state: all ranks draw alike.

        Args:
            loaders: whose generators are made alike.
            shared: whose data must be the same on all ranks.

        Raises:
            SettingError: on all ranks, if the data of a loader differ, or are divided already.
        """
        sources = [source for loader in loaders for source in sampling_generators(loader)]
        if self.world_size == 1:
            return torch.initial_seed()
        # Ranks that read the same batches must change them alike too.
        held = (
            [transform_generators(loader) for loader in loaders]
            if self._hooks.strategy_data_shard()[1] < self.world_size
            else []
        )
        found = [(signature(d, deep=self._loaders.is_new(d.dataset)), existing_sharding(d)) for d in shared]
        states = [get_state(source) for source in sources] if self.is_global_zero else None
        states_held = [{path: get_state(source) for path, source in each.items()} for each in held]
        if not self.is_global_zero:
            states_held = []
        mine = (torch.initial_seed(), states, states_held, found)
        everyone = self._hooks.collective_all_gather_object(obj=mine, group=None)
        check_consistent([[each for each, _ in found] for *_, found in everyone])
        check_unsharded([[name for _, name in found] for *_, found in everyone])
        seed, states, states_held, _ = everyone[0]
        for source, state in zip(sources, states, strict=True):
            set_state(source, state)
        for each, of_rank_0 in zip(held, states_held, strict=True):
            for path in each.keys() & of_rank_0.keys():
                set_state(each[path], of_rank_0[path])
        return int(seed)

    def _count_exchanges(self) -> None:
        """Have the collectives counted, where a forward makes none: then it can be told whether the script did."""
        group = self._hooks.collective_process_group()
        counter = getattr(group, "_get_sequence_number_for_group", None)  # not public; there in torch 2.4 to 2.13
        provides = self.plan.choices["strategy"].descriptor.provides
        with suppress(RuntimeError):  # a backend of somebody's own may not count
            if self.world_size == 1 or counter is None or "sharded" in provides:
                return
            counter()
            self._phase.weights.num_collectives = counter
            self._phase.weights.warns = self.is_global_zero

    def _comparison(self) -> Callable[..., None] | None:
        """Return what compares the first windows of streams, at the store at which the ranks met; None without one."""
        group = self._hooks.collective_process_group()
        if self.world_size == 1 or not hasattr(group, "get_group_store"):
            return None
        store = group.get_group_store()
        # A job may be set up more than once over one store: the user's own process group stays.
        prefix = fresh_prefix(store, "streams", self.global_rank)
        return functools.partial(
            check_first_window, store=store, prefix=prefix, rank=self.global_rank, num_ranks=self.world_size
        )

    def _draw_apart(self) -> None:
        """From the first set-up of a model on ranks may have random numbers of their own."""
        if self._streams is not None:
            return
        index, count = self._hooks.strategy_data_shard()
        self._streams = RankStreams(index=index, count=count, hooks=self._hooks)
        self._session.on_close(self._streams.close)
        self._streams.open()
        if self.world_size > 1 and not self.plan.simulated:
            context = self._session.started()
            self._phase.random_check = RandomStreamCheck(
                index=index, hooks=self._hooks, context=context, loaders=self._loaders
            )

    def _training(self) -> bool:
        return torch.is_grad_enabled() and any(module.training for module in self._living())


def _if_adopted(release: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what gives an object back unless that was done already."""
    return lambda obj: release(obj) if state_of(obj) is not None else None
