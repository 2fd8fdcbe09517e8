"""The `Lite` class."""

# One class in one file, as Fabric and httpx have theirs: signatures, overloads and docstrings are most of it.

from __future__ import annotations

import atexit
import builtins
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from plugframe.adopt.job_state import JobState, track_no_sync
from plugframe.adopt.replaced import ReplacedParameters
from plugframe.core.config.request import gather
from plugframe.core.planning.composition import COMPOSED
from plugframe.core.planning.resolve import resolve
from plugframe.core.registry.registry import Registry
from plugframe.core.runtime.session import Session
from plugframe.data.loaders import Loaders
from plugframe.data.shared_seed import SharedSeed
from plugframe.diagnostics.diagnostics import Diagnostics
from plugframe.errors import OrderError
from plugframe.hooks.kinds import SETUP_ORDER
from plugframe.hooks.variables import FROM_COMMAND_LINE, LAUNCHED
from plugframe.launch import start
from plugframe.launch.inheritance import RankEnvironment, own_variables
from plugframe.launch.preemption import PreemptionHandler
from plugframe.launch.termination import TerminationHandler
from plugframe.lite import (
    agreement,
    checkpointing,
    conversion,
    launch,
    logging,
    loop,
    metrics,
    plugins,
    pretrained,
    progress,
    ranks,
    raw_scripts,
    seeding,
    setup,
    splitting,
)
from plugframe.lite.accumulate import Accumulated
from plugframe.lite.adapted_logger import adapt, adapted
from plugframe.lite.callbacks import Callbacks
from plugframe.lite.composed import Composed
from plugframe.lite.inner import with_make
from plugframe.lite.plugins import as_tuple, callback_object
from plugframe.lite.start_line import start_line
from plugframe.state.plugins import PluginStates
from plugframe.utils.logging import tell, warn_caller
from plugframe.utils.process_error import ProcessError, failure
from plugframe.utils.rank_zero import running_on_rank_zero

if TYPE_CHECKING:
    import argparse
    from typing import Concatenate, SupportsFloat

    import torch
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer
    from typing_extensions import Self, Unpack

    from plugframe.data.random_streams import RankStreams
    from plugframe.hooks import (
        AcceleratorSpec,
        CheckpointSpec,
        CollectiveSpec,
        Context,
        EnvironmentSpec,
        LauncherSpec,
        LoggerSpec,
        PrecisionSpec,
        SaveHandle,
        StrategySpec,
    )
    from plugframe.lite import _names as names
    from plugframe.lite import _types as t
    from plugframe.lite.progress import Track
    from plugframe.state.filters import Filter
    from plugframe.state.manager import CheckpointManager


#: Calls that a rank may make by itself.
_OF_ONE_RANK = ("autocast", "to_device", "init_tensor", "mesh", "launch", "run", "free_memory")


class Lite:
    """Runs a raw PyTorch loop on any device, any number of ranks, in any precision.

    Every plugin argument takes a name (``"ddp"``), a name qualified by its package (``"acme-ddp:ddp"``) or a
    plugin object. ``"auto"`` selects among the installed plugins for this machine; ``lite.plan`` lists the reasons.

    Args:
        accelerator: type of device.
        strategy: how model, optimizer and data are distributed over the ranks. Several are combined as in
            ``"fsdp+tensor_parallel"``, or as a list.
        devices: a count, a list of indices, ``"0,2"``, or ``-1`` or ``"auto"`` for all; on each node.
        num_nodes: nodes of the job.
        mesh: number of ranks along each axis of the strategies: ``{"data": 2, "tensor": 4}``, with -1 for those left.
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16"``, …; None means ``"auto"``.
        collective: how ranks communicate.
        checkpoint: format of saved states.
        environment: the scheduler or launcher that started the processes.
        launcher: how to start the processes, if they do not exist yet.
        plugins: extensions by name, and plugin objects of any kind.
        callbacks: objects whose methods `call` calls, and whose ``on_…`` hooks are called.
        loggers: loggers by name, or objects, those of Fabric and Lightning included.
        timeout_s: seconds after which a collective raises an error with the position of every rank; default 30 minutes.
        report_after_s: seconds after which one line on stderr reports the ranks that wait in a collective and the
            position of the others, while the job keeps waiting; default 30, 0 for never.
        diagnostics: whether to record collective calls, to report and explain those that a rank does not join, and to
            compare the plugins of all ranks; default True. If False, a job that hangs does so until its timeout.

    Raises:
        UsageError: (and its subclasses) for an invalid setting, or one that contradicts the command line.
    """

    def __init__(
        self,
        accelerator: names.AcceleratorName | str | AcceleratorSpec = "auto",
        strategy: names.StrategyName | str | StrategySpec | Sequence[names.StrategyName | str | StrategySpec] = "auto",
        devices: t.Devices = "auto",
        num_nodes: int = 1,
        precision: names.PrecisionName | str | int | PrecisionSpec | None = None,
        plugins: names.ExtensionName | Sequence[names.ExtensionName | object] | object = (),
        *,
        mesh: Mapping[str, int] | None = None,
        collective: names.CollectiveName | str | CollectiveSpec = "auto",
        checkpoint: names.CheckpointName | str | CheckpointSpec = "auto",
        environment: names.EnvironmentName | str | EnvironmentSpec = "auto",
        launcher: names.LauncherName | str | LauncherSpec = "auto",
        callbacks: object = (),
        loggers: names.LoggerName | str | LoggerSpec | Sequence[names.LoggerName | str | LoggerSpec] | None = (),
        timeout_s: float | None = None,
        report_after_s: float | None = None,
        diagnostics: bool | None = None,
    ) -> None:
        self._settings = {
            "accelerator": accelerator,
            "strategy": strategy,
            "devices": devices,
            "num_nodes": None if num_nodes == 1 and not isinstance(num_nodes, bool) else num_nodes,
            "mesh": None if mesh is None else dict(mesh),
            "precision": precision,
            "collective": collective,
            "checkpoint": checkpoint,
            "environment": environment,
            "launcher": launcher,
            "plugins": as_tuple(plugins),
            "callbacks": as_tuple(callbacks),
            "loggers": as_tuple(loggers),
            "timeout_s": timeout_s,
            "report_after_s": report_after_s,
            "diagnostics": diagnostics,
        }
        self._resolve()

    def _resolve(self, *, travelled: bool = False) -> None:
        self._rank_environment = RankEnvironment(unpickled=travelled)
        weakref.finalize(self, self._rank_environment.close).atexit = False
        self._request = gather({**self._settings, "loggers": tuple(map(adapt, as_tuple(self._settings["loggers"])))})
        self._registry = Registry.discover()
        self._request = replace(self._request, notes=(*self._request.notes, *self._registry.notes()))
        self.plan = resolve(self._request, self._registry, os.environ)
        if self.plan.launched or (self.plan.world_size == 1 and FROM_COMMAND_LINE in os.environ):
            self._rank_environment.claim(own_variables(self._registry))
        self._callbacks = [callback_object(c) for c in self._request.value("callbacks", ())]
        self._listeners = Callbacks(self, self._callbacks)
        listener = self._listeners.listener()
        self._diagnostics = Diagnostics(self.plan) if self.plan.diagnostics else None
        observers = [
            *([listener] if listener is not None else []),
            SharedSeed(),
            *([self._diagnostics] if self._diagnostics is not None else []),
        ]
        self._composed = composed = Composed(self.plan, self._registry)
        self.plan = composed.plan
        before = {SETUP_ORDER[0]: with_make(self._registry)}
        if self.plan.mesh is not None:
            before[COMPOSED] = composed.start
        self._session = Session(self.plan, self._registry, [*self._callbacks, *observers], before)
        self._hooks = self._session.hooks
        self._plugin_states = PluginStates([*self._session.members, *composed.others], self._session)
        for message in self._session.deprecations if self.global_rank == 0 else ():
            warn_caller(message)
        self._modules: list[weakref.ref[nn.Module]] = []
        self._job_state = JobState()
        self._job_state.alone = self.plan.world_size == 1
        self._loaders = Loaders(self._job_state.weights)
        self._preemption = PreemptionHandler()
        self._process_error: ProcessError | None = None
        self._termination: TerminationHandler | None = None
        #: Loggers, by id, and what was warned that they do not store.
        self._not_stored: set[tuple[int, str]] = set()
        self._streams: RankStreams | None = None
        self._replaced_parameters = ReplacedParameters()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        run = getattr(cls, "run", None)
        # Its own, or that of a class beside this one which knows nothing of ranks.
        if isinstance(run, FunctionType) and not hasattr(run, launch.WRAPPED):
            setattr(cls, "run", launch.on_every_rank(run))  # noqa: B010

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as settings and the subclass's own attributes; there the plan is made anew."""
        own = (
            "_request",
            "_registry",
            "plan",
            "_callbacks",
            "_listeners",
            "_composed",
            "_session",
            "_diagnostics",
            "_hooks",
            "_plugin_states",
            "_modules",
            "_loaders",
            "_job_state",
            "_not_stored",
            "_preemption",
            "_process_error",
            "_rank_environment",
            "_streams",
            "_termination",
            "_replaced_parameters",
        )
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._resolve(travelled=True)

    # ---------------------------------------------------------------- the job

    @overload
    def launch(self, function: None = None) -> None: ...
    @overload
    def launch(self, function: Callable[Concatenate[Self, t.P], t.T], *args: t.P.args, **kwargs: t.P.kwargs) -> t.T: ...
    def launch(self, function: Callable[..., object] | None = None, *args: object, **kwargs: object) -> object:
        """Launch the job's ranks, if they do not run yet.

        If they run already (``plugframe run``, torchrun, a scheduler) or one is enough, the call returns. Otherwise,
        in a script, this process starts and supervises the ranks, and each runs the script from its beginning: code
        after the call runs on the ranks only, code before it once more on each.

        Args:
            function: called as ``function(lite, *args, **kwargs)`` on every rank. With it, this process goes on
                after the ranks have ended.

        Returns:
            What `function` returned: on rank 0, if ranks were started. None without a function.

        Raises:
            RankFailedError: if a rank failed while running `function`.
        """
        return launch.launch(self, function, args, kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.teardown()  # finds the exception by itself: a subclass may override it

    def teardown(self, error: BaseException | None = None) -> None:
        """End the job on this rank and restore all objects that were set up. It may be called twice.

        Loggers record a run that failed as failed: one whose ``with`` block, or whose process without one, ends with
        an exception or with ``sys.exit`` and a code other than 0.

        Args:
            error: the exception that ends the run; by default the one that is being handled, if any.
        """
        found = self._process_error.find() if self._process_error is not None else None
        try:
            self._session.close(failure(error) or found)
        finally:
            self._restore()

    def _restore(self) -> None:
        """Forget the user's objects, and restore the state of the process, once the plugins are torn down."""
        self._streams = self._job_state.random_check = self._job_state.accumulation = self._job_state.bar = None
        self._job_state.plain_backward = False
        self._modules.clear()
        self._loaders.clear()
        self._preemption.close()
        if self._termination is not None:
            self._termination.close()
            self._termination = None
        self._rank_environment.close()
        if self._process_error is not None:
            atexit.unregister(self._process_error.close)
            self._process_error.release()
            self._process_error = None

    def _alone(self) -> bool:
        return self._session.context is not None or self.plan.launched or self.plan.world_size == 1

    def _living(self) -> list[nn.Module]:
        """Return the modules that were set up and still exist, in that order."""
        return [module for module in (reference() for reference in self._modules) if module is not None]

    def _started(self, call: str) -> Context:
        """Return the context, starting this rank if it is the first call that needs it."""
        session = self._session
        inside = running_on_rank_zero()
        if inside is not None and self.world_size > 1 and call not in _OF_ONE_RANK:
            raise OrderError(f"{call}() in {inside}(), which runs on rank 0 alone: every rank must call it.")
        if session.context is None:
            if not self._alone():
                raise start.not_launched(self.plan, call)
            self._rank_environment.check(call, launched=self.plan.launched)
            raw_scripts.check_process_group(self)
            # Not in a rank that plugframe has started, which notes its exit code itself.
            watch_exit = bool(session.loggers) and not os.environ.get(LAUNCHED)
            self._process_error = ProcessError(session.close, watch_exit=watch_exit)
            context = session.start()
            if context.world.global_rank == 0:
                tell(start_line(self.plan))
            self._job_state.explain_error = self._diagnostics.explain if self._diagnostics is not None else None
            if self.world_size > 1:
                hooks: Any = self._hooks
                session.on_close(setattr, hooks, "strategy_no_sync", hooks.strategy_no_sync)
                hooks.strategy_no_sync = track_no_sync(self._job_state, hooks.strategy_no_sync)
            session.on_close(checkpointing.warn_of_unread_requests, self._preemption, context)
            atexit.register(self._process_error.close)
            if session.hooks.logger_teardown is not None and context.world.global_rank == 0:
                self._termination = TerminationHandler(lambda error: session.hooks.logger_teardown(error=error))
                session.on_close(self._termination.close)
        return session.started()

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return cast("torch.device", self._session.device)

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh of all ranks, with named dimensions: ``lite.mesh["tensor"].get_group()``.

        Raises:
            UnsupportedError: if the job has none: it is there with ``mesh=`` or several strategies.
        """
        return plugins.mesh(self)

    @property
    def global_rank(self) -> int:
        """The global rank, from 0."""
        return self._session.world.global_rank

    @property
    def local_rank(self) -> int:
        """The rank on this node, from 0."""
        return self._session.world.local_rank

    @property
    def node_rank(self) -> int:
        """The rank of this node, from 0."""
        return self._session.world.node_rank

    @property
    def world_size(self) -> int:
        """The number of ranks of the job."""
        return self.plan.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is global rank 0."""
        return self.global_rank == 0

    @property
    def strategy(self) -> Any:
        """The strategy plugin in use, for its own methods and attributes."""
        return self._session.plugins["strategy"]

    @property
    def accelerator(self) -> AcceleratorSpec:
        """The accelerator plugin in use."""
        return cast("AcceleratorSpec", self._session.plugins["accelerator"])

    @property
    def loggers(self) -> list[LoggerSpec]:
        """The logger plugins in use."""
        return [adapted(logger) for logger in self._session.loggers]

    @property
    def logger(self) -> LoggerSpec:
        """The first logger plugin in use.

        Raises:
            SettingError: if there is none.
        """
        return logging.first_logger(self)

    def extension(self, name: str) -> Any:
        """Return the extension in use under that name, for its own methods and attributes.

        Args:
            name: as it was selected, such as ``"ema"``.

        Returns:
            The plugin object.

        Raises:
            SettingError: if it is not in use.
        """
        return plugins.extension(self, name)

    # ---------------------------------------------------------------- modules, optimizers, loaders

    @overload
    def setup(
        self, module: t.M, *, scheduler: None = None, move_to_device: bool = True, forward_methods: t.Methods = ()
    ) -> t.M: ...
    @overload
    def setup(
        self, module: t.M, *, scheduler: t.S, move_to_device: bool = True, forward_methods: t.Methods = ()
    ) -> tuple[t.M, t.S]: ...
    @overload
    def setup(
        self,
        module: t.M,
        optimizer: t.O1,
        /,
        *,
        scheduler: None = None,
        move_to_device: bool = True,
        forward_methods: t.Methods = (),
    ) -> tuple[t.M, t.O1]: ...
    @overload
    def setup(
        self,
        module: t.M,
        optimizer: t.O1,
        /,
        *,
        scheduler: t.S,
        move_to_device: bool = True,
        forward_methods: t.Methods = (),
    ) -> tuple[t.M, t.O1, t.S]: ...
    @overload
    def setup(
        self,
        module: t.M,
        optimizer: t.O1,
        second: t.O2,
        /,
        *more: Unpack[t.Os],
        scheduler: None = None,
        move_to_device: bool = True,
        forward_methods: t.Methods = (),
    ) -> tuple[t.M, t.O1, t.O2, Unpack[t.Os]]: ...
    @overload
    def setup(
        self,
        module: t.M,
        optimizer: t.O1,
        second: t.O2,
        /,
        *more: Unpack[t.Os],
        scheduler: t.S,
        move_to_device: bool = True,
        forward_methods: t.Methods = (),
    ) -> tuple[t.M, t.O1, t.O2, Unpack[t.Os], t.S]: ...
    # A TypeVarTuple has no bound, so that the overloads take more than optimizers.
    def setup(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: object = None,
        move_to_device: bool = True,
        forward_methods: t.Methods = (),
    ) -> object:
        """Prepare a module and its optimizers, in place, and return them. Every rank must call it.

        Args:
            scheduler: returned as it is; schedulers need no set-up.
            move_to_device: whether to move the module to this rank's device; a strategy that shards always does.
            forward_methods: methods besides ``forward`` that run the module's parts and so must run under
                precision and strategy.

        Returns:
            The module alone, or a tuple of module, optimizers and scheduler, as they were given.
        """
        return setup.setup(
            self,
            module,
            optimizers,
            scheduler=scheduler,
            move_to_device=move_to_device,
            forward_methods=forward_methods,
        )

    def setup_module(self, module: t.M, move_to_device: bool = True, forward_methods: t.Methods = ()) -> t.M:
        """Prepare a module without optimizers, in place, and return it. Every rank must call it.

        Args:
            module: set up once, as in `setup`.
            move_to_device: whether it is moved to this rank's device.
            forward_methods: names of further methods that run its layers, as in `setup`.

        Returns:
            The same object.

        Raises:
            OrderError: if it was set up already.
        """
        return setup.setup_module(self, module, move_to_device=move_to_device, forward_methods=forward_methods)

    @overload
    def setup_optimizers(self, optimizer: t.O1, /) -> t.O1: ...
    @overload
    def setup_optimizers(
        self, optimizer: t.O1, second: t.O2, /, *more: Unpack[t.Os]
    ) -> tuple[t.O1, t.O2, Unpack[t.Os]]: ...
    # As above.
    def setup_optimizers(  # type: ignore[misc]  # pyright: ignore[reportInconsistentOverload]
        self, *optimizers: Optimizer
    ) -> object:
        """Prepare optimizers, after their module, and return them. Every rank must call it.

        Args:
            optimizers: of parameters of modules that `setup_module` prepared.

        Returns:
            The one that was given, or a tuple of them.

        Raises:
            OrderError: before any model is set up, or for one that was set up already.
        """
        return setup.setup_optimizers(self, optimizers)

    @overload
    def setup_dataloaders(
        self,
        dataloader: t.L1,
        /,
        *,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        weigh_uneven: bool = True,
        replace_sampler: bool | None = None,
    ) -> t.L1: ...
    @overload
    def setup_dataloaders(
        self,
        dataloader: t.L1,
        second: t.L2,
        /,
        *more: t.L2,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        weigh_uneven: bool = True,
        replace_sampler: bool | None = None,
    ) -> list[t.L1 | t.L2]: ...
    def setup_dataloaders(
        self,
        *dataloaders: Iterable[object],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        weigh_uneven: bool = True,
        replace_sampler: bool | None = None,
    ) -> object:
        """Divide the samples of loaders between the ranks, in place, and return the loaders. Every rank must call it.

        Other objects that yield batches when iterated (webdataset's ``WebLoader``, ``torchdata.nodes.Loader``) are
        divided by batches: every rank reads them all and keeps its share.

        The order of samples depends on the seed, the loader and the epoch alone: it is the same for any number
        of ranks. While training, all ranks take the same number of steps. While evaluating (gradients off, or
        every model in eval mode) every sample is read exactly once.

        Args:
            dataloaders: ``DataLoader`` objects, or others that yield batches each time they are iterated.
            use_distributed_sampler: False leaves the samples undivided.
            move_to_device: whether batches come on this rank's device.
            weigh_uneven: whether `backward` weighs a last batch that is smaller on some ranks, so that the mean
                over ranks stays the mean over samples; it is meant for losses that are means, see `backward`.
            replace_sampler: early Lite's name of `use_distributed_sampler`, deprecated.

        Returns:
            The one that was given, or a list of them.

        Raises:
            SettingError: on all ranks, if their data differ (lengths, indices, file lists, tensors; no sample is read),
                or if a dataset is known to divide itself between ranks. A stream whose first samples differ between
                ranks is refused when they are read.
        """
        return setup.setup_dataloaders(
            self,
            dataloaders,
            use_distributed_sampler=use_distributed_sampler,
            move_to_device=move_to_device,
            weigh_uneven=weigh_uneven,
            replace_sampler=replace_sampler,
        )

    def skip_first_batches(self, loader: t.L1, num_batches: int) -> t.L1:
        """Make the next pass over `loader` leave out its first batches, and return it; later passes are complete.

        Samples of a data set with indices are not read. `load` restores positions by itself.

        Args:
            loader: one that was set up.
            num_batches: number of batches of this rank.

        Returns:
            The same object.

        Raises:
            OrderError: if the loader was not set up, or begins at the position of a checkpoint.
            SettingError: if it has fewer batches.
        """
        return cast("t.L1", splitting.skip_first_batches(self, loader, num_batches))

    # ---------------------------------------------------------------- the training step

    def backward(
        self,
        tensor: Tensor,
        *args: Tensor | bool | None,
        model: nn.Module | None = None,
        batch: object = None,
        reduction: Literal["mean", "sum"] = "mean",
        weight: SupportsFloat | None = None,
        **kwargs: Unpack[t.BackwardArguments],
    ) -> None:
        """Compute gradients, in place of ``tensor.backward(*args, **kwargs)``. Every rank must call it.

        The resulting gradients equal those of one process on the batches of all ranks, for the loss given by
        `reduction`, and are unscaled under a loss scaler too. Batches of uneven size are weighted by their samples,
        whenever they were read: a batch is identified by the tensors that a model was called with, and a loss may add
        up several batches.

        Args:
            tensor: the loss of this rank's batch; 0-d, or any shape with ``gradient=``.
            model: the module of the loss, if several were set up and the strategy needs it.
            batch: the batch from the loader, or any part of it with tensors; needed only if batches are read ahead
                and models are called with new tensors computed from them.
            reduction: "mean" over the samples, or "sum": the gradients are those of the sum over the batches of
                all ranks. A loss that is divided by a number common to all ranks (of tokens, after
                ``lite.all_reduce``) is a sum.
            weight: number of tokens (or other units) that the loss of this rank is a mean of: the gradients are those
                of the mean over all tokens of all ranks, and of all micro-batches of `accumulate`.

        Raises:
            OrderError: if batches are uneven between ranks and there is no telling which of them the loss is of.
        """
        loop.backward(self, tensor, args, kwargs, model=model, batch=batch, reduction=reduction, weight=weight)

    def accumulate(
        self,
        loader: Iterable[t.T],
        *models: nn.Module,
        steps: int,
        weight: Callable[[t.T], SupportsFloat] | None = None,
    ) -> Accumulated[t.T]:
        """Return the batches of `loader`, to accumulate the gradients of `steps` of them for each optimizer step.

        ::

            for batch in lite.accumulate(loader, model, steps=4):
                loss = model(batch)
                lite.backward(loss)
                if not lite.accumulating:
                    optimizer.step()
                    optimizer.zero_grad()

        Gradients are synchronised once for each step, in the last micro-batch. `backward` divides a loss by the number
        of micro-batches: `steps`, or those left at the end of an epoch. Every rank must use it.

        Args:
            models: the modules to accumulate; without, all that were set up.
            steps: micro-batches for each optimizer step.
            weight: returns the number of tokens (or other units) of a batch on this rank, which its loss is a mean
                of: gradients are those of the mean over all tokens of a step. The batches of a step are read before.

        Raises:
            OrderError: from ``optimizer.step``, ``zero_grad`` and `clip_gradients` in the middle of a step, and if no
                optimizer steps after it.
        """
        return Accumulated(self, loader, models, steps=steps, weight=weight)

    @property
    def accumulating(self) -> bool:
        """Whether more micro-batches of `accumulate` follow before the optimizer steps; False outside of it."""
        return self._job_state.accumulating

    @property
    def batch_weight(self) -> float:
        """The weight of the current batch relative to those of the other ranks: samples × ranks / all samples.

        It is 1 but for a last batch that ranks share unevenly, and 0 for one a rank was given only to keep step.
        `backward` multiplies the loss by it; the mean over ranks of ``loss * lite.batch_weight`` is the mean over
        all samples. At hand is the batch that a model was called with, or the one that was read since.

        Raises:
            OrderError: if batches were read ahead, and there is no telling which is meant.
        """
        return loop.batch_weight(self)

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[object]:
        """Return a context in which gradients accumulate without synchronisation, for all but the last micro-batch.

        Forward and backward of the micro-batch both belong inside. `accumulate` does this by itself.

        Args:
            module: one that was set up.
            enabled: False for a context that does nothing.

        Returns:
            A context manager.

        Raises:
            OrderError: if the module was not set up.
        """
        return loop.no_backward_sync(self, module, enabled=enabled)

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

        Under a loss scaler a step with non-finite gradients is skipped by itself, and they are no error here.

        Args:
            module: the module of the parameters.
            optimizer: whose parameters are clipped.
            clip_val: the largest absolute value of an element; either this or `max_norm`.
            max_norm: the largest norm of all gradients together, those of other ranks' shards included.
            norm_type: of the p-norm; ``inf`` for the largest element.
            error_if_nonfinite: whether a norm that is not finite raises.

        Returns:
            For ``max_norm`` the total norm before clipping, a 0-d tensor, equal on all ranks; else None.

        Raises:
            RuntimeError: if the norm is not finite and `error_if_nonfinite`, on all ranks.
        """
        return loop.clip_gradients(
            self,
            module,
            optimizer,
            clip_val=clip_val,
            max_norm=max_norm,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )

    def finalize(self, module: t.M) -> t.M:
        """Return a trained module in the final form of the precision: quantized, after quantization-aware training.

        Every rank must call it. The module is released: it is a plain one afterwards. Most precisions change nothing.

        Args:
            module: one that was set up.

        Returns:
            The module, or what the precision makes of it.

        Raises:
            OrderError: if the module was not set up.
            UnsupportedError: if the strategy holds shards of it.
        """
        return conversion.finalize(self, module)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context the precision runs a forward in, for code outside of a module."""
        return loop.autocast(self)

    def to_device(self, obj: t.T) -> t.T:
        """Return `obj` on this rank's device.

        Args:
            obj: a module, which is moved in place, a tensor, or any nesting of tensors.

        Returns:
            The module, or a copy of the same structure; tensors that are on the device stay themselves.
        """
        return cast("t.T", loop.to_device(self, obj))

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """Return a context in which a module is built on this rank's device, in the precision's dtype.

        Args:
            empty_init: True builds big parameters and buffers without storage. They get their values when the
                module is set up, one after the other, and exactly those an eager build would have given them; a
                strategy that spreads parameters over the ranks never holds the whole model. What changes
                parameters belongs inside the context too: afterwards only `setup` may touch them.
        """
        return loop.init_module(self, empty_init=empty_init)

    def init_tensor(self) -> AbstractContextManager[None]:
        """Return a context in which tensors are created on this rank's device, in the precision's dtype."""
        return loop.init_tensor(self)

    # ---------------------------------------------------------------- between ranks

    @overload
    def all_gather(
        self,
        data: t.T,
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        as_object: Literal[True],
        timeout_s: float | None = None,
    ) -> list[t.T]: ...
    @overload
    def all_gather(
        self,
        data: t.Number,
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        timeout_s: float | None = None,
    ) -> Tensor: ...
    @overload
    def all_gather(
        self,
        data: t.Text,
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        timeout_s: float | None = None,
    ) -> list[t.Text]: ...
    @overload
    def all_gather(
        self,
        data: dict[t.K, t.N],
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        timeout_s: float | None = None,
    ) -> dict[t.K, Tensor]: ...
    @overload
    def all_gather(
        self,
        data: list[t.N],
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        timeout_s: float | None = None,
    ) -> list[Tensor]: ...
    @overload
    def all_gather(
        self,
        data: t.Nest,
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        timeout_s: float | None = None,
    ) -> t.Nest: ...
    @overload
    def all_gather(
        self,
        data: object,
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        as_object: bool = False,
        timeout_s: float | None = None,
    ) -> Any: ...
    def all_gather(
        self,
        data: object,
        group: t.Group = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        as_object: bool = False,
        timeout_s: float | None = None,
    ) -> object:
        """Return `data` with every tensor of shape S stacked over ranks: shape (ranks, *S), for one rank too.

        Numbers and arrays become tensors and are stacked too; any other object that can be pickled (a string, None)
        becomes the list of what the ranks have in its place. Dictionaries go by key, in any order. Every rank of the
        group must call it, with equal keys, lengths, types, shapes and dtypes.

        Args:
            sync_grads: whether gradients flow back through the result, to the input of every rank.
            pad: a value with which tensors of unequal shapes, of as many dimensions, are filled up to the largest.
            as_object: whether `data` is taken as one object, whatever is in it, and the list of those returned: what
                ranks have may differ then.
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.

        Raises:
            CollectiveMismatchError: if keys, shapes or dtypes differ, on all ranks, listing them.
            CollectiveTimeoutError: if a rank does not come in time, saying where every rank is.
        """
        return ranks.all_gather(
            self, data, group, sync_grads=sync_grads, pad=pad, as_object=as_object, timeout_s=timeout_s
        )

    @overload
    def all_reduce(
        self, data: t.Number, group: t.Group = None, reduce_op: t.Reduction = "mean", *, timeout_s: float | None = None
    ) -> Tensor: ...
    @overload
    def all_reduce(
        self,
        data: dict[t.K, t.N],
        group: t.Group = None,
        reduce_op: t.Reduction = "mean",
        *,
        timeout_s: float | None = None,
    ) -> dict[t.K, Tensor]: ...
    @overload
    def all_reduce(
        self,
        data: list[t.N],
        group: t.Group = None,
        reduce_op: t.Reduction = "mean",
        *,
        timeout_s: float | None = None,
    ) -> list[Tensor]: ...
    @overload
    def all_reduce(
        self, data: t.Nest, group: t.Group = None, reduce_op: t.Reduction = "mean", *, timeout_s: float | None = None
    ) -> t.Nest: ...
    @overload
    def all_reduce(
        self,
        data: t.Items[object] | Mapping[t.K, object],
        group: t.Group = None,
        reduce_op: t.Reduction = "mean",
        *,
        timeout_s: float | None = None,
    ) -> Any: ...
    def all_reduce(
        self,
        data: object,
        group: t.Group = None,
        reduce_op: t.Reduction = "mean",
        *,
        timeout_s: float | None = None,
    ) -> object:
        """Return `data` with every tensor reduced over ranks, of the same shape, for one rank too.

        A tensor without a graph is reduced in place and returned, as torch and Fabric do. One with a graph stays as
        it is, and gradients flow back through the new one to the input of every rank; every rank must then call
        backward. Numbers and arrays become tensors. The dtype of the result; those in brackets are new tensors,
        not reduced in place:

        ==========================  ==================  =================  ========
        passed                      sum, product        mean               min, max
        ==========================  ==================  =================  ========
        float32, float64, complex   the same            the same           the same
        float16, bfloat16, float8   (float32)           the same           the same
        int64                       the same            (float64)          the same
        other integers, bool        (int64)             (float64)          the same
        Python float, complex       float64             float64            float64
        Python int, bool            int64               float64            the same
        ==========================  ==================  =================  ========

        Half precision is added up in float32; where a sum is returned in float32, the tensor passed holds it rounded.
        Sums of int64 tensors wrap beyond 64 bits, as in torch. Expanded tensors are not reduced in place.

        Dictionaries go by key, in any order. Every rank of the group must call it, with equal keys, lengths, types,
        shapes and dtypes.

        Args:
            reduce_op: "mean" (or "avg"), "sum", "min", "max", "product", or one of `torch.distributed.ReduceOp`.
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.

        Raises:
            CollectiveMismatchError: if keys, shapes or dtypes differ, on all ranks, listing them.
            CollectiveTimeoutError: if a rank does not come in time, saying where every rank is.
        """
        return ranks.all_reduce(self, data, group, reduce_op, timeout_s=timeout_s)

    def broadcast(self, obj: t.T, src: int = 0, *, timeout_s: float | None = None) -> t.T:
        """Return global rank `src`'s object, its tensors on this rank's device. Every rank must call it.

        Args:
            obj: any object that can be pickled; what the other ranks pass is not looked at. One that cannot is an error
                on all ranks.
            src: the global rank whose object all get.
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.
        """
        return cast("t.T", ranks.broadcast(self, obj, src, timeout_s=timeout_s))

    def barrier(self, name: str | None = None, *, timeout_s: float | None = None) -> None:
        """Return once every rank has called it. Every rank must call it.

        Args:
            name: shown where a rank waits for others.
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.
        """
        ranks.barrier(self, name, timeout_s=timeout_s)

    def gather_for_metrics(self, data: t.T) -> t.T:
        """Return the rows of the batches of all ranks, in the order of the data set, equal on all ranks.

        Every rank must call it, in the loop over a loader that was set up, with values of the current batch::

            for x, y in test_loader:
                predictions, labels = lite.gather_for_metrics((model(x).argmax(1), y))
                metric.update(predictions, labels)  # torchmetrics, scikit-learn, lists: as in one process

        Each sample comes once: rows of a batch that only fills up the last step of a rank are left out. Ranks that
        read the same samples (tensor-parallel ones) count as one.

        Args:
            data: tensors and arrays with the batch as first dimension; lists with one entry for each sample, of any
                objects that can be pickled; and dicts, tuples and dataclasses of those.

        Returns:
            The same structure, types and dtypes; tensors detached, and on their device.

        Raises:
            OrderError: outside of a loop over a loader that was set up, or if batches were read ahead.
            SettingError: for values without a row for each sample, or if ``drop_last`` leaves out samples.
            CollectiveMismatchError: on all ranks, if they pass different structures or dtypes.
        """
        return cast("t.T", metrics.gather_for_metrics(self, data))

    def reduce_mean(self, value: t.T, weight: SupportsFloat) -> t.T | Tensor:
        """Return the mean over ranks of `value`, each weighted by `weight`. Every rank must call it.

        ::

            accuracy = lite.reduce_mean(correct / seen, weight=seen)

        A weight of 0 leaves a rank out, whatever its value. In a loop over a loader, pass value and weight of the
        current batch: one that only fills up the last step of a rank does not count.

        Args:
            value: a tensor, a number, or dicts, lists and tuples of them.
            weight: number of samples, or tokens, that the value of this rank is a mean of.

        Returns:
            The same structure of tensors, without gradients; NaN if all weights are 0.

        Raises:
            SettingError: for a negative weight, or one that is no number.
        """
        return cast("t.T | Tensor", metrics.reduce_mean(self, value, weight))

    def split_between_processes(self, data: t.T, apply_padding: bool = False) -> AbstractContextManager[t.T]:
        """Return a context with this rank's part of `data`: consecutive items, the first ranks have one more.

        ::

            with lite.split_between_processes(prompts) as mine:
                answers = [generate(prompt) for prompt in mine]
            answers = sum(lite.all_gather(answers, as_object=True), [])  # in the order of the prompts

        Ranks that read the same samples (tensor-parallel ones) get the same part.

        Args:
            data: a list, tuple, tensor or array, equal on all ranks, or a dict of those.
            apply_padding: whether parts are filled up with the last item, so that all have the same length.
        """
        return splitting.split_between_processes(self, data, apply_padding=apply_padding)

    def pad_across_processes(self, data: t.T, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> t.T:
        """Return `data` with every tensor padded along `dim` to the largest size of any rank. Every rank must call it.

        Args:
            pad_index: the value to fill with.
            pad_first: whether to fill at the beginning.

        Raises:
            CollectiveMismatchError: if structures or numbers of dimensions differ.
        """
        return cast("t.T", splitting.pad_across_processes(self, data, dim, pad_index, pad_first=pad_first))

    def free_memory(self) -> None:
        """Collect garbage and return the memory that torch has cached to the device; delete your references before."""
        splitting.free_memory(self)

    def agree(self, flag: object, how: Literal["any", "all", "rank_zero"] = "any") -> bool:
        """Return whether `flag` is true on any rank, on all ranks, or on rank 0: the same on all ranks.

        Every rank must call it. For decisions that a script takes by values of one rank: to stop, to skip, to save::

            if lite.agree(loss > limit):
                break

        Args:
            flag: a bool, a number, or a tensor of one element.

        Raises:
            SettingError: for another type of flag, or another `how`.
        """
        return agreement.agree(self, flag, how)

    def assert_in_sync(self, *objects: nn.Module | Optimizer) -> None:
        """Check that parameters and optimizer states are bitwise equal on all ranks.

        Every rank must call it.

        Args:
            objects: modules and optimizers; without, every module that was set up.

        Raises:
            OutOfSyncError: on all ranks, naming the first that differs and the ranks that have another one.
            UnsupportedError: under a strategy that keeps a part of the model on each rank: nothing is there twice.
        """
        ranks.assert_in_sync(self, objects)

    def rank_zero_first(self, local: bool = False) -> AbstractContextManager[None]:
        """Run the block on rank 0 before all others. Every rank must enter it.

        Args:
            local: whether on rank 0 of each node, for what each node downloads or caches for itself.

        Returns:
            A context manager.
        """
        return ranks.rank_zero_first(self, local=local)

    def print(
        self,
        *args: object,
        sep: str | None = " ",
        end: str | None = "\n",
        file: t.Writable | None = None,
        flush: bool = False,
    ) -> None:
        """Print on global rank 0 only.

        Args:
            args: as for the built-in ``print``, as are `sep`, `end`, `file` and `flush`.
        """
        if self.is_global_zero:
            progress.hide(self)
            builtins.print(*args, sep=sep, end=end, file=file, flush=flush)

    def track(self, items: Iterable[t.T], label: str = "", **values: object) -> Track[t.T]:
        """Return the items of `items`, with one progress bar on global rank 0: rate, values and time left.

        ::

            for batch in (bar := lite.track(loader, "epoch 3")):
                ...
                bar.update(loss=loss)

        A terminal shows a bar on stderr, a notebook one in the cell; otherwise a plain line is printed every 10 seconds
        and at the end.

        Args:
            label: shown in front.
            values: shown behind: numbers, tensors of one element, or functions that return them
                (``loss=lambda: loss``). They are read when the bar is drawn, so that no step waits for a device.
        """
        return progress.track(self, items, label, values)

    # ---------------------------------------------------------------- checkpoints

    @overload
    def save(
        self,
        path: t.StrPath,
        state: Mapping[str, object],
        filter: Mapping[str, Filter] | None = None,
        *,
        wait: bool = True,
    ) -> SaveHandle | None: ...
    @overload
    def save(
        self,
        state: Mapping[str, object],
        path: t.StrPath,
        /,
        filter: Mapping[str, Filter] | None = None,
        *,
        wait: bool = True,
    ) -> SaveHandle | None: ...
    def save(
        self, path: object, state: object, filter: Mapping[str, Filter] | None = None, *, wait: bool = True
    ) -> SaveHandle | None:
        """Write `state` at `path`; a crash at any time leaves the previous checkpoint intact. Every rank must call it.

        The state of the run is added: random generators, loss scale, positions of loaders, and the state of plugins.

        Args:
            path: where; a mapping here and a path second (``torch.save``'s order) is understood too.
            state: objects with a ``state_dict``, tensors, plain values, and dicts and lists of those.
            filter: for a key of `state`, which entries of that object are saved: ``f(name, value) -> bool``.
            wait: False lets a checkpoint plugin that can save in the background.

        Returns:
            A handle to wait with, if the checkpoint is still being written; else None.

        Raises:
            CheckpointError: on all ranks; what was at `path` before is still there.
        """
        return checkpointing.save(self, path, state, filter=filter, wait=wait)

    def load(
        self,
        path: t.StrPath,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        trusted: bool = False,
        rng: bool = True,
    ) -> dict[str, Any]:
        """Load the checkpoint at `path` into the objects of `state`, and its plain values into the dict itself.

        Every rank must call it. Everything is checked before the first value is written.

        Args:
            state: as it was given to `save`; None returns the content instead.
            strict: whether every key must be there and have a place.
            weights_only: taken for scripts that pass it, and without effect: only `trusted` lets a file run code.
            trusted: let a file or folder that another tool wrote with pickle run the code in it; never needed, and
                without effect, for what plugframe wrote.
            rng: whether to restore the states of the random generators. Those of another version of Python, NumPy or
                torch may not fit the generators here, and are refused; False goes on without them.

        Returns:
            What has no place in `state`.

        Raises:
            CheckpointCorruptError: if it is not what was written.
            CheckpointMismatchError: listing every missing and unexpected key and wrong shape.
        """
        return checkpointing.load(self, path, state, strict=strict, trusted=trusted, rng=rng)

    def load_raw(
        self,
        path: t.StrPath,
        obj: t.Stateful,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        trusted: bool = False,
    ) -> None:
        """Load the bare ``state_dict`` at `path` into `obj`. Every rank must call it. See `load`.

        Args:
            path: a file or folder with the state of one object, such as ``torch.save(state_dict, path)`` writes.
            obj: a module, an optimizer, or another object with ``load_state_dict``.
            strict: whether keys that are missing or unexpected raise.
            weights_only: Fabric's name of the opposite of `trusted`.
            trusted: whether a foreign file may run code.

        Raises:
            CheckpointError: (and its subclasses) if the file is missing, damaged, or does not match `obj`.
        """
        checkpointing.load_raw(self, path, obj, strict=strict, trusted=trusted)

    def state_dict(self, obj: nn.Module | Optimizer, *, all_ranks: bool = False) -> dict[str, Any]:
        """Return the full state of a module or an optimizer, as in a single process. Every rank must call it.

        Under every strategy: complete tensors, copies on the CPU, under the user's own keys. It is what
        ``torch.save(lite.state_dict(model), path)`` may write on rank 0, and what ``load_state_dict`` of a plain
        module or optimizer takes.

        Args:
            obj: a module or an optimizer, set up or not.
            all_ranks: whether every rank gets it; else ranks above 0 get an empty dict.

        Raises:
            SettingError: for another type of object.
        """
        return checkpointing.state_dict(self, obj, all_ranks=all_ranks)

    def save_model(self, module: nn.Module, folder: t.StrPath, *, max_shard_size: int | str = "5GB") -> None:
        """Write a module's full weights into a folder, in Hugging Face's layout. Every rank must call it.

        Under every strategy: ``model.safetensors``, or several files and ``model.safetensors.index.json``. A model with
        ``save_pretrained`` writes the folder itself, with its configuration. It is for sharing a model: `save` writes
        what a run resumes from.

        Args:
            module: a module that was set up.
            max_shard_size: largest size of one file: a number of bytes, or ``"5GB"``, ``"500MB"``.

        Raises:
            SettingError: for another size, or a folder that is a file.
            OrderError: if the module was not set up.
            CheckpointError: on all ranks, if rank 0 cannot write.
        """
        pretrained.save_model(self, module, folder, max_shard_size=max_shard_size)

    def checkpoints(
        self,
        folder: t.StrPath,
        *,
        keep_last: int | None = 3,
        keep_best: tuple[str, Literal["min", "max"], int] | None = None,
        every_s: float | None = None,
    ) -> CheckpointManager:
        """Return a checkpoint manager for this run: it schedules saves, removes old checkpoints and resumes.

        ::

            manager = lite.checkpoints("runs/a", keep_last=3, keep_best=("val_loss", "min", 1), every_s=600)
            state = {"model": model, "optimizer": optimizer}
            manager.resume(state)  # from the newest intact checkpoint, if there is one
            for step in range(manager.step + 1, steps + 1):
                ...
                manager.save(step, state, {"val_loss": loss}, force=lite.should_stop)

        Every rank must call each of its methods.

        Args:
            folder: the folder of the run; created at the first save.
            keep_last: number of newest checkpoints to keep; None keeps all.
            keep_best: a metric, ``"min"`` or ``"max"``, and the number of best checkpoints to keep besides.
            every_s: minimum seconds between saves; None saves at every call.
        """
        return checkpointing.checkpoints(self, folder, keep_last=keep_last, keep_best=keep_best, every_s=every_s)

    @property
    def should_stop(self) -> bool:
        """Whether to leave the loop, save and end: a rank received SIGTERM or SIGUSR1, or a plugin requests a stop.

        Every rank must read it. All ranks get the same value for the same read, so that all leave the loop at the same
        batch. From the first read on these signals no longer end the process; SIGINT and SIGKILL do.
        """
        return checkpointing.should_stop(self)

    def requeue(self) -> bool:
        """Requeue this job with the scheduler. Every rank must call it; global rank 0 makes the request.

        Returns:
            Whether there is a scheduler that supports it.
        """
        return checkpointing.requeue(self)

    # ---------------------------------------------------------------- callbacks, metrics, seeds

    def call(self, hook_name: str, *args: object, **kwargs: object) -> None:
        """Call the method `hook_name` of every callback that has it, in the order they were passed.

        Each gets those of the keyword arguments that it takes. plugframe itself calls, without a call here:
        ``on_launch``, ``on_setup``, ``on_backward``, ``on_optimizer_step``, ``on_save``, ``on_load``, ``on_teardown``,
        and, under Fabric's names, ``on_after_setup`` and ``on_after_optimizer_step``.

        Args:
            hook_name: such as ``"on_epoch_end"``.
            args: given to every method, first.
            kwargs: given by name, to the methods that take them.

        Raises:
            SettingError: if a callback has an attribute of that name that cannot be called.
        """
        self._listeners.call(hook_name, args, kwargs)

    def log(self, name: str, value: SupportsFloat, step: int | None = None) -> None:
        """Log one metric to every logger; extensions that watch metrics get it on every rank that calls this.

        Args:
            name: of the metric.
            value: a number, or a tensor of one element. Global rank 0 records its own: reduce it before.
            step: of the run; by default calls are counted, from 0.
        """
        self.log_dict({name: value}, step=step)

    def log_dict(self, metrics: Mapping[str, SupportsFloat], step: int | None = None) -> None:
        """Log metrics to every logger, on global rank 0.

        Args:
            metrics: numbers, or tensors of one element, by name.
            step: of the run; by default calls are counted, from 0.
        """
        logging.log_dict(self, metrics, step)

    def log_hyperparams(self, params: Mapping[str, object] | t.Dataclass | argparse.Namespace) -> None:
        """Record hyperparameters in every logger, on global rank 0. Other ranks may call it, and do nothing.

        ::

            lite.log_hyperparams({"lr": 0.1, "model": {"layers": 2}})  # recorded as lr and model/layers

        Of a name that is recorded twice, the later value counts.

        Args:
            params: a mapping, a dataclass object or a namespace, nested to any depth; nested names are joined with
                ``/``. Values are JSON: str, int, float (NaN and infinities included), bool, None, and lists and tuples
                of them; tensors and arrays of one number count as numbers. Of other values, ``str`` is recorded.

        Raises:
            SettingError: for another type, for two values of one name, or for a container that holds itself.
        """
        logging.log_hyperparams(self, params)

    def log_artifact(
        self, name: str, value: str | os.PathLike[str] | t.Rows | Tensor | t.Array | t.Image, step: int | None = None
    ) -> None:
        """Record an image, a table, text or a file in every logger, on global rank 0.

        Other ranks may call it, and do nothing. A logger that cannot store one of the kinds warns once. An artifact of
        the same name and step is replaced.

        Args:
            name: such as ``"samples/first"``: letters, digits, spaces and ``.-_+=()`` in parts separated by ``/``.
            value: by its type,

                - an image: a tensor of shape ``(H, W)`` or ``(C, H, W)``, or an array or PIL image of shape ``(H, W)``
                  or ``(H, W, C)``, where C is 1 (gray), 3 (RGB) or 4 (RGBA). Dtype uint8, bool, or floating from
                  0 to 1.
                - a table: a list of dicts, one for each row. A missing cell is None; cells that are no str, int,
                  float, bool or None are recorded by their ``str``.
                - text: a str
                - a file: a ``Path``; it is copied at the call
            step: the training step it belongs to; None for none.

        Raises:
            SettingError: for another type, shape, dtype or range, a file that does not exist, or an invalid name.
        """
        logging.log_artifact(self, name, value, step)

    seed_everything = seeding.Seeding()
