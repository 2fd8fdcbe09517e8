"""Send tokens to the ranks that hold their experts, run these, and send the outputs back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError
from plugframe_builtins._shared.fully_shard.partners import Partner
from plugframe_builtins.expert.axis import ExpertAxis, tie
from plugframe_builtins.expert.randomness import unchanged
from plugframe_builtins.expert.snapshot import restored
from plugframe_builtins.expert.weights import Weights, installed

#: Runs this rank's experts on rows, one tensor for each of them, and returns their outputs likewise; None for an
#: expert without rows that did not run.
Run = Callable[[list[Tensor]], Sequence[Tensor | None]]

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16]
_DTYPES += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
#: Of the rows: whether there are any, whether they require gradients, their dtype, their dimensions and sizes.
_MOST_DIMS = 6
_HEAD = 4 + _MOST_DIMS


class Exchange(Partner):
    """Run the experts of one list or module on the tokens of all ranks.

    Args:
        path: of the experts in the model.
        module: the list, or the module.
        axis: over which the experts are divided.
        weights: the experts' parameters.
        bounds: the first expert of each rank along the axis, and the number of experts.
        run: runs the experts of this rank.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        axis: ExpertAxis,
        weights: Weights,
        bounds: Sequence[int],
        run: Run,
    ) -> None:
        super().__init__(path, [part for part in module.modules() if part._parameters])
        self._experts = list(module.modules())
        self._axis = axis
        self._weights = weights
        self._bounds = list(bounds)
        self._run = run
        self._like: dict[Any, tuple[torch.Size, torch.dtype]] = {}
        self._compared = False

    @property
    def num_experts(self) -> int:
        """The number of experts of all ranks."""
        return self._bounds[-1]

    @property
    def num_local(self) -> int:
        """The number of this rank's experts."""
        return self._bounds[self._axis.index + 1] - self._bounds[self._axis.index]

    def take_part(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._exchange([None] * self.num_experts, self._run)

    def run_experts(self, rows: Sequence[Tensor | None], run: Run | None = None) -> tuple[list[Tensor | None], Tensor]:
        """Return the outputs of each expert for this rank's rows, and a tensor to `tie` what is computed of them to.

        Every rank must call it, and run its backward.

        Args:
            rows: for each of all experts, of shape (n, *S) with any n; None for one that was not called.
            run: in place of that of the exchange.
        """
        found: tuple[list[Tensor | None], Tensor] = self(rows, run or self._run)
        return found

    def forward(self, rows: Sequence[Tensor | None], run: Run) -> tuple[list[Tensor | None], Tensor]:
        return self._exchange(rows, run)

    def _exchange(self, rows: Sequence[Tensor | None], run: Run) -> tuple[list[Tensor | None], Tensor]:
        axis, number = self._axis, self.num_experts
        table = self._table(rows)
        called = (table[:, :number] >= 0).any(0).nonzero().flatten().tolist()
        if not called:
            return [None] * number, torch.zeros(0, device=axis.device)
        shape, dtype, requires_grad = self._agree(table[:, number:])
        counts = table[axis.column, :number].clamp(min=0)
        lo, hi = self._bounds[axis.index : axis.index + 2]
        weights, ties = self._weights.gather(called)
        sent = torch.cat([torch.zeros(0, *shape, dtype=dtype, device=axis.device), *(r for r in rows if r is not None)])
        if requires_grad and torch.is_grad_enabled() and not sent.requires_grad:
            sent.requires_grad_()
        for other in ties:
            sent = tie(sent, other)
        ends = [self._bounds[i : i + 2] for i in range(axis.size)]
        there = [int(counts[axis.index, start:end].sum()) for start, end in ends]
        here = counts[:, lo:hi].sum(1).tolist()
        received = axis.exchange(sent, here, there)
        outputs = self._compute(received, counts[:, lo:hi], run, weights)
        for other in (received, *ties):
            outputs = tie(outputs, other)
        if torch.is_grad_enabled() and (requires_grad or self._weights.trains) and not outputs.requires_grad:
            outputs.requires_grad_()
        back = axis.exchange(outputs, there, here)
        mine = torch.split(back, counts[axis.index].tolist())
        return [out if row is not None else None for out, row in zip(mine, rows, strict=True)], back

    def _table(self, rows: Sequence[Tensor | None]) -> Tensor:
        """Return for every rank the number of rows for each expert, -1 if it was not called, and what the rows are."""
        given = [row for row in rows if row is not None]
        check_complete(self.path, given)
        first = given[0] if given else None
        head = [0] * _HEAD
        if first is not None:
            grads = torch.is_grad_enabled() and any(row.requires_grad for row in given)
            shape = first.shape[1:]
            if first.dtype not in _DTYPES or len(shape) > _MOST_DIMS:
                raise UnsupportedError(
                    f"The experts {self.path!r} get rows of shape {tuple(first.shape)} and {first.dtype}, which "
                    f"strategy 'expert' does not send: use up to {_MOST_DIMS + 1} dimensions, and a common dtype."
                )
            head[:4] = [1, int(grads), _DTYPES.index(first.dtype), len(shape)]
            head[4 : 4 + len(shape)] = shape
        numbers = [-1 if row is None else len(row) for row in rows]
        if self._axis.copies and not self._compared:
            self._compare(numbers, given)
            self._compared = first is not None
        mine = torch.tensor([*numbers, *head])
        found: Tensor = self._axis.hooks.collective_all_gather(tensor=mine, group=self._axis.group, sync_grads=False)
        return found.cpu()

    def _compare(self, numbers: Sequence[int], given: Sequence[Tensor]) -> None:
        """Raise if ranks that read the same batch, as those of a tensor group, give the experts other tokens."""
        mine = torch.tensor([float(row.detach().abs().sum()) for row in map(_real, given)])
        for group in self._axis.copies:
            sent = (list(numbers), mine.tolist())
            for rows, sums in self._axis.hooks.collective_all_gather_object(obj=sent, group=group):
                alike = list(rows) == list(numbers)
                if not alike or not torch.allclose(torch.tensor(sums), mine, rtol=1e-2, atol=1e-4, equal_nan=True):
                    raise UnsupportedError(
                        f"The experts {self.path!r} get other tokens on ranks that read the same batch: strategy "
                        "'expert' needs complete activations beside another strategy that splits layers. Leave "
                        "sharded outputs before the experts out of its plan, and draw random numbers alike."
                    )

    def _agree(self, heads: Tensor) -> tuple[list[int], torch.dtype, bool]:
        """Return shape and dtype of the rows of all ranks, and whether any requires gradients.

        Raises:
            UnsupportedError: on all ranks, if they differ.
        """
        given = heads[heads[:, 0] > 0]
        first = given[0, 2:]
        if not bool((given[:, 2:] == first).all()):
            kinds = dict.fromkeys(f"(n, {', '.join(map(str, _shape(row)))}) {_dtype(row)}" for row in given.tolist())
            raise UnsupportedError(
                f"The experts {self.path!r} get rows of {' and '.join(kinds)} on different ranks: strategy 'expert' "
                "needs rows of one shape and dtype."
            )
        row = given[0].tolist()
        return _shape(row), _dtype(row), bool(given[:, 1].any())

    def _compute(self, received: Tensor, counts: Tensor, run: Run, weights: Any) -> Tensor:
        """Run this rank's experts on rows sorted by rank and expert; return the outputs in the same order."""
        if not received.shape[0]:
            shape, dtype = self.like(received, run)
            return torch.zeros(0, *shape, dtype=dtype, device=received.device)
        num_ranks, num_local = counts.shape
        pieces = torch.split(received, counts.flatten().tolist())
        grid = [pieces[rank * num_local : (rank + 1) * num_local] for rank in range(num_ranks)]
        inputs = [torch.cat([row[i] for row in grid]) for i in range(num_local)]
        before = self._buffer_states()
        with installed(weights):
            found = run(inputs)
        changed = next((name for name, state in self._buffer_states().items() if before.get(name) != state), None)
        if changed is not None:
            raise UnsupportedError(
                f"The experts {self.path!r} change their buffer {changed.split()[1]!r} in a forward, and strategy "
                "'expert' runs each of them on some ranks only: the others would keep the old value. Keep it outside."
            )
        made = {i: self._checked(out, len(inputs[i])) for i, out in enumerate(found) if out is not None}
        first = next(iter(made.values()))
        outputs = [made.get(i, first[:0]) for i in range(num_local)]
        by_expert = [torch.split(out, counts[:, i].tolist()) for i, out in enumerate(outputs)]
        return torch.cat([by_expert[i][rank] for rank in range(num_ranks) for i in range(num_local)])

    def _buffer_states(self) -> dict[str, tuple[int, int]]:
        found = {}
        for number, part in enumerate(self._experts):
            for name, buffer in part._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    found[f"{number} {name}"] = id(buffer), buffer._version
        return found

    def _checked(self, output: Any, length: int) -> Tensor:
        if not isinstance(output, Tensor) or not output.dim() or len(output) != length:
            what = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedError(
                f"An expert of {self.path!r} got {length} rows and returned {what}: strategy 'expert' needs a tensor "
                "with an output for each row."
            )
        return output

    def like(self, rows: Tensor, run: Run | None = None) -> tuple[torch.Size, torch.dtype]:
        """Return shape and dtype of an expert's output for one row of `rows`, without communication."""
        device = self._axis.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (rows.shape[1:], rows.dtype, cast)
        if key not in self._like:
            ones = [rows.new_zeros(1, *rows.shape[1:]) for _ in range(self.num_local)]
            kept = ExitStack()
            for context in (torch.no_grad(), unchanged(self._axis.device), restored(self._experts[0], ())):
                kept.enter_context(context)
            with kept, installed(self._weights.empty()):
                out = self._checked((run or self._run)(ones)[0], 1)
            self._like[key] = out.shape[1:], out.dtype
        return self._like[key]


def _real(row: Tensor) -> Tensor:
    return torch.view_as_real(row) if row.is_complex() else row.float()


def check_complete(path: str, arguments: Any) -> None:
    """Raise if another strategy shards what a layer with experts is called with."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.extend([tensor] * isinstance(tensor, DTensor))
        return tensor

    map_tensors(note, arguments)
    if found:
        raise UnsupportedError(
            f"The layer with the experts {path!r} gets a DTensor, which another strategy shards over ranks: strategy "
            "'expert' needs plain tensors with complete activations. Have the layers before it return those (style "
            "'rowwise' or 'colwise_gather'), or leave them out of the plan."
        )


def _shape(row: Sequence[int]) -> list[int]:
    return list(row[4 : 4 + row[3]])


def _dtype(row: Sequence[int]) -> torch.dtype:
    return _DTYPES[row[2]]
