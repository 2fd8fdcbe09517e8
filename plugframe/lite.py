"""The user's object: it delegates, and decides nothing."""

from __future__ import annotations

import atexit
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from plugframe import checks, exchange, saving, starting
from plugframe import seed as seeds
from plugframe.adopt import (
    Order,
    adopt_loader,
    adopt_module,
    adopt_optimizer,
    release_loader,
    release_module,
    release_optimizer,
    state_of,
)
from plugframe.adopt.loader import LoaderState, random_sources
from plugframe.context import Context
from plugframe.errors import PlugframeWarning, SettingError, closest
from plugframe.hooks.checkpoint import SaveHandle
from plugframe.registry import Registry
from plugframe.request import gather
from plugframe.resolve import resolve
from plugframe.session import Session
from plugframe.state import Filter

if TYPE_CHECKING:
    from typing_extensions import Self

Devices = int | str | list[int] | tuple[int, ...]
T = TypeVar("T")
_SETTINGS = "settings"


class Lite:
    """Runs a raw PyTorch loop on any device, any number of ranks, in any precision.

    Every plugin argument takes a name (``"ddp"``), a name qualified by its package (``"acme-ddp:ddp"``) or a
    plugin object. ``"auto"`` is chosen from what is installed and what this machine has; ``lite.plan`` says why.

    Args:
        accelerator: kind of device.
        strategy: how the model is spread over the ranks.
        devices: a count, a list of indices, ``"0,2"``, or ``-1`` or ``"auto"`` for all; on each node.
        num_nodes: nodes of the job.
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16"``, …; None means ``"auto"``.
        collective: how ranks communicate.
        checkpoint: format of saved states.
        environment: who started the processes.
        launcher: who starts them, if nobody did.
        plugins: extensions by name, and plugin objects of any kind.
        callbacks: objects whose methods `call` calls, and whose ``on_…`` hooks are called.
        loggers: loggers by name, or objects.

    Raises:
        UsageError: (and its subclasses) for a wrong setting; one that contradicts the command line included.
    """

    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        devices: Devices = "auto",
        num_nodes: int = 1,
        precision: Any = None,
        collective: Any = "auto",
        checkpoint: Any = "auto",
        environment: Any = "auto",
        launcher: Any = "auto",
        plugins: Any = (),
        callbacks: Any = (),
        loggers: Any = (),
    ) -> None:
        self._settings = {
            "accelerator": accelerator,
            "strategy": strategy,
            "devices": devices,
            "num_nodes": None if num_nodes == 1 and not isinstance(num_nodes, bool) else num_nodes,
            "precision": precision,
            "collective": collective,
            "checkpoint": checkpoint,
            "environment": environment,
            "launcher": launcher,
            "plugins": _as_tuple(plugins),
            "callbacks": _as_tuple(callbacks),
            "loggers": _as_tuple(loggers),
        }
        self._resolve()

    def _resolve(self) -> None:
        self._request = gather(self._settings)
        self._registry = Registry.discover()
        self.plan = resolve(self._request, self._registry, os.environ)
        self._callbacks = [_callback(c) for c in self._request.value("callbacks", ())]
        self._session = Session(self.plan, self._registry, self._callbacks)
        self._hooks = self._session.hooks
        self._modules: list[weakref.ref[nn.Module]] = []
        self._loader_states: list[LoaderState] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "run" in cls.__dict__:
            setattr(cls, "run", _on_every_rank(cls.__dict__["run"]))  # noqa: B010

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as settings and the subclass's own attributes; there the plan is made anew."""
        own = (
            "_request",
            "_registry",
            "plan",
            "_callbacks",
            "_session",
            "_hooks",
            "_modules",
            "_loader_states",
        )
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._resolve()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.teardown()

    # ---------------------------------------------------------------- where this rank stands

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return cast(torch.device, self._session.device)

    @property
    def global_rank(self) -> int:
        """This rank among all, from 0."""
        return self._session.world.global_rank

    @property
    def local_rank(self) -> int:
        """This rank among those of its node, from 0."""
        return self._session.world.local_rank

    @property
    def node_rank(self) -> int:
        """This node among all, from 0."""
        return self._session.world.node_rank

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.plan.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is global rank 0."""
        return self.global_rank == 0

    @property
    def strategy(self) -> Any:
        """The strategy plugin in use."""
        return self._session.plugins["strategy"]

    @property
    def accelerator(self) -> Any:
        """The accelerator plugin in use."""
        return self._session.plugins["accelerator"]

    @property
    def loggers(self) -> list[Any]:
        """The logger plugins in use."""
        return self._session.loggers

    @property
    def logger(self) -> Any:
        """The first logger plugin in use.

        Raises:
            SettingError: if there is none.
        """
        if not self.loggers:
            raise SettingError("There is no logger: pass one, as in Lite(loggers='csv').")
        return self.loggers[0]

    # ---------------------------------------------------------------- starting and ending

    def launch(self, function: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | None:
        """Make sure that the job's ranks run.

        Where they do already (``plugframe run``, torchrun, a scheduler) or where one is enough, this process
        goes on. Otherwise, in a script, this process starts and supervises the ranks, each of which runs the
        script from its beginning; code after the call runs on the ranks alone, code before it once more on each.

        Args:
            function: called as ``function(lite, *args, **kwargs)`` on every rank. With it, this process goes on
                after the ranks have ended.

        Returns:
            What `function` returned: on rank 0, if ranks were started. None without a function.

        Raises:
            RankFailedError: if a rank failed while running `function`.
        """
        if function is not None and not callable(function):
            raise SettingError(f"launch() takes a function, got {type(function).__name__}.")
        if self._alone():
            self._started("launch")
            return function(self, *args, **kwargs) if function is not None else None
        if function is None:
            starting.start_script(self.plan, self._request, self._registry)
        handed = (type(self), self.__getstate__(), function, args, kwargs)
        return cast(
            "T", starting.start_function(self.plan, self._request, self._registry, _rank_main, handed)
        )

    def teardown(self) -> None:
        """End the job on this rank and give every object back as it was. It may be called twice."""
        self._session.close()
        self._modules.clear()
        self._loader_states.clear()
        atexit.unregister(self._session.close)

    def _alone(self) -> bool:
        return self._session.context is not None or self.plan.launched or self.plan.world_size == 1

    def _started(self, call: str) -> Context:
        """Return the context, starting this rank if it is the first call that needs it."""
        session = self._session
        if session.context is None:
            if not self._alone():
                raise starting.not_launched(self.plan, call)
            session.start()
            atexit.register(session.close)
        return session.started()

    # ---------------------------------------------------------------- set-up

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
            move_to_device: whether to move the module to this rank's device.
            forward_methods: methods besides ``forward`` that run the module's parts and so must run under
                precision and strategy.

        Returns:
            The module alone, or a tuple of module, optimizers and scheduler, as they were given.
        """
        checks.check_module(module)
        checks.check_optimizers(optimizers)
        checks.check_ownership(module, optimizers)
        module = self._prepare(module, move_to_device, "setup")
        setup = self._hooks.strategy_setup_module_and_optimizers
        engine, prepared = setup(module=module, optimizers=optimizers)
        self._adopt(module, engine, forward_methods)
        for optimizer in prepared:
            self._adopt_optimizer(optimizer)
        extra = () if scheduler is None else (scheduler,)
        return (module, *prepared, *extra) if optimizers or extra else module

    def setup_module(
        self,
        module: nn.Module,
        move_to_device: bool = True,
        forward_methods: Iterable[str | Callable[..., Any]] = (),
    ) -> Any:
        """Prepare a module alone, in place, and return it. Every rank must call it."""
        checks.check_module(module)
        module = self._prepare(module, move_to_device, "setup_module")
        engine = self._hooks.strategy_setup_module(module=module)
        self._adopt(module, engine, forward_methods)
        return module

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepare optimizers alone, after their module, and return them. Every rank must call it."""
        if not optimizers:
            raise SettingError("setup_optimizers() takes at least one optimizer, got none.")
        checks.check_optimizers(optimizers)
        self._started("setup_optimizers")
        prepared = self._hooks.strategy_setup_optimizers(module=None, optimizers=optimizers)
        for optimizer in prepared:
            self._adopt_optimizer(optimizer)
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
                over ranks stays the mean over samples; it is meant for losses that are means.
        """
        checks.check_loaders(dataloaders)
        context = self._started("setup_dataloaders")
        shard = self._hooks.strategy_data_shard()
        seed = self._agree(dataloaders)
        for loader in dataloaders:
            order = Order(seed, len(self._loader_states))
            adopt_loader(
                loader,
                hooks=self._hooks,
                device=context.device if move_to_device else None,
                order=order,
                shard=shard,
                training=self._training,
                split=use_distributed_sampler,
                weigh=weigh_uneven,
            )
            self._loader_states.append(state_of(loader))
            self._session.on_close(_release, weakref.ref(loader), release_loader)
        return dataloaders[0] if len(dataloaders) == 1 else list(dataloaders)

    def _prepare(self, module: nn.Module, move_to_device: bool, call: str) -> nn.Module:
        context = self._started(call)
        module = self._hooks.precision_convert_module(module=module)
        return module.to(context.device) if move_to_device else module

    def _adopt(self, module: nn.Module, engine: Any, forward_methods: Iterable[Any]) -> None:
        names = (forward_methods,) if isinstance(forward_methods, str) else tuple(forward_methods)
        adopt_module(module, hooks=self._hooks, engine=engine, forward_methods=names)
        self._modules.append(weakref.ref(module))
        self._session.on_close(_release, self._modules[-1], release_module)
        if self._hooks.on_setup is not None:
            self._hooks.on_setup(module=module)

    def _adopt_optimizer(self, optimizer: Optimizer) -> None:
        adopt_optimizer(optimizer, hooks=self._hooks)
        self._session.on_close(_release, weakref.ref(optimizer), release_optimizer)

    def _agree(self, loaders: tuple[DataLoader[Any], ...]) -> int:
        """Return rank 0's seed, and give the users' own generators rank 0's state: all ranks draw alike."""
        sources = [source for loader in loaders for source in random_sources(loader)]
        mine = (torch.initial_seed(), [source.get_state() for source in sources])
        seed, states = self._hooks.collective_broadcast_object(obj=mine, src=0, group=None)
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)
        return int(seed)

    def _training(self) -> bool:
        modules = (reference() for reference in self._modules)
        return torch.is_grad_enabled() and any(m is not None and m.training for m in modules)

    # ---------------------------------------------------------------- inside the loop

    def backward(self, tensor: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Compute gradients, in place of ``tensor.backward(*args, **kwargs)``. Every rank must call it.

        Args:
            tensor: the loss, a mean over this rank's batch; 0-d, or any shape with ``gradient=``.
            model: the module the loss belongs to, where several were set up and the strategy wants to know.
        """
        checks.check_loss(tensor, set_up=bool(self._modules))
        weight = self._weight()
        if weight != 1.0:
            tensor = tensor * weight
        self._hooks.strategy_backward(loss=tensor, module=model, args=args, kwargs=kwargs)
        if self._hooks.on_backward is not None:
            self._hooks.on_backward(loss=tensor)

    def _weight(self) -> float:
        weights = [state.weight for state in self._loader_states if state.weight is not None]
        if len(weights) > 1 and any(weight != weights[0] for weight in weights):
            warnings.warn(
                "Several loaders are being read, and their last batches are uneven in different ways: this loss is "
                "not weighed. Set them up with weigh_uneven=False to say so.",
                PlugframeWarning,
                stacklevel=3,
            )
            return 1.0
        return weights[0] if weights else 1.0

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context in which gradients are accumulated but not exchanged: for all but the last micro-batch.

        Forward and backward of the micro-batch both belong inside.
        """
        checks.check_set_up(module, "no_backward_sync")
        engine = state_of(module).engine
        return cast(
            "AbstractContextManager[Any]",
            self._hooks.strategy_no_sync(module=module, engine=engine, enabled=bool(enabled)),
        )

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of `optimizer`'s parameters, by value or by total norm. Every rank must call it.

        Under a loss scaler gradients are unscaled first, and a step with non-finite ones is skipped by itself.

        Returns:
            For ``max_norm`` the total norm before clipping, a 0-d tensor, equal on all ranks; else None.

        Raises:
            RuntimeError: if the norm is not finite and `error_if_nonfinite`, on all ranks.
        """
        checks.check_limits(clip_val, max_norm)
        checks.check_set_up(module, "clip_gradients")
        checks.check_set_up(optimizer, "clip_gradients")
        skips = self._hooks.precision_unscale(optimizer=optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return cast(
            "Tensor | None",
            self._hooks.strategy_clip_gradients(
                module=module,
                parameters=parameters,
                clip_value=clip_val,
                max_norm=max_norm,
                norm_type=float(norm_type),
                error_if_nonfinite=error_if_nonfinite and not skips,
            ),
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context the precision runs a forward in, for code outside of a module."""
        self._started("autocast")
        return cast("AbstractContextManager[Any]", self._hooks.precision_forward_context())

    def to_device(self, obj: T) -> T:
        """Return `obj` (a module, a tensor, or any nesting of tensors) on this rank's device."""
        context = self._started("to_device")
        if isinstance(obj, nn.Module):
            return obj.to(context.device)
        return cast("T", self._hooks.accelerator_move_batch(batch=obj, device=context.device))

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Return a context in which a module is built on this rank's device, in the precision's dtype.

        Args:
            empty_init: True leaves parameters without initial values, for a model that is loaded.
        """
        self._started("init_module")
        stack = ExitStack()
        stack.enter_context(self._hooks.precision_init_context())
        return _entered_last(stack, self._hooks.strategy_init_context(empty_init=empty_init))

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors are created on this rank's device, in the precision's dtype."""
        context = self._started("init_tensor")
        stack = ExitStack()
        stack.enter_context(self._hooks.precision_init_context())
        return _entered_last(stack, context.device)

    # ---------------------------------------------------------------- between ranks

    def all_gather(self, data: T, group: Any = None, sync_grads: bool = False) -> T:
        """Return `data` with every tensor of shape S stacked over ranks: shape (ranks, *S), for one rank too.

        Every rank of the group must call it, with equal shapes and dtypes. Numbers and arrays become tensors.

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ, on all ranks, listing them.
        """
        context = self._started("all_gather")
        gather_one = self._hooks.collective_all_gather

        def one(tensor: Tensor) -> Tensor:
            return cast(Tensor, gather_one(tensor=tensor, group=group, sync_grads=sync_grads))

        return cast("T", exchange.each(one, data, context.device, "all_gather"))

    def all_reduce(self, data: T, group: Any = None, reduce_op: str = "mean") -> T:
        """Return `data` with every tensor reduced over ranks, of the same shape, for one rank too.

        Every rank of the group must call it, with equal shapes and dtypes. Numbers and arrays become tensors.

        Args:
            reduce_op: "mean" (or "avg"), "sum", "min", "max", "product".

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ, on all ranks, listing them.
        """
        context = self._started("all_reduce")
        reduce_one = self._hooks.collective_all_reduce

        def one(tensor: Tensor) -> Tensor:
            return cast(Tensor, reduce_one(tensor=tensor, op=reduce_op.lower(), group=group))

        return cast("T", exchange.each(one, data, context.device, "all_reduce"))

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return global rank `src`'s object, its tensors on this rank's device. Every rank must call it."""
        context = self._started("broadcast")
        if not 0 <= src < self.world_size:
            raise SettingError(f"broadcast(src={src!r}): ranks go from 0 to {self.world_size - 1}.")
        sent = self._hooks.collective_broadcast_object(obj=exchange.off_device(obj), src=src, group=None)
        return cast("T", exchange.on_device(sent, context.device))

    def barrier(self, name: str | None = None) -> None:
        """Return once every rank is here. Every rank must call it."""
        self._started("barrier")
        self._hooks.collective_barrier(name=name or "", group=None)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Let rank 0 (of each node, if `local`) run what is inside before all others. Every rank must enter it."""
        self._started("rank_zero_first")
        first = (self.local_rank if local else self.global_rank) == 0
        if not first:
            self.barrier("rank_zero_first")
        try:
            yield
        finally:
            if first:
                self.barrier("rank_zero_first")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on global rank 0 alone."""
        if self.is_global_zero:
            print(*args, **kwargs)

    # ---------------------------------------------------------------- state

    def save(
        self,
        path: Any,
        state: Any,
        filter: Mapping[str, Filter] | None = None,
        *,
        wait: bool = True,
    ) -> SaveHandle | None:
        """Write `state` at `path`; a crash at any instant leaves what was there whole. Every rank must call it.

        Args:
            path: where; a mapping here and a path second (``torch.save``'s order) is understood too.
            state: objects with a ``state_dict``, tensors, plain values, and dicts and lists of those.
            filter: for a key of `state`, which entries of that object are saved: ``f(name, value) -> bool``.
            wait: False lets a checkpoint plugin that can save in the background.

        Raises:
            CheckpointError: on all ranks; what was at `path` before is still there.
        """
        self._started("save")
        return saving.save(self._session, path, state, filters=filter, loaders=self._loader_states, wait=wait)

    def load(
        self,
        path: Any,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Put what lies at `path` into the objects of `state`, and its plain values into the dict itself.

        Every rank must call it. Everything is checked before the first value is written.

        Args:
            state: as it was given to `save`; None returns the content instead.
            strict: whether every key must be there and have a place.
            weights_only: False lets a ``torch.save`` file of somebody else run code; never needed for our own.

        Returns:
            What has no place in `state`.

        Raises:
            CheckpointCorruptError: if it is not what was written.
            CheckpointMismatchError: listing every missing and unexpected key and wrong shape.
        """
        self._started("load")
        return saving.load(
            self._session, path, state, strict=strict, loaders=self._loader_states, weights_only=weights_only
        )

    def load_raw(self, path: Any, obj: Any, strict: bool = True, *, weights_only: bool | None = None) -> None:
        """Put the bare ``state_dict`` that lies at `path` into `obj`. Every rank must call it."""
        self._started("load_raw")
        saving.load_raw(self._session, path, obj, strict=strict, weights_only=weights_only)

    # ---------------------------------------------------------------- telling

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method `hook_name` of every callback that has it, in the order they were passed.

        Raises:
            SettingError: if a callback has an attribute of that name that cannot be called.
        """
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                raise SettingError(
                    f"{type(callback).__name__}.{hook_name} is no method: call() cannot call it."
                )
            method(*args, **kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Hand one metric to every logger."""
        self.log_dict({name: value}, step=step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand metrics (numbers, or tensors of one element) to every logger, on global rank 0."""
        self._started("log")
        if not self.loggers:
            warnings.warn(
                "log() has no effect: there is no logger. Pass one: Lite(loggers='csv').",
                PlugframeWarning,
                stacklevel=3,
            )
            return
        if self.is_global_zero:
            self._hooks.logger_log(metrics={k: _number(k, v) for k, v in metrics.items()}, step=step)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
        """Seed every generator, on every device; see `plugframe.seed_everything`."""
        return seeds.seed_everything(seed, workers, verbose)


def _rank_main(
    cls: type[Lite], state: dict[str, Any], function: Any, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Run a launched function on a rank: make the `Lite` of this process, call, tear down."""
    lite = cls.__new__(cls)
    lite.__setstate__(state)
    with lite:
        lite._started("launch")
        return function(lite, *args, **kwargs)


def _on_every_rank(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the ``run`` of a subclass start the ranks it needs and return rank 0's result."""

    @functools.wraps(run)
    def wrapper(self: Lite, *args: Any, **kwargs: Any) -> Any:
        if self._alone():
            self._started("run")
            return run(self, *args, **kwargs)
        return self.launch(_call_run, *args, **kwargs)

    return wrapper


def _call_run(lite: Any, *args: Any, **kwargs: Any) -> Any:
    return lite.run(*args, **kwargs)


def _release(reference: weakref.ref[Any], release: Callable[[Any], Any]) -> None:
    obj = reference()
    if obj is not None and state_of(obj) is not None:
        release(obj)


@contextmanager
def _entered_last(stack: ExitStack, context: AbstractContextManager[Any]) -> Iterator[None]:
    with stack, context:
        yield


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise SettingError(
            f"log({name!r}): a metric is one number, got a tensor of shape {tuple(value.shape)}."
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SettingError(f"log({name!r}): a metric is one number, got {value!r}.") from None


def _callback(callback: Any) -> Any:
    """Return a callback object; on a command line it is written ``package.module:Class``."""
    if not isinstance(callback, str):
        return callback() if isinstance(callback, type) else callback
    import importlib

    module_name, colon, attribute = callback.partition(":")
    if not colon:
        raise SettingError(f"callbacks={callback!r}: write 'package.module:Class'.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingError(f"callbacks={callback!r}: {error}.") from error
    if not hasattr(module, attribute):
        raise SettingError(
            f"callbacks={callback!r}: {module_name} has no {attribute!r}.{closest(attribute, dir(module))}"
        )
    return getattr(module, attribute)()
