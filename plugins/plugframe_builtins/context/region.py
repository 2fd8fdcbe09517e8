"""The consecutive blocks of a model that run on this rank's tokens."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.errors import UnsupportedError
from plugframe_builtins.context.arguments import Arguments
from plugframe_builtins.context.attention import Attention, Run
from plugframe_builtins.context.axis import SequenceAxis
from plugframe_builtins.context.comparison import difference, evaluating
from plugframe_builtins.context.part import Part, part_class, plain
from plugframe_builtins.context.streams import Streams

#: The calls of a block, with arguments of one kind, that are compared: the first one, and a later one for layers whose
#: first weights hide a difference (output projections that begin with zeros).
_COMPARED = (1, 100)

Call = Callable[..., Any]


class Region:
    """Run blocks on a part of the sequence: the first one splits it, the last one gathers it.

    The class of the blocks changes, so that parameter names and hooks stay the same, and a block that is recomputed in
    backward divides its attention too.

    Args:
        blocks: by path, in order.
        axis: over which the sequence is divided.
        dim: the sequence dimension of the hidden states.
        attention: ``"all_to_all"``, ``"gather"`` or ``"ring"``.
        arguments: ``"split"`` or ``"whole"`` by name of an argument.
        check: compare calls with undivided ones.
        say: tells the user something once.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        axis: SequenceAxis,
        *,
        dim: int,
        attention: str,
        arguments: Mapping[str, str],
        check: bool,
        say: Callable[[str], None],
    ) -> None:
        self.axis = axis
        self.dim = dim
        self._attention = Attention(axis, attention, say=say)
        self._check = check
        self._part = part_class(dim)
        self._streams = Streams(axis.device, axis.index)
        self._num_attended = 0
        paths = list(blocks)
        # One class for the blocks of one class: strategies find units by what repeats.
        classes = {own: _divided(own, self) for own in dict.fromkeys(map(type, blocks.values()))}
        self._blocks = {
            id(block): _Block(path, block, Arguments(block.forward, dim, arguments, path), paths)
            for path, block in blocks.items()
        }
        for block in blocks.values():
            block.__class__ = classes[type(block)]

    def close(self) -> None:
        """Give the blocks their class back; where another change of the class is left, they run undivided."""
        for block in self._blocks.values():
            if vars(type(block.module)).get("region") is self:
                block.module.__class__ = block.plain
        self._blocks.clear()

    def block_of(self, module: nn.Module) -> _Block | None:
        """Return the block that a module is, None for a copy of one and after the end of the job."""
        return self._blocks.get(id(module))

    def run(self, block: _Block, forward: Call, args: Any, kwargs: Any) -> Any:
        """Run a block's own forward on this rank's tokens."""
        key, hidden = block.arguments.hidden(args, kwargs)
        local, length = self._lengths(block, hidden)
        recomputed = torch._C._current_graph_task_id() != -1
        if self._check and not recomputed and block.counts(args, kwargs, local, length):
            self._compare(block, forward, args, kwargs, (local, length))
        args, kwargs = self._divided(block, key, args, kwargs, length)
        run = Run(local, divided=True, compared=False)
        if block.module.training:
            with self._streams.own(), self._attention.catching(run, block.path):
                output = forward(*args, **kwargs)
        else:
            with self._attention.catching(run, block.path):
                output = forward(*args, **kwargs)
        if not recomputed:
            self._count(block, run)
        return self._first(output, block, lambda part: self.axis.gather(part, self.dim)) if block.last else output

    def _lengths(self, block: _Block, hidden: Tensor) -> tuple[int, int]:
        """Return the numbers of tokens of this rank and of all."""
        size, ranks = hidden.shape[self.dim], self.axis.size
        if not block.first:
            return size, size * ranks
        if size % ranks or not size:
            raise UnsupportedError(
                f"Block {block.path!r} got {size} tokens along dim={self.dim}, and strategy 'context' divides them "
                f"evenly over {ranks} ranks: pad the sequences to a multiple of {ranks}, and leave the padding out of "
                "the loss."
            )
        return size // ranks, size

    def _divided(self, block: _Block, hidden_key: Any, args: Any, kwargs: Any, length: int) -> tuple[Any, Any]:
        hidden = args[hidden_key] if isinstance(hidden_key, int) else kwargs[hidden_key]

        def divide(key: Any, name: str, tensor: Tensor) -> Tensor:
            if key == hidden_key:
                return self.axis.split(tensor, self.dim) if block.first else tensor
            dim = block.arguments.dim_of(name, tensor, hidden, length)
            return self.axis.enter(tensor) if dim is None else self.axis.split(tensor, dim)

        return block.arguments.apply(args, kwargs, divide)

    def _count(self, block: _Block, run: Run) -> None:
        self._num_attended = run.count + (0 if block.first else self._num_attended)
        if block.last and not self._num_attended:
            raise UnsupportedError(
                "No block called torch.nn.functional.scaled_dot_product_attention between the first one and "
                f"{block.path!r}, so that strategy 'context' has nothing to attend with over all tokens: use it in the "
                "attention of the model, or set blocks= to the blocks that have it."
            )

    def _compare(self, block: _Block, forward: Call, args: Any, kwargs: Any, lengths: tuple[int, int]) -> None:
        """Raise on all ranks of the axis if the block on a part of the tokens is not the block on all of them."""
        local, length = lengths
        key, hidden = block.arguments.hidden(args, kwargs)
        part, full = Run(local, divided=True, compared=True), Run(local, divided=False, compared=True)
        with self._streams.unchanged(), evaluating(block.module):
            whole = hidden if block.first else self.axis.gather(hidden, self.dim)
            # Copies: a block may change its arguments in place.
            swap = block.arguments.apply(args, kwargs, lambda at, _, each: (whole if at == key else each).clone())
            args, kwargs = block.arguments.apply(args, kwargs, lambda at, _, tensor: tensor.clone())
            with self._attention.catching(full, block.path):
                expected = forward(*swap[0], **swap[1])
            mine = self._divided(block, key, args, kwargs, length)
            problem, cause = None, None
            try:
                with self._attention.catching(part, block.path):
                    found = forward(*mine[0], **mine[1])
                problem = difference(self.axis, part, full, (found, expected), self.dim)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                problem, cause = f"it fails on them ({type(error).__name__}: {error})", error
        self._agree(block, problem, cause)

    def _agree(self, block: _Block, problem: str | None, cause: BaseException | None) -> None:
        flag = torch.tensor(float(problem is not None), device=self.axis.device)
        if not self.axis.hooks.collective_all_reduce(tensor=flag, op="max", group=self.axis.group).item():
            return
        split = ", ".join(sorted(block.split)) or "none"
        raise UnsupportedError(
            f"Block {block.path!r} ({block.plain.__name__}) is not the same on a part of the sequence, as strategy "
            f"'context' runs it: {problem or 'it differs on another rank'}. Compute positions and masks outside of the "
            "blocks, attend with torch.nn.functional.scaled_dot_product_attention only, keep no cache of keys "
            f"(use_cache=False), or name what is divided with arguments= (split now: {split})."
        ) from cause

    def _first(self, output: Any, block: _Block, fn: Callable[[Tensor], Tensor]) -> Any:
        """Return a block's output with ``fn`` of its first tensor, the hidden states."""
        if isinstance(output, Tensor):
            return fn(output)
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            return type(output)([fn(output[0]), *output[1:]])
        raise UnsupportedError(
            f"Block {block.path!r} returns {type(output).__name__}, and strategy 'context' needs the hidden states: "
            "return them, or a tuple that begins with them."
        )

    def take(self, block: _Block, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return a block's arguments with the hidden states of the block before as a plain tensor."""
        _refuse_compiled(block)
        key, hidden = block.arguments.hidden(args, kwargs)
        if isinstance(hidden, Part) is block.first:
            raise UnsupportedError(
                f"Block {block.path!r} got hidden states "
                + (
                    f"of block {hidden.block!r} while the sequence is divided"
                    if isinstance(hidden, Part)
                    else "of all tokens, not those of the block before"
                )
                + f": strategy 'context' needs the blocks from {block.ends[0]!r} to {block.ends[1]!r} to run in order, "
                "the first and the last one included. Set blocks= to those that do."
            )

        def unwrap(at: Any, name: str, tensor: Tensor) -> Tensor:
            if not isinstance(tensor, Part):
                return tensor
            if at != key:
                raise UnsupportedError(
                    f"Block {block.path!r} got the hidden states of block {tensor.block!r} as {name!r}: strategy "
                    "'context' passes them on as the first argument only."
                )
            return plain(tensor)

        return block.arguments.apply(args, kwargs, unwrap)

    def give(self, block: _Block, output: Any) -> Any:
        """Return a block's output, marked as this rank's tokens until the last block has run."""
        if block.last:
            return output
        self._part.block = block.path
        return self._first(output, block, lambda part: part.as_subclass(self._part))


class _Block:
    """A block of a region.

    Attributes:
        path: its path in the model.
        module: itself.
        plain: its own class.
        arguments: what its arguments are.
        first: whether it splits the sequence.
        last: whether it gathers the sequence.
        ends: paths of the first and the last block.
        split: names of the arguments that were split in the last compared call.
    """

    def __init__(self, path: str, module: nn.Module, arguments: Arguments, paths: list[str]) -> None:
        self.path, self.module, self.plain = path, module, type(module)
        self.arguments = arguments
        self.ends = paths[0], paths[-1]
        self.first, self.last = path == paths[0], path == paths[-1]
        self.split: set[str] = set()
        self._num_calls: Counter[Any] = Counter()

    def counts(self, args: Any, kwargs: Any, local: int, length: int) -> bool:
        """Count a call, and return whether it is compared: by which dimensions of its arguments have which tokens."""
        kind: list[Any] = [self.module.training]
        self.split = set()

        def note(key: Any, name: str, tensor: Tensor) -> Tensor:
            kind.append((key, tuple("L" if size == length else "l" if size == local else "" for size in tensor.shape)))
            if length in tensor.shape:
                self.split.add(name)
            return tensor

        self.arguments.apply(args, kwargs, note)
        self._num_calls[tuple(kind)] += 1
        return self._num_calls[tuple(kind)] in _COMPARED


def _refuse_compiled(block: _Block) -> None:
    for part in block.module.modules():
        if part._compiled_call_impl is not None:
            raise UnsupportedError(
                f"{type(part).__name__} in block {block.path!r} is compiled, and strategy 'context' runs collectives "
                "within its attention: leave compile= and .compile() of blocks out."
            )


def _divided(own: Any, region: Region) -> type[nn.Module]:
    """Return a subclass of a block's class whose instances run on a part of the sequence."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = region.block_of(self)
        if block is None:
            return own.__call__(self, *args, **kwargs)
        args, kwargs = region.take(block, args, kwargs)
        return region.give(block, own.__call__(self, *args, **kwargs))

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = region.block_of(self)
        call = functools.partial(own.forward, self)
        return call(*args, **kwargs) if block is None else region.run(block, call, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, (_, *rest), *state = super(cls, self).__reduce_ex__(protocol)
        return (make, (own, *rest), *state)

    # Not compiled: torch.compile of the model leaves the blocks out.
    apart: Any = torch.compiler.disable
    namespace = {"__call__": apart(__call__), "forward": apart(forward), "__reduce_ex__": __reduce_ex__}
    names = {name: getattr(own, name) for name in ("__module__", "__doc__", "__qualname__")}
    cls: Any = type(own.__name__, (own,), {**namespace, **names, "region": region})
    return cls  # type: ignore[no-any-return]
