"""The part of `Lite` that all others stand on: settings, plan, session, and where this rank stands."""

from __future__ import annotations

import atexit
import importlib
import os
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from plugframe.adopt.module import Phase, counting
from plugframe.adopt.replaced import Successors
from plugframe.core.config.request import FROM_COMMAND_LINE, gather
from plugframe.core.planning.resolve import resolve
from plugframe.core.registry.registry import Registry
from plugframe.core.runtime.session import Session
from plugframe.data.loaders import Loaders
from plugframe.data.random_streams import RankStreams
from plugframe.data.shared_seed import SharedSeed
from plugframe.diagnostics.diagnostics import Diagnostics
from plugframe.errors import SettingError, closest
from plugframe.hooks.context import Context
from plugframe.launch import start
from plugframe.launch.inheritance import RankEnvironment, own_variables
from plugframe.launch.preemption import PreemptionHandler
from plugframe.utils.logging import tell, warn_caller

if TYPE_CHECKING:
    from typing_extensions import Self

Devices = int | str | list[int] | tuple[int, ...]


class Core:
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
        timeout_s: seconds a collective may take before it is an error that says where every rank is; 30 minutes.
        report_after_s: seconds after which one line on stderr says which ranks wait in a collective and where the
            others are, while the job goes on waiting; 30, and 0 for never.
        diagnostics: whether collective calls are recorded, to report and explain those that a rank does not reach,
            and the plugins of all ranks are compared; True. Without, a job that hangs does so until its timeout.

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
        timeout_s: float | None = None,
        report_after_s: float | None = None,
        diagnostics: bool | None = None,
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
            "timeout_s": timeout_s,
            "report_after_s": report_after_s,
            "diagnostics": diagnostics,
        }
        self._resolve()

    def _resolve(self, *, travelled: bool = False) -> None:
        self._rank_environment = RankEnvironment(unpickled=travelled)
        weakref.finalize(self, self._rank_environment.close).atexit = False
        self._request = gather(self._settings)
        self._registry = Registry.discover()
        self._request = replace(self._request, notes=(*self._request.notes, *self._registry.notes()))
        self.plan = resolve(self._request, self._registry, os.environ)
        if self.plan.launched or (self.plan.world_size == 1 and FROM_COMMAND_LINE in os.environ):
            self._rank_environment.claim(own_variables(self._registry))
        self._callbacks = [_callback(c) for c in self._request.value("callbacks", ())]
        self._diagnostics = Diagnostics(self.plan) if self.plan.diagnostics else None
        observers = [SharedSeed(), *([self._diagnostics] if self._diagnostics is not None else [])]
        self._session = Session(self.plan, self._registry, [*self._callbacks, *observers])
        self._hooks = self._session.hooks
        for message in self._session.deprecations if self.global_rank == 0 else ():
            warn_caller(message)
        self._modules: list[weakref.ref[nn.Module]] = []
        self._phase = Phase()
        self._loaders = Loaders(self._phase.weights)
        self._preemption = PreemptionHandler()
        self._streams: RankStreams | None = None
        self._successors = Successors()

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process as settings and the subclass's own attributes; there the plan is made anew."""
        own = (
            "_request",
            "_registry",
            "plan",
            "_callbacks",
            "_session",
            "_diagnostics",
            "_hooks",
            "_modules",
            "_loaders",
            "_phase",
            "_preemption",
            "_rank_environment",
            "_streams",
            "_successors",
        )
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._resolve(travelled=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.teardown()

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

    def extension(self, name: str) -> Any:
        """Return the extension in use under that name: the object itself, for what can be asked of it.

        Raises:
            SettingError: if it is not in use.
        """
        found = self._session.extensions
        if name not in found:
            used = ", ".join(choice.name for choice in self.plan.extensions) or "none"
            raise SettingError(
                f"extension({name!r}): no such extension is in use.{closest(str(name), found)} In use: {used}. "
                f"Lite(plugins={name!r}) or --plugins={name} adds it."
            )
        return found[name]

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
            raise SettingError(self._no_logger())
        return self.loggers[0]

    def _no_logger(self) -> str:
        first, *others = self._registry.names("logger") or ["name"]
        or_others = f", or {', '.join(others)}" if others else ""
        return f"There is no logger: pass one, as in Lite(loggers={first!r}){or_others}."

    def teardown(self) -> None:
        """End the job on this rank and give every object back as it was. It may be called twice."""
        self._session.close()
        self._streams = self._phase.draws = None
        self._modules.clear()
        self._loaders.clear()
        self._preemption.close()
        self._rank_environment.close()
        atexit.unregister(self._session.close)

    def _alone(self) -> bool:
        return self._session.context is not None or self.plan.launched or self.plan.world_size == 1

    def _living(self) -> list[nn.Module]:
        """Return the modules that were set up and still exist, in that order."""
        return [module for module in (reference() for reference in self._modules) if module is not None]

    def _started(self, call: str) -> Context:
        """Return the context, starting this rank if it is the first call that needs it."""
        session = self._session
        if session.context is None:
            if not self._alone():
                raise start.not_launched(self.plan, call)
            self._rank_environment.check(call, launched=self.plan.launched)
            context = session.start()
            if context.world.global_rank == 0:
                tell(self.plan.line())
            self._phase.explain = self._diagnostics.explain if self._diagnostics is not None else None
            if self.world_size > 1:
                hooks: Any = self._hooks
                session.on_close(setattr, hooks, "strategy_no_sync", hooks.strategy_no_sync)
                hooks.strategy_no_sync = counting(self._phase, hooks.strategy_no_sync)
            atexit.register(session.close)
        return session.started()


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _callback(callback: Any) -> Any:
    """Return a callback object; on a command line it is written ``package.module:Class``."""
    if not isinstance(callback, str):
        made = callback() if isinstance(callback, type) else callback
        if made is None or isinstance(made, (int, float, bytes, list, tuple, dict, set)):
            text = "pass objects with methods that lite.call() may name, or write 'package.module:Class'."
            raise SettingError(f"callbacks={callback!r}: {text}")
        return made
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
