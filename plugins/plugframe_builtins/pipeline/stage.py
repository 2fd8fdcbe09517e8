"""Run the part of the user's own forward that belongs to one stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError, UsageError
from plugframe_builtins.pipeline.cut import Cut
from plugframe_builtins.pipeline.stand_in import StandIn, first_missing, resolved, stand_in, tensors_of

#: Results of other stages' modules that are remembered by the shapes of the arguments.
_MOST_REMEMBERED = 1000


class Meta(NamedTuple):
    """A tensor that one stage sends to the next, for every micro-batch."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Meta:
        """Return that of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.requires_grad)


class _StageEnd(BaseException):
    """Leaves the user's forward at the first module of the next stage, with the arguments of its call.

    Not an ``Exception``: a script's own ``except Exception`` must not catch it.
    """

    def __init__(self, outputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.outputs = outputs


class _Pass:
    """One run of the forward for one stage."""

    def __init__(self, stage: int, received: Sequence[Tensor] | None, simulated: bool = False) -> None:
        self.stage = stage
        self.received = received
        #: Whether the stage is another rank's, which does not exist: only shapes are computed.
        self.simulated = simulated
        #: Whether a module of this stage has run.
        self.begun = False


class Boundaries:
    """Replace the ``forward`` of the modules of every stage, so that each rank computes its own stages only.

    Args:
        module: the user's model.
        cut: its stages.
        device: this rank's device.
        shapes: modules, by path, in place of those that compute nothing but shapes in a pass for a later stage.
    """

    def __init__(
        self, module: nn.Module, cut: Cut, device: torch.device, shapes: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.cut = cut
        self.what = type(module).__name__
        self._device = device
        self._shapes = shapes or {}
        self._pass: _Pass | None = None
        self._remembered: dict[Any, Any] = {}
        #: Results of modules by their calls, as their own ranks saw them: tensors on the meta device.
        self.results: dict[Any, Any] = {}
        self._seen: dict[Any, Any] | None = None
        for path, stage in cut.units.items():
            unit = module.get_submodule(path)
            # On the instance: hooks and ``__call__`` of the user's class stay as they are.
            unit.forward = functools.partial(self._forward, path, stage, unit.forward)

    def run(
        self, stage: int, call: Callable[[], Any], received: Sequence[Tensor], *, simulated: bool = False
    ) -> tuple[bool, Any]:
        """Run `call`, the user's forward, for one stage.

        Args:
            received: what the stage before sends.
            simulated: compute shapes only, for a stage of a rank that does not exist.

        Returns:
            Whether the forward ran to its end, and its result or, else, the tensors for the next stage.
        """
        last = stage == self.cut.num_stages - 1
        with self._passing(_Pass(stage, received if stage and not simulated else None, simulated)) as running:
            try:
                result = call()
            except _StageEnd as end:
                return False, end.outputs
        if not last or not running.begun:
            raise UnsupportedError(
                f"The forward of this {self.what} ended without calling a module of stage "
                f"{stage + 1 if running.begun else stage}: {self._paths(stage + 1 if running.begun else stage)}. Cut "
                "the model at modules that every forward calls in the order of the stages."
            )
        result = resolved(result)
        missing = None if running.simulated else first_missing(result)
        if missing is not None:
            raise UnsupportedError(
                f"The result of this {self.what} depends on {missing.origin}, and the last stage does not get it: cut "
                "the model so that what it passes on goes through the modules that start a stage, or put that module "
                f"into the last stage (pipeline_plan)."
            )
        return True, result

    def _paths(self, stage: int) -> str:
        return ", ".join(path for path, number in self.cut.units.items() if number == stage)

    @contextmanager
    def _passing(self, running: _Pass) -> Iterator[_Pass]:
        before, self._pass = self._pass, running
        try:
            yield running
        finally:
            self._pass = before

    def _forward(self, path: str, stage: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = self._pass
        if running is None:  # a recomputation in backward, or a call of the script
            args, kwargs = resolved((args, kwargs))
            return forward(*args, **kwargs)
        if stage < running.stage:
            return self._skipped(path, stage, forward, args, kwargs)
        if stage > running.stage:
            self._end(path, stage, running, args, kwargs)
        if running.simulated:
            running.begun = True
            return self._skipped(path, stage, forward, args, kwargs)
        if running.received is not None:
            self._receive(path, running, args, kwargs)
        running.begun = True
        key = _key(path, (args, kwargs))
        args, kwargs = resolved((args, kwargs))
        missing = first_missing((args, kwargs))
        if missing is not None:
            raise UnsupportedError(
                f"{path!r}, in stage {stage}, is called with a tensor that depends on {missing.origin}, and only the "
                f"first module of stage {stage} gets what earlier stages computed: put both into one stage, or pass "
                "the tensor through the modules in between."
            )
        result = forward(*args, **kwargs)
        if self._seen is not None:
            _note(self._seen, key, result)
        elif key in self.results:
            self._check(path, self.results[key], result)
        return result

    @contextmanager
    def seeing(self) -> Iterator[dict[Any, Any]]:
        """Note the results of this rank's modules within the context, None for those that no shape stands for."""
        seen: dict[Any, Any] = {}
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    def _check(self, path: str, expected: Any, result: Any) -> None:
        """Raise if a result has another shape than the one that other ranks compute with in its place."""
        if expected is None:
            return
        shapes, found = ([(each.shape, each.dtype) for each in tensors_of(data)] for data in (expected, result))
        if shapes != found:
            raise UnsupportedError(
                f"{path!r} returned tensors of shapes {[tuple(shape) for shape, _ in found]}, and "
                f"{[tuple(shape) for shape, _ in shapes]} before, for arguments of the same shapes: strategy "
                "'pipeline' needs shapes that depend on shapes only. Return the complete tensors with a mask."
            )

    def _receive(self, path: str, running: _Pass, args: Any, kwargs: Any) -> None:
        received, running.received = running.received or (), None
        expected = tensors_of((args, kwargs))
        if len(expected) != len(received):
            raise UnsupportedError(
                f"{path!r} is called with {len(expected)} tensors on the rank of stage {running.stage}, and with "
                f"{len(received)} on the rank before: every rank must run the same forward."
            )
        for tensor, value in zip(expected, received, strict=True):
            if isinstance(tensor, StandIn):
                tensor.value = value

    def _end(self, path: str, stage: int, running: _Pass, args: Any, kwargs: Any) -> None:
        args, kwargs = resolved((args, kwargs))
        if stage != running.stage + 1 or not running.begun:
            raise UnsupportedError(
                f"The forward of this {self.what} calls {path!r}, of stage {stage}, before the modules of stage "
                f"{running.stage if not running.begun else running.stage + 1}: put it into the stage in which it is "
                "called (pipeline_plan)."
            )
        missing = None if running.simulated else first_missing((args, kwargs))
        if missing is not None:
            raise UnsupportedError(
                f"{path!r}, the first module of stage {stage}, is called with a tensor that depends on "
                f"{missing.origin}, which stage {running.stage} does not have: only what the first module of a stage "
                "is called with is sent on."
            )
        outputs = tensors_of((args, kwargs))
        odd = next((tensor for tensor in outputs if tensor.is_nested or tensor.layout is not torch.strided), None)
        if odd is not None:
            raise UnsupportedError(
                f"{path!r}, the first module of stage {stage}, is called with a nested or sparse tensor "
                f"({odd.layout}), which cannot be sent: cut the model elsewhere, or pass dense tensors (for "
                "nn.TransformerEncoder enable_nested_tensor=False)."
            )
        raise _StageEnd(tuple(outputs if running.simulated else map(_settled, outputs)))

    def _skipped(self, path: str, stage: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return stand-ins for the result of an earlier stage's module."""
        origin = f"what {path!r} computes in stage {stage}"

        def replace(tensor: Tensor) -> Tensor:
            return stand_in(tensor, origin, self._device)

        key = _key(path, (args, kwargs))
        known = None
        if key is not None:
            known = self.results.get(key)
            known = self._remembered.get(key) if known is None else known
        if known is not None:
            return map_tensors(replace, known)
        if path in self._shapes:
            forward = self._shapes[path]
        result = map_tensors(replace, forward(*map_tensors(replace, args), **map_tensors(replace, kwargs)))
        if key is not None:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = result
        return result


def _settled(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor; wait for it if it is the result of a collective that may still run."""
    if type(tensor) is not Tensor:
        tensor.reshape(-1)[:1].clone()  # what computes with such a tensor of torch waits for it, a shape does not
    return tensor.contiguous()


def _note(seen: dict[Any, Any], key: Any, result: Any) -> None:
    """Note the shapes of a result; a module that returns two for one call, or more than tensors, has none."""
    if key is None:
        return
    made = map_tensors(_without_values, result) if _only_tensors(result) else None
    if key in seen and made is not None:
        before = seen[key]
        same = before is not None and list(map(Meta.of, tensors_of(before))) == list(map(Meta.of, tensors_of(made)))
        made = before if same else None
    seen[key] = made


def _only_tensors(result: Any) -> bool:
    if type(result) in (list, tuple):
        return all(map(_only_tensors, result))
    if type(result) is dict:
        return all(map(_only_tensors, result.values()))
    return result is None or (isinstance(result, Tensor) and not result.is_nested and result.layout is torch.strided)


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _key(path: str, data: Any) -> Any:
    """Return a hashable key of a call; None if it has arguments that cannot be compared."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (tuple(value.shape), value.dtype)
        if isinstance(value, Mapping):
            return tuple((key, of(item)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return tuple(map(of, value))
        if isinstance(value, (str, int, float, bool, type(None))):
            return (type(value), value)
        raise UsageError("not comparable")

    try:
        return path, of(data)
    except UsageError:
        return None


class StageModule(nn.Module):
    """One stage as a module for `torch.distributed.pipelining`: called with what was received.

    Args:
        boundaries: those of the model.
        stage: its number.
        parameters: the parameters that it computes with.
    """

    def __init__(self, boundaries: Boundaries, stage: int, parameters: Callable[[], Sequence[Tensor]]) -> None:
        super().__init__()
        self.boundaries = boundaries
        self.stage = stage
        self.own_parameters = parameters
        self.call: Callable[..., Any] | None = None
        self.calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = ()
        #: The tensors for the next stage; None until they are known.
        self.sends: Sequence[Meta] | None = None
        #: The exception of the last forward: torch's schedules wrap it.
        self.failure: BaseException | None = None

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the stage's parameters, of modules that belong to the user's model."""
        return iter(self.own_parameters())  # type: ignore[arg-type]

    def forward(self, *received: Tensor, index: Tensor) -> Any:
        """Return the tensors for the next stage; of the last stage the result of the user's forward."""
        try:
            ended, result = self.compute(int(index), received)
        except BaseException as error:
            self.failure = error
            raise
        if ended:
            return result
        return result if len(result) != 1 else result[0]

    def compute(self, number: int, received: Sequence[Tensor]) -> tuple[bool, Any]:
        """Run micro-batch `number`."""
        args, kwargs = self.calls[number]
        assert self.call is not None
        ended, result = self.boundaries.run(self.stage, functools.partial(self.call, *args, **kwargs), received)
        if not ended and self.sends is not None:
            found = [Meta.of(tensor) for tensor in result]
            if found != list(self.sends):
                raise UnsupportedError(
                    f"Stage {self.stage} passes on tensors of {_spell(found)} for micro-batch {number}, and of "
                    f"{_spell(self.sends)} for the first one: all micro-batches must pass through the model alike."
                )
        return ended, result


def _spell(metas: Sequence[Meta]) -> str:
    words = {True: ", with a gradient", False: ""}
    return "; ".join(f"shape {tuple(m.shape)} and {m.dtype}{words[m.requires_grad]}" for m in metas) or "nothing"
