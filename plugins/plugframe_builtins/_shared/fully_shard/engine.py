"""What FSDP keeps beside a module: ``fully_shard`` over a shim, so that the module's own class stays."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plugframe.base import ForwardShim, map_tensors, replicated_buffers, sync_buffers
from plugframe.errors import CollectiveMismatchError, OrderError, UnsupportedError, UsageError
from plugframe_builtins._shared.fully_shard.added_parameters import check_added
from plugframe_builtins._shared.fully_shard.gathered_copies import GatheredCopies
from plugframe_builtins._shared.fully_shard.unit_order import Channel, UnitOrder
from plugframe_builtins._shared.fully_shard.used_parameters import UsedParameters, owned_parameters
from plugframe_builtins._shared.sharding.gradient_hooks import gradients_before, hooked, run_hooks
from plugframe_builtins._shared.sharding.uneven_evaluation import UnevenEvaluation


class Shim(ForwardShim):
    """Runs a call, and shows torch every tensor that comes out of it, in whatever it comes.

    torch looks for tensors in tuples, lists and dicts; of another object it would not see that its backward begins.
    """

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            tensors.append(_no_view(tensor))
            return tensors[-1]

        result = map_tensors(note, super().forward(call, *args, **kwargs))
        return tensors, _Sealed(result)


class _Sealed:
    def __init__(self, content: Any) -> None:
        self.content = content


def show_outputs(unit: nn.Module) -> None:
    """Have a unit's outputs be no views, before it is sharded: torch attaches to them what begins their backward."""
    unit.register_forward_hook(lambda unit, args, output: map_tensors(_no_view, output))


def _no_view(tensor: Tensor) -> Tensor:
    # Changed in place, a view would lose what is attached to it.
    if not (tensor.requires_grad and tensor._is_view()):
        return tensor
    own: Tensor = _NoView.apply(tensor)  # type: ignore[no-untyped-call]
    return own


class _NoView(torch.autograd.Function):
    """The same memory as a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Engine:
    """``engine(call, *args)`` runs ``call(*args)`` on gathered parameters, so that backward averages gradients.

    Args:
        shim: over the module, sharded.
        units: the sharded blocks, in the order of the model.
        evaluation: what the ranks that evaluate tell each other.
        channel: of the ranks that train.
        strategy: its name, for messages.
        frees: whether parameters are freed before the end of a backward.

    Attributes:
        local: whether gradients were accumulated that were not averaged since.
        stale_buffers: whether a forward may have changed the buffers since they were equal.
        added: whether parameters or parts may have been added to the module since it was sharded.
    """

    def __init__(
        self,
        shim: Shim,
        units: Sequence[nn.Module],
        evaluation: UnevenEvaluation,
        channel: Channel,
        strategy: str,
        frees: bool,
    ) -> None:
        self.shim = shim
        self.local = self.stale_buffers = self.added = False
        sharded: Any = shim  # an FSDPModule too
        self._sharded = sharded
        self._units = tuple(units)
        self._strategy = strategy
        self._has_buffers = bool(replicated_buffers(shim.module))
        self._evaluation = evaluation
        self._number = evaluation.join(self)
        self._averages = True
        self._inside = self._closed = self._training = self._made = self._in_backward = self._ran = False
        self._frees = frees
        if not frees:
            sharded.set_reshard_after_backward(False)
        # In the order in which the last forward came to them.
        self._visited: list[nn.Module] = []
        self._position = {id(unit): number for number, unit in enumerate(self._units)}
        parameters, owners = owned_parameters(shim.module)
        self._parameters = parameters
        self._gathered = GatheredCopies(shim.module)
        self._paths: UnitOrder | None = None
        self._used: UsedParameters | None = None
        if channel.open:
            model = type(shim.module).__name__
            paths = {id(part): path for path, part in shim.module.named_modules()}
            names = [paths[id(unit)] for unit in self._units]
            self._paths = UnitOrder(channel, self._number, names, self._pass_through, model, evaluation.checksum)
            if hasattr(shim, "set_reduce_scatter_unused_params"):  # from torch 2.13 on
                sharded.set_reduce_scatter_unused_params(True)
            self._used = UsedParameters(channel, parameters, owners, model)
        self._watch(owners)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.added:
            self._check_added()
        self._gathered.check()
        if torch.is_inference_mode_enabled() and not self._made:
            # What is gathered for the first time must not be for inference only: it trains later.
            with torch.inference_mode(False), torch.no_grad():
                return self._run(call, args, kwargs)
        return self._run(call, args, kwargs)

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        trains = self._training = torch.is_grad_enabled() and self.shim.module.training
        if trains:
            self.stale_buffers = self._has_buffers
            if self._paths is not None:
                self._paths.begin()
        else:
            self._evaluation.announce(self._number)
        self._ran |= torch.is_grad_enabled()
        self._visited.clear()
        self._inside = True
        try:
            _, sealed = self.shim(call, *args, **kwargs)
            if self._training and self._paths is not None:
                self._paths.end()
        except BaseException:
            self.reset()
            raise
        finally:
            self._inside = self._training = False
        if torch.is_grad_enabled() and (trains or not self._frees):
            self._gathered.note()
        else:
            # With gradients too: a rank that only helped has its part alone again, and all must gather next time.
            self.reshard()
        self._made = True
        return sealed.content

    def sync_buffers(self, hooks: Any) -> None:
        """Give every rank rank 0's buffers, so that all ranks evaluate one model. Every rank must call it."""
        sync_buffers(self.shim.module, hooks)
        self.stale_buffers = False

    def before_step(self) -> None:
        """Refuse a step on gradients that are not those of the whole model. Every rank must call it.

        Raises:
            CollectiveMismatchError: if the ranks ran different parts.
            OrderError: if parameters were added after set-up.
        """
        if self.added:
            self._check_added()
        self.settle()

    def settle(self) -> None:
        """Wait for what the ranks have told each other of the last forward and backward."""
        if self._paths is not None:
            self._paths.settle()
        if self._used is not None:
            self._used.settle()

    def reset(self) -> None:
        """Forget a forward that failed, so that the next one can run."""
        # From torch 2.13 on; before, a forward after a failed one fails as well.
        reset = getattr(self._sharded, "reset_iter_state", None)
        if reset is not None:
            reset()

    def forget(self) -> None:
        """Drop gradients that were accumulated and not averaged. Every rank must call it: it gathers."""
        self.local = False
        for part in self.shim.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
                for parameter in part.parameters():  # those of units within are gathered in their turn
                    parameter.grad = None if not isinstance(parameter, DTensor) else parameter.grad
                part.reshard()

    def close(self) -> None:
        """Have the module say that it ran in a job which has ended."""
        self._closed = True

    def reshard(self) -> None:
        """Free the parameters that are gathered; then those of the module are ``DTensor``, this rank's part."""
        self._gathered.check()
        self._gathered.forget()
        for part in self.shim.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Say whether the optimizer updates any parameter of the module."""
        own = {id(parameter) for parameter in self._parameters}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Surround a backward: parts of the module may run again in it, and it averages gradients or does not."""
        before, self._inside = self._inside, True
        self._in_backward = True
        self._gathered.check()
        if self._used is not None:
            self._used.before()
        with_hooks = hooked(self._parameters) if self._averages else ()
        held = gradients_before(with_hooks)
        try:
            yield
            self.local = not self._averages
            if self._used is not None and self._averages:
                # Not of a model that has no part in it: which of those still exist, the ranks' collectors decide.
                self._used.after(self._ran)
                self._ran = False
            if self._paths is not None:
                self._paths.settle()
        except RuntimeError as error:
            self._explain(error)
            raise
        finally:
            self._inside = before
            self._in_backward = False
            self._gathered.forget()
            if not self._frees:
                self.reshard()
        run_hooks(held)

    def _explain(self, error: RuntimeError) -> None:
        """Raise what another rank has found, where that is why a backward failed."""
        if self._paths is not None and self._paths.arrived():
            try:
                self._paths.settle()
            except CollectiveMismatchError as mismatch:
                raise mismatch from error

    @contextmanager
    def synchronizing(self, enabled: bool) -> Iterator[None]:
        """Have backwards average gradients, or not; on leaving, what held before holds again."""
        before = self._averages
        self._set(enabled)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, averages: bool) -> None:
        self._averages = averages
        self._sharded.set_requires_gradient_sync(averages)

    def _watch(self, owners: Sequence[tuple[nn.Module, str]]) -> None:
        """Have the units, and parts with parameters outside of them, say when they run."""
        # Not compiled, as torch's own hooks are not.
        apart: Any = torch.compiler.disable
        # Before torch's own hooks, which would take a unit that runs by itself for a model of its own.
        for unit in self._units:
            unit.register_forward_pre_hook(_Hook(apart(self._visit)), prepend=True)
        within = {id(part) for unit in self._units for part in unit.modules()}
        for part in self.shim.module.modules():
            if id(part) not in within and next(part.parameters(recurse=False), None) is not None:
                part.register_forward_pre_hook(_Hook(self._check_inside), prepend=True)
        # The whole counts as one more unit.
        for number, unit in enumerate((*self._units, self.shim)):
            unit.register_forward_hook(_Hook(apart(functools.partial(self._attach, number))))
        if self._used is None:
            return
        # Where a unit is gathered, not where a part runs: a weight may be used without its part, as a tied one is.
        homes = {id(part): unit for unit in self._units for part in unit.modules()}  # inner ones last
        by_home: dict[nn.Module, list[int]] = {}
        for number, (owner, _) in enumerate(owners):
            by_home.setdefault(homes.get(id(owner), self.shim), []).append(number)
        for home, numbers in by_home.items():
            home.register_forward_pre_hook(_Hook(apart(functools.partial(self._watch_gathered, numbers))))

    def _watch_gathered(self, numbers: Sequence[int], part: nn.Module, _: Any) -> None:
        if self._used is not None and torch.is_grad_enabled():
            self._used.watch(numbers)

    def _attach(self, number: int, unit: nn.Module, args: Any, output: Any) -> None:
        """Have outputs of a unit say when a backward comes to them."""
        if torch.is_grad_enabled():
            reference = weakref.ref(self)

            def note(_: Tensor) -> None:
                engine = reference()
                if engine is not None:
                    engine.came_back(number)

            def attach(tensor: Tensor) -> Tensor:
                if tensor.requires_grad:
                    tensor.register_hook(note)  # type: ignore[no-untyped-call]
                return tensor

            map_tensors(attach, output)

    def _visit(self, unit: nn.Module, _: Any) -> None:
        self._check_inside(unit, _)
        if self._training and self._paths is not None:
            self._paths.come(self._position[id(unit)])
        self._visited.append(unit)

    def came_back(self, number: int) -> None:
        """A backward comes to a unit.

        Raises:
            UnsupportedError: if it builds a graph, which would refer to parameters that are freed after it.
        """
        if self._used is not None:
            self._used.come(number)
        if self._frees and not self._in_backward and torch.is_grad_enabled():
            raise UnsupportedError(
                f"A gradient of this {type(self.shim.module).__name__} is computed with create_graph=True, and "
                f"strategy {self._strategy!r} frees the parameters that its graph needs: set "
                "reshard_after_forward=False, which keeps them until lite.backward() has ended."
            )

    def _check_added(self) -> None:
        self.reshard()
        check_added(self.shim.module, self._strategy)
        self.added = False

    def _check_inside(self, part: nn.Module, _: Any) -> None:
        if self._inside:
            return
        module = self.shim.module
        if self._closed:
            raise OrderError(
                f"This {type(module).__name__} was sharded over the ranks of a job that was torn down: save it before, "
                "and load it into a new one."
            )
        name = next((path for path, each in module.named_modules() if each is part), "")
        raise UsageError(
            f"{type(part).__name__} {name!r} was called by itself, and its parameters are gathered only while the "
            f"whole {type(module).__name__} runs: call it inside a method of the model, and mark that method with "
            "lite.setup(..., forward_methods=(...))."
        )

    def _pass_through(self, number: int) -> None:
        unit: Any = self._units[number]
        unit.unshard()
        unit.reshard()

    @torch.no_grad()
    def help(self) -> None:
        """Gather what another rank's forward gathers, and free it."""
        with torch.inference_mode(False), torch.no_grad():
            self._sharded.unshard()
            self._visited = self._visited or list(self._units)
            for unit in self._visited:
                self._pass_through(self._position[id(unit)])
            self.reshard()

    def order(self) -> list[int]:
        """Return in which order the last forward came to the units."""
        return [self._position[id(unit)] for unit in self._visited]


class _Hook:
    """A hook on a module that a copy of the module does not take along."""

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)
