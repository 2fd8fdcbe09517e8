"""Modules that run experts, and the experts themselves, as they run divided over ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError, UsageError
from plugframe_builtins.expert import randomness
from plugframe_builtins.expert.axis import ExpertAxis, tie
from plugframe_builtins.expert.exchange import Exchange, check_complete
from plugframe_builtins.expert.snapshot import copied, restored, unchanged_arguments

Call = Callable[..., Any]


class Phase(Enum):
    """What a call of an expert does."""

    OUTSIDE = "is refused"
    NOTES = "notes its tokens"
    RUNS = "runs"
    ANSWERS = "returns the output of its tokens"


class ListLayer:
    """Run a module with a list of experts unchanged: its forward runs twice.

    The first run finds out the tokens of each expert. They are sent to the ranks that hold the experts, which run on
    those of all ranks. In the second run a call of an expert returns its output.

    Args:
        path: of the module that runs the experts.
        parent: that module.
        experts: all of them.
        exchange: runs those of this rank.
        axis: over which they are divided.
    """

    def __init__(
        self, path: str, parent: nn.Module, experts: Sequence[nn.Module], exchange: Exchange, axis: ExpertAxis
    ) -> None:
        self.path = path
        self.exchange = exchange
        self._axis = axis
        self._numbers = {id(expert): number for number, expert in enumerate(experts)}
        self._inner = {part for expert in experts for part in expert.modules()}
        self._parent = parent
        self._phase = Phase.OUTSIDE
        self._noted: list[tuple[int, Tensor]] = []
        self._answers: list[Tensor] = []
        self._next = 0
        self._differs: list[Tensor] = []

    @property
    def runs(self) -> bool:
        """Whether this rank's experts run now."""
        return self._phase is Phase.RUNS

    def running(self, call: Callable[[], Any]) -> Any:
        """Return what `call` does with this rank's experts."""
        before, self._phase = self._phase, Phase.RUNS
        try:
            return call()
        finally:
            self._phase = before

    def run(self, forward: Call, args: Any, kwargs: Any) -> Any:
        """Run the module's own forward."""
        if self._phase is not Phase.OUTSIDE:
            return forward(*args, **kwargs)
        check_complete(self.exchange.path, (args, kwargs))
        device = self._axis.device
        try:
            begun = randomness.states(device)
            self._note(forward, args, kwargs)
            noted = randomness.states(device)
            back = self._exchange()
            ran = randomness.states(device)
            randomness.restore(device, begun)
            output = self._answer(forward, args, kwargs)
            if not randomness.same(noted, ran):
                randomness.restore(device, ran)  # the experts' numbers are not drawn again
        finally:
            self._phase = Phase.OUTSIDE
            self._noted, self._answers, self._differs = [], [], []
        return map_tensors(lambda tensor: tie(tensor, back), output)

    def _note(self, forward: Call, args: Any, kwargs: Any) -> None:
        self._phase = Phase.NOTES
        with restored(self._parent, self._inner), unchanged_arguments((args, kwargs), self.path):
            forward(*copied(args), **copied(kwargs))

    def _exchange(self) -> Tensor:
        self._phase = Phase.RUNS
        rows: list[Tensor | None] = [None] * len(self._numbers)
        for number in dict.fromkeys(number for number, _ in self._noted):
            rows[number] = torch.cat([each for other, each in self._noted if other == number])
        outputs, back = self.exchange.run_experts(rows)
        taken = [0] * len(rows)
        for number, each in self._noted:
            whole = outputs[number]
            assert whole is not None
            self._answers.append(whole[taken[number] : taken[number] + len(each)])
            taken[number] += len(each)
        return back

    def _answer(self, forward: Call, args: Any, kwargs: Any) -> Any:
        self._phase, self._next = Phase.ANSWERS, 0
        output = forward(*args, **kwargs)
        if self._next != len(self._noted) or (self._differs and bool(torch.stack(self._differs).any())):
            raise self._varies()
        return output

    def call(self, expert: nn.Module, args: Any, kwargs: Any) -> Tensor:
        """Note the tokens of a call, or return their output."""
        number = self._numbers[id(expert)]
        if self._phase is Phase.OUTSIDE:
            raise UsageError(
                f"Expert {number} of {self.exchange.path!r} was called outside of the forward of {self.path!r}, and "
                "strategy 'expert' runs experts on the tokens of all ranks there: call it within."
            )
        rows = self._rows(number, args, kwargs)
        if self._phase is Phase.NOTES:
            self._noted.append((number, rows))
            shape, dtype = self.exchange.like(rows)
            return torch.zeros(len(rows), *shape, dtype=dtype, device=rows.device)
        then, noted = self._noted[self._next] if self._next < len(self._noted) else (-1, rows)
        if then != number or noted.shape != rows.shape or noted.dtype != rows.dtype:
            raise self._varies()
        self._differs.append((noted.detach() != rows.detach()).any())
        self._next += 1
        return self._answers[self._next - 1]

    def _rows(self, number: int, args: Any, kwargs: Any) -> Tensor:
        values = [*args, *kwargs.values()]
        if len(values) != 1 or not isinstance(values[0], Tensor) or not values[0].dim():
            raise UnsupportedError(
                f"Expert {number} of {self.exchange.path!r} was called with {len(values)} arguments, "
                f"{', '.join(type(value).__name__ for value in values)}: strategy 'expert' sends one tensor of tokens, "
                "of shape (tokens, …). Weigh the outputs outside of the expert, or stack the experts' weights."
            )
        return values[0]

    def _varies(self) -> UnsupportedError:
        return UnsupportedError(
            f"The forward of {self.path!r} called its experts otherwise when it ran a second time: strategy 'expert' "
            "runs it twice, first to see which tokens go to which experts. Tokens must not depend on the outputs of "
            "other experts, nor on what a run changes outside of the module."
        )


class StackedLayer:
    """Run a module that stacks the weights of experts on those of this rank.

    Args:
        path: of the module.
        exchange: its weights and ranks.
        dispatch: see `plugframe_builtins.expert.dispatch`.
    """

    def __init__(self, path: str, exchange: Exchange, dispatch: Call) -> None:
        self.path = path
        self.exchange = exchange
        self._dispatch = dispatch
        self.run_rows: Call = self._unknown
        self._inside = False

    def _unknown(self, rows: list[Tensor]) -> Any:
        raise UnsupportedError(
            f"Other ranks evaluate more batches than this one, and the experts {self.path!r} have not run here: run "
            "one forward on every rank before, or evaluate as many batches as there are ranks."
        )

    def run(self, forward: Call, args: Any, kwargs: Any) -> Any:
        """Run the dispatch in place of the module's own forward."""
        if self._inside:
            return forward(*args, **kwargs)
        check_complete(self.exchange.path, (args, kwargs))
        backs: list[Tensor] = []

        def exchange(rows: Sequence[Tensor], run: Call) -> list[Tensor | None]:
            if len(rows) != self.exchange.num_experts or backs:
                raise UnsupportedError(
                    f"The dispatch of the experts {self.path!r} must exchange the rows of {self.exchange.num_experts} "
                    f"experts once, and exchanges {len(rows)} for the {len(backs) + 1}. time."
                )
            self.run_rows = run
            outputs, back = self.exchange.run_experts(list(rows), run)
            backs.append(back)
            return outputs

        self._inside = True
        try:
            output = self._dispatch(forward, exchange, *args, **kwargs)
        finally:
            self._inside = False
        if not backs:
            raise UnsupportedError(f"The dispatch of the experts {self.path!r} exchanged nothing: call exchange().")
        return map_tensors(lambda tensor: tie(tensor, backs[0]), output)


class Layers:
    """The layers of a strategy by their modules; copies of modules are not among them."""

    def __init__(self) -> None:
        self._runs: dict[int, ListLayer | StackedLayer] = {}
        self._experts: dict[int, ListLayer] = {}
        self._plain: list[tuple[nn.Module, type[nn.Module]]] = []
        self._classes: dict[tuple[type, bool], type[nn.Module]] = {}

    def add(self, runner: nn.Module, layer: ListLayer | StackedLayer, experts: Sequence[nn.Module] = ()) -> None:
        """Let a module and its experts run as a layer."""
        self._runs[id(runner)] = layer
        self._swap(runner, _running)
        for expert in experts:
            assert isinstance(layer, ListLayer)
            self._experts[id(expert)] = layer
            self._swap(expert, _called)

    def _swap(self, module: nn.Module, make: Callable[[Any, Layers], type[nn.Module]]) -> None:
        own = type(module)
        # One class for the modules of one class: strategies find units by what repeats.
        key = own, make is _running
        if key not in self._classes:
            self._classes[key] = make(own, self)
        self._plain.append((module, own))
        module.__class__ = self._classes[key]

    def layer_of(self, module: nn.Module) -> ListLayer | StackedLayer | None:
        """Return the layer that a module runs, None for a copy and after the end of the job."""
        return self._runs.get(id(module))

    def list_of(self, expert: nn.Module) -> ListLayer | None:
        """Return the layer that an expert is of, None for a copy and after the end of the job."""
        return self._experts.get(id(expert))

    def close(self) -> None:
        """Give the modules their classes back, where no other change of the class is left."""
        for module, own in self._plain:
            if vars(type(module)).get("expert_layers") is self:
                module.__class__ = own
        self._plain.clear()
        self._runs.clear()
        self._experts.clear()


def _running(own: Any, layers: Layers) -> type[nn.Module]:
    """Return a subclass for modules that run experts."""

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = layers.layer_of(self)
        call = functools.partial(own.forward, self)
        return call(*args, **kwargs) if layer is None else layer.run(call, args, kwargs)

    def plugframe_partner(self: Any) -> Exchange | None:
        layer = layers.layer_of(self)
        return None if layer is None else layer.exchange

    apart: Any = torch.compiler.disable
    return _subclass(own, layers, forward=apart(forward), plugframe_partner=plugframe_partner)


def _called(own: Any, layers: Layers) -> type[nn.Module]:
    """Return a subclass for experts of a list."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = layers.list_of(self)
        if layer is None or layer.runs:
            return own.__call__(self, *args, **kwargs)
        return layer.call(self, args, kwargs)

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = layers.list_of(self)
        if layer is None or layer.runs:
            return own.forward(self, *args, **kwargs)
        return layer.call(self, args, kwargs)

    apart: Any = torch.compiler.disable
    return _subclass(own, layers, __call__=apart(__call__), forward=apart(forward))


def _subclass(own: Any, layers: Layers, **namespace: Any) -> type[nn.Module]:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, (_, *rest), *state = super(cls, self).__reduce_ex__(protocol)
        return (make, (own, *rest), *state)

    names = {name: getattr(own, name) for name in ("__module__", "__doc__", "__qualname__")}
    cls: Any = type(
        own.__name__, (own,), {**namespace, **names, "__reduce_ex__": __reduce_ex__, "expert_layers": layers}
    )
    return cls  # type: ignore[no-any-return]
