"""Replay recorded operations to materialize tensors, freeing intermediate storages early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plugframe.deferred.history import Geometry, Op, Real, Record, Ref, flatten, map_nested


def replay(wanted: Sequence[Record]) -> dict[Record, torch.UntypedStorage]:
    """Return the real storages of deferred ones, on the devices of an eager build. Generators are not advanced."""
    for record in wanted:
        record.check()
    ops = _slice(wanted)
    last: dict[Record, int] = {}
    for index, op in enumerate(ops):
        for record in _touched(op):
            last[record] = index
    storages: dict[Record, torch.UntypedStorage] = {}
    with torch.no_grad():
        for index, op in enumerate(ops):
            _run(op, storages, set(last))
            for record in _touched(op):
                if last[record] == index and record not in wanted:
                    storages.pop(record, None)
    return {record: storages[record] for record in wanted}


def _touched(op: Op) -> list[Record]:
    made = (reference() for _, reference, _, _ in op.outputs)
    return [*(ref.found() for ref in op.refs), *(record for record in made if record is not None)]


def _slice(wanted: Sequence[Record]) -> list[Op]:
    """Return the operations that the current values of `wanted` depend on, in order."""
    ops: dict[int, Op] = {}
    pending = [(record, record.clock) for record in wanted]
    seen = set(pending)
    while pending:
        record, until = pending.pop()
        op = next((write for write in reversed(record.writes) if write.number <= until), None)
        if op is None or id(op) in ops:
            continue
        ops[id(op)] = op
        needed = [ref.found() for ref in op.refs]
        if op.covers is not None:
            needed = [other for other in needed if other is not record]
        for other in needed:
            end = (other, op.number - 1)
            if end not in seen:
                seen.add(end)
                pending.append(end)
    return sorted(ops.values(), key=lambda op: op.number)


def _run(op: Op, storages: dict[Record, torch.UntypedStorage], used: set[Record]) -> None:
    def real(value: Any) -> Any:
        if isinstance(value, Real):
            return value.verified()
        if isinstance(value, Geometry):
            return value.bare("meta")
        if not isinstance(value, Ref):
            return value
        record = value.found()
        if record not in storages:
            # The operation overwrites all of it, so its values were not computed.
            assert op.covers is not None
            storages[record] = _storage(op.covers, record.device)
        return value.geometry.on(storages[record])

    args, kwargs = map_nested(real, op.args), map_nested(real, op.kwargs)
    with _recorded_state(op):
        results = flatten(op.func(*args, **kwargs))
    for position, reference, geometry, size_bytes in op.outputs:
        record = reference()
        if record is not None and record in used:
            storages[record] = _with_layout(results[position], geometry, size_bytes)


def _with_layout(result: Tensor, geometry: Geometry, size_bytes: int) -> torch.UntypedStorage:
    storage = result.untyped_storage()
    if Geometry.of(result) == geometry and storage.nbytes() == size_bytes:
        return storage
    # A kernel may use another layout than the meta device, which recorded views depend on.
    storage = _storage(size_bytes, result.device)
    geometry.on(storage).copy_(result)
    return storage


def _storage(size_bytes: int, device: torch.device) -> torch.UntypedStorage:
    return torch.empty(size_bytes, dtype=torch.uint8, device=device).untyped_storage()


@contextmanager
def _recorded_state(op: Op) -> Iterator[None]:
    """Set the default dtype and generators to their recorded states, and restore them afterwards."""
    now = [(generator, generator.state()) for generator, _ in op.generators]
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(op.dtype)
    try:
        for generator, state in op.generators:
            generator.restore(state)
        yield
    finally:
        for generator, state in now:
            generator.restore(state)
        torch.set_default_dtype(dtype)
