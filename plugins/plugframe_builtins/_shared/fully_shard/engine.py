"""The FSDP engine of a module: ``fully_shard`` over a shim, so that the module keeps its class."""

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
from plugframe_builtins._shared.fully_shard.averaging import Averaging
from plugframe_builtins._shared.fully_shard.gathered_copies import GatheredCopies
from plugframe_builtins._shared.fully_shard.module_hook import Hook
from plugframe_builtins._shared.fully_shard.partners import Partner, gather, partners_parameters
from plugframe_builtins._shared.fully_shard.unit_order import Channel, UnitOrder
from plugframe_builtins._shared.fully_shard.used_parameters import UsedParameters, owned_parameters
from plugframe_builtins._shared.sharding.gradient_hooks import gradients_before, hooked, run_hooks
from plugframe_builtins._shared.sharding.uneven_evaluation import UnevenEvaluation


class Shim(ForwardShim):
    """Run a call, and pass every tensor in its output through torch's hooks, whatever object holds it.

    torch searches tuples, lists and dicts only; it would miss the backward of tensors in other objects.
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
    """Make a unit's outputs non-views, before it is sharded: torch attaches its pre-backward hooks to them."""
    unit.register_forward_hook(lambda unit, args, output: map_tensors(_no_view, output))


def _no_view(tensor: Tensor) -> Tensor:
    # A view changed in place loses the hooks attached to it.
    if not (tensor.requires_grad and tensor._is_view()):
        return tensor
    own: Tensor = _NoView.apply(tensor)  # type: ignore[no-untyped-call]
    return own


class _NoView(torch.autograd.Function):
    """Return the same memory as a separate tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Engine:
    """Run ``call(*args)`` as ``engine(call, *args)`` with gathered parameters; backward averages gradients.

    Args:
        shim: wraps the module, sharded.
        units: the sharded blocks and the partners, in model order.
        evaluation: coordinates evaluation over ranks with uneven numbers of batches.
        channel: host-side exchange between the ranks.
        strategy: its name, for messages.
        graph_remedy: what to do for a gradient with ``create_graph=True``, if parameters are resharded before the end
            of a backward; None if they are not.

    Attributes:
        local: whether accumulated gradients are not averaged yet.
        averaging: of gradients, in backwards.
        stale_buffers: whether a forward may have changed buffers since the last broadcast.
        added: whether parameters or submodules may have been added since the module was sharded.
    """

    def __init__(
        self,
        shim: Shim,
        units: Sequence[nn.Module],
        evaluation: UnevenEvaluation,
        channel: Channel,
        strategy: str,
        graph_remedy: str | None,
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
        self.averaging = Averaging(sharded)
        self._inside = self._closed = self._training = self._made = self._in_backward = self._ran = False
        self._graph_remedy, self._frees = graph_remedy, graph_remedy is not None
        if not self._frees:
            sharded.set_reshard_after_backward(False)
        # In the order of the last forward.
        self._visited: list[nn.Module] = []
        self._position = {id(unit): number for number, unit in enumerate(self._units)}
        self._parameters, _ = owned_parameters(shim.module)
        parameters, owners = owned_parameters(shim.module, apart=partners_parameters(shim.module))
        self._gathered = GatheredCopies(shim.module)
        self._paths: UnitOrder | None = None
        self._used: UsedParameters | None = None
        if channel.open:
            model = type(shim.module).__name__
            paths = {id(part): path for path, part in shim.module.named_modules()}
            names = [unit.path if isinstance(unit, Partner) else paths[id(unit)] for unit in self._units]
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
            # Parameters gathered first in inference mode would be unusable in training.
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
            # With gradients too: a rank that only helped is resharded, and all must gather next time.
            self.reshard()
        self._made = True
        return sealed.content

    def sync_buffers(self, hooks: Any) -> None:
        """Broadcast rank 0's buffers, so that all ranks evaluate the same model. Every rank must call it."""
        sync_buffers(self.shim.module, hooks)
        self.stale_buffers = False

    def before_step(self) -> None:
        """Raise before a step on gradients that not all ranks computed alike. Every rank must call it.

        Raises:
            CollectiveMismatchError: if the ranks ran different submodules.
            OrderError: if parameters were added after set-up.
        """
        if self.added:
            self._check_added()
        self.settle()

    def settle(self) -> None:
        """Wait for the pending comparison of the last forward and backward."""
        if self._paths is not None:
            self._paths.settle()
        if self._used is not None:
            self._used.settle()

    def reset(self) -> None:
        """Reset after a failed forward, so that the next one can run."""
        # From torch 2.13 on; before, a forward after a failed one fails as well.
        reset = getattr(self._sharded, "reset_iter_state", None)
        if reset is not None:
            reset()

    def forget(self) -> None:
        """Drop accumulated gradients that are not averaged. Every rank must call it: it gathers."""
        self.local = False
        for part in self.shim.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
                for parameter in part.parameters():  # nested units are gathered in turn
                    parameter.grad = None if not isinstance(parameter, DTensor) else parameter.grad
                part.reshard()

    def zero_grad(self, owner: nn.Module | torch.optim.Optimizer) -> bool:
        """Drop gradients after ``owner.zero_grad()``; return whether there were some that are not averaged."""
        if owner is self.shim.module:
            # Between a forward and its backward the module has gathered copies of some in their place.
            held = set(map(id, self.shim.module.parameters()))
            for parameter in self._parameters:
                if id(parameter) not in held:
                    parameter.grad = None
        elif isinstance(owner, nn.Module) or not self.owns(owner):
            return False
        if self.local:
            self.forget()
            return True
        return False

    def close(self) -> None:
        """Make later calls of the module raise: its session has ended."""
        self._closed = True

    def reshard(self) -> None:
        """Reshard gathered parameters; the module's parameters are then ``DTensor``."""
        self._gathered.check()
        self._gathered.forget()
        for part in self.shim.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer updates any parameter of the module."""
        own = {id(parameter) for parameter in self._parameters}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Wrap a backward: submodules may be recomputed in it, and gradients are averaged or accumulated."""
        before, self._inside = self._inside, True
        self._in_backward = True
        self._gathered.check()
        if self._used is not None:
            self._used.before()
        with_hooks = hooked(self._parameters) if self.averaging.enabled else ()
        held = gradients_before(with_hooks)
        try:
            yield
            self.local = not self.averaging.enabled
            if self._used is not None and self.averaging.enabled:
                # Not for models outside this backward: garbage collection decides per rank which still exist.
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
        """Raise the error of another rank if it caused this backward to fail."""
        if self._paths is not None and self._paths.arrived():
            try:
                self._paths.settle()
            except CollectiveMismatchError as mismatch:
                raise mismatch from error

    def _watch(self, owners: Sequence[tuple[nn.Module, str]]) -> None:
        """Add hooks to the units, and to submodules with parameters outside of them."""
        # Not compiled, as torch's own hooks are not.
        apart: Any = torch.compiler.disable
        # Before torch's own hooks, which would take a unit called on its own for a root module.
        for unit in self._units:
            unit.register_forward_pre_hook(Hook(apart(self._visit)), prepend=True)
        within = {id(part) for unit in self._units for part in unit.modules()}
        for part in self.shim.module.modules():
            if id(part) not in within and next(part.parameters(recurse=False), None) is not None:
                part.register_forward_pre_hook(Hook(self._check_inside), prepend=True)
        # The module itself counts as one more unit.
        for number, unit in enumerate((*self._units, self.shim)):
            if not isinstance(unit, Partner):  # ranks may use different ones of its outputs
                unit.register_forward_hook(Hook(apart(functools.partial(self._attach, number))))
        if self._used is None:
            return
        # By where a parameter is gathered, not where a submodule runs: a tied weight is used outside its module.
        homes = {id(part): unit for unit in self._units for part in unit.modules()}  # inner ones last
        by_home: dict[nn.Module, list[int]] = {}
        for number, (owner, _) in enumerate(owners):
            by_home.setdefault(homes.get(id(owner), self.shim), []).append(number)
        for home, numbers in by_home.items():
            home.register_forward_pre_hook(Hook(apart(functools.partial(self._watch_gathered, numbers))))

    def _watch_gathered(self, numbers: Sequence[int], part: nn.Module, _: Any) -> None:
        if self._used is not None and torch.is_grad_enabled():
            self._used.watch(numbers)

    def _attach(self, number: int, unit: nn.Module, args: Any, output: Any) -> None:
        """Add hooks to a unit's outputs that record its backward."""
        if torch.is_grad_enabled():
            reference = weakref.ref(self)

            def note(_: Tensor) -> None:
                engine = reference()
                if engine is not None:
                    engine.backward_reached(number)

            def attach(tensor: Tensor) -> Tensor:
                if tensor.requires_grad:
                    tensor.register_hook(note)  # type: ignore[no-untyped-call]
                return tensor

            map_tensors(attach, output)

    def _visit(self, unit: nn.Module, _: Any) -> None:
        self._check_inside(unit, _)
        if self._training and self._paths is not None:
            self._paths.record(self._position[id(unit)])
        self._visited.append(unit)

    def backward_reached(self, number: int) -> None:
        """Record that a backward reaches a unit.

        Raises:
            UnsupportedError: if it builds a graph, which would refer to parameters freed afterwards.
        """
        if self._used is not None:
            self._used.record(number)
        if self._frees and not self._in_backward and torch.is_grad_enabled():
            raise UnsupportedError(
                f"A gradient of this {type(self.shim.module).__name__} is computed with create_graph=True, and "
                f"strategy {self._strategy!r} frees the parameters that its graph needs: {self._graph_remedy}."
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
            f"complete {type(module).__name__} runs: call it inside a method of the model, and mark that method with "
            "lite.setup(..., forward_methods=(...))."
        )

    def _pass_through(self, number: int) -> None:
        gather(self._units[number])

    @torch.no_grad()
    def help(self) -> None:
        """Gather the units that another rank's forward gathers, and reshard them."""
        with torch.inference_mode(False), torch.no_grad():
            self._sharded.unshard()
            self._visited = self._visited or list(self._units)
            for unit in self._visited:
                self._pass_through(self._position[id(unit)])
            self.reshard()

    def order(self) -> list[int]:
        """Return the order of units in the last forward."""
        return [self._position[id(unit)] for unit in self._visited]
