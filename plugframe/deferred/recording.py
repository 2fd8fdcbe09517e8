"""Dispatch mode that records the operations that build a module instead of executing them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from plugframe.deferred.calls import Call
from plugframe.deferred.history import (
    Generator,
    Geometry,
    Op,
    Real,
    Record,
    Ref,
    attach,
    flatten,
    map_nested,
    record_of,
)
from plugframe.deferred.malloc import release_freed
from plugframe.deferred.replay import replay
from plugframe.errors import UnsupportedError


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on deferred tensors on the meta device and records them; defers big new tensors."""

    def __init__(self, min_numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.min_numel = min_numel
        self._paused = False
        #: Records changed under this recorder, whose versions are updated at the end.
        self.touched: weakref.WeakSet[Record] = weakref.WeakSet()

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        call = Call(func, args, _from_meta(func, args, kwargs))
        if any(map(is_traceable_wrapper_subclass, call.tensors)):
            # The subclass has its own dispatch, whose operations on plain tensors are dispatched here again.
            return NotImplemented
        if call.records:
            self._check(call)
        if call.makes_only:
            return self._run(call) if call.seeded else self._make(call)
        if not call.records or call.needs_values:
            return self._run(call)
        return self._touch(call)

    def _check(self, call: Call) -> None:
        for record in call.records:
            if record not in self.touched:
                record.check()
                self.touched.add(record)

    def _make(self, call: Call) -> Any:
        """Create a tensor from a shape, on the meta device if it is big."""
        kwargs = {**call.kwargs, "device": call.device}
        layout = kwargs.get("layout")
        if call.device.type == "meta" or layout not in (None, torch.strided):
            return call.func(*call.args, **kwargs)
        try:
            # Meta tensors cannot be pinned.
            on_meta = {key: value for key, value in kwargs.items() if key != "pin_memory"}
            result = call.func(*call.args, **{**on_meta, "device": torch.device("meta")})
        except (NotImplementedError, RuntimeError):
            return self._run(call)
        if result.numel() < self.min_numel:
            return call.func(*call.args, **kwargs)
        self._record(self._op(call, []), call, [result])
        return result

    def _touch(self, call: Call) -> Any:
        """Run an operation on deferred tensors on the meta device; record it if it creates or changes values."""
        if torch.Tag.inplace_view in call.func.tags and call.name != "aten::resize_":
            return call.func(*call.args, **call.kwargs)
        op = self._op(call, call.states()) if call.written else None
        if call.seeded:
            # Advance the generator as an eager build does; the numbers are drawn again on replay.
            scratch = Geometry.of(call.args[0]).bare(call.device)
            call.func(scratch, *call.args[1:], **call.kwargs)
            size_bytes = scratch.nbytes
            del scratch
            release_freed(size_bytes)
            result, created = call.args[0], []
        else:
            kwargs = {**call.kwargs, "device": torch.device("meta")} if "device" in call.kwargs else call.kwargs
            try:
                result = call.func(*map_nested(_on_meta, call.args), **map_nested(_on_meta, kwargs))
            except (NotImplementedError, RuntimeError):
                # No meta kernel, or it needs values; for invalid arguments, the real run has the better error.
                return self._run(call)
            created = flatten(result)
        if op is not None or any(isinstance(leaf, Tensor) and record_of(leaf) is None for leaf in created):
            self._record(op or self._op(call, []), call, created)
        return result

    def _run(self, call: Call) -> Any:
        """Run an operation on real values of its deferred arguments; big new results become deferred."""
        changes = [record_of(t) is not None for t in call.written]
        if any(changes) and not all(changes):
            raise UnsupportedError(
                f"{call.name} writes to a big and a small tensor at once, which cannot be recorded: build this part "
                "outside of lite.init_module(empty_init=True)."
            )
        states = call.states()
        op = self._op(call, states) if any(changes) else None
        reals: dict[int, Tensor] = {}
        if call.records and not call.shape_only:
            storages = replay(list(dict.fromkeys(call.records)))
            for tensor in call.tensors:
                record = record_of(tensor)
                if record is not None:
                    reals[id(tensor)] = Geometry.of(tensor).on(storages[record])
        kwargs = {**call.kwargs, "device": call.device} if "device" in call.kwargs or call.makes_only else call.kwargs
        result = call.func(*_replaced(call.args, reals), **_replaced(kwargs, reals))
        deferred = {id(real): tensor for tensor in call.tensors if (real := reals.get(id(tensor))) is not None}
        result = _replaced(result, deferred)
        if op is not None:
            self._record(op, call, [])
        elif not call.written and all(t.numel() < self.min_numel or record_of(t) is not None for t in call.tensors):
            # Results of big real tensors stay real: recording them would keep the arguments alive.
            meta_copies = self._meta_copies(call, flatten(result))
            if meta_copies:
                result = _replaced(result, meta_copies)
                self._record(self._op(call, states), call, flatten(result))
        return result

    def _meta_copies(self, call: Call, leaves: list[Any]) -> dict[int, Tensor]:
        """Return a meta tensor for each big result that is not a view."""
        known = {id(t.untyped_storage()) for t in call.tensors if t.layout is torch.strided}
        return {
            id(leaf): Geometry.of(leaf).bare("meta")
            for leaf in leaves
            if isinstance(leaf, Tensor)
            and leaf.layout is torch.strided
            and not leaf.is_meta
            and leaf.numel() >= self.min_numel
            and id(leaf.untyped_storage()) not in known
        }

    def _op(self, call: Call, states: list[tuple[Generator, Tensor]]) -> Op:
        """Return the record of an operation for replay; must be called before it changes its arguments."""
        written = {id(record_of(t)) for t in call.written}
        number = 1 + max((record.clock for record in call.records), default=0)
        op = Op(call.func, (), {}, number, states, torch.get_default_dtype())

        def to_recorded(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if call.shape_only:
                return Geometry.of(leaf)
            record = record_of(leaf)
            if record is None:
                return self._real(leaf)
            own = id(record) in written and len(written) == 1
            ref = Ref(Geometry.of(leaf), None if own else record, weakref.ref(record) if own else None)
            op.refs.append(ref)
            return ref

        op.args, op.kwargs = map_nested(to_recorded, call.args), map_nested(to_recorded, call.kwargs)
        if call.makes_only or "device" in op.kwargs:
            op.kwargs["device"] = call.device
        op.covers = call.covers() if call.written else None
        return op

    def _real(self, tensor: Tensor) -> Real:
        if tensor.is_meta:
            raise UnsupportedError(
                f"A tensor of shape {tuple(tensor.shape)} is on the meta device and has no values to initialise a "
                "parameter from: build it under the same lite.init_module(empty_init=True)."
            )
        if tensor.numel() < self.min_numel or tensor.is_inference():
            return Real(tensor.detach().clone(), None)
        return Real(tensor, tensor._version)

    def _record(self, op: Op, call: Call, created: list[Any]) -> None:
        for position, leaf in enumerate(created):
            if isinstance(leaf, Tensor) and leaf.is_meta and record_of(leaf) is None:
                record = attach(leaf, call.device)
                size_bytes = leaf.untyped_storage().nbytes()
                op.outputs.append((position, weakref.ref(record), Geometry.of(leaf), size_bytes))
                record.writes.append(op)
                record.clock = op.number
        for ref in op.refs:
            ref.found().clock = op.number
        for record in {ref.found() for ref in op.refs} & {record_of(t) for t in call.written}:
            assert record is not None
            record.writes.append(op)


def _from_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keep single values on their device: assigning one to an element moves it to the tensor's device first."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "meta":
        return kwargs
    name = func._schema.name
    if name == "aten::scalar_tensor":
        return {**kwargs, "device": torch.device("cpu")}
    if name == "aten::_to_copy" and args[0].numel() == 1 and not args[0].is_meta:
        return {**kwargs, "device": args[0].device}
    return kwargs


def _on_meta(leaf: Any) -> Any:
    return Geometry.of(leaf).bare("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


def _replaced(value: Any, others: dict[int, Tensor]) -> Any:
    return map_nested(lambda leaf: others.get(id(leaf), leaf), value) if others else value
