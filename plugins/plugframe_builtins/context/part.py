"""The hidden states between two blocks: this rank's tokens, which only the next block may take as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plugframe.errors import UnsupportedError

#: Functions of torch that read no values, or leave them as they are.
_READS = {
    *("get", "set", "size", "dim", "numel", "nelement", "ndimension", "element_size", "stride", "storage_offset"),
    *(
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_view",
        "data_ptr",
        "get_device",
        "hash",
        "repr",
        "format",
    ),
    *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad", "detach", "clone"),
    *("contiguous", "to", "type", "float", "half", "bfloat16", "double", "cpu", "cuda"),
}
#: Functions that treat each token alike, if the other operands have no tokens of their own.
_ELEMENTWISE = {"add", "sub", "mul", "div", "radd", "rsub", "rmul", "truediv", "rtruediv", "neg"}
_LAST_DIM = {"layer_norm", "rms_norm", "linear"}


class Part(Tensor):
    """Hidden states of this rank's tokens; each region has a subclass, since torch does not mix several.

    Attributes:
        seq_dim: the sequence dimension.
        block: path of the block that ran last, for messages.
    """

    seq_dim: int
    block: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _bare(getattr(func, "__name__", str(func)))
        if name in _READS or (name in _ELEMENTWISE and cls._fits(args)) or (name in _LAST_DIM and cls._per_token(args)):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name == "untyped_storage":  # which torch's compiler reads first (torch 2.13)
            raise UnsupportedError(
                f"Compiled code got the hidden states after block {cls.block!r}, and strategy 'context' cannot divide "
                "blocks that run in compiled code: compile submodules without blocks only, such as the head."
            )
        raise UnsupportedError(
            f"{name}() of the hidden states after block {cls.block!r}: strategy 'context' divides the sequence until "
            "the last block has run, and they are this rank's tokens only. Do it within a block or after the last one, "
            "or set blocks= to blocks that follow each other."
        )

    @classmethod
    def _fits(cls, args: Any) -> bool:
        parts = [arg for arg in args if isinstance(arg, Part)]
        from_right = parts[0].ndim - cls.seq_dim if parts else 0
        others = [arg for arg in args if isinstance(arg, Tensor) and not isinstance(arg, Part)]
        return bool(parts) and all(each.ndim < from_right or each.shape[-from_right] == 1 for each in others)

    @classmethod
    def _per_token(cls, args: Any) -> bool:
        one = bool(args) and isinstance(args[0], Part) and cls.seq_dim < args[0].ndim - 1
        shape = args[1] if len(args) > 1 else None
        return one and (isinstance(shape, Tensor) or (shape is not None and len(shape) == 1))


def part_class(seq_dim: int) -> type[Part]:
    """Return the class of the hidden states of a region."""
    return type("Part", (Part,), {"seq_dim": seq_dim, "block": ""})


def plain(tensor: Tensor) -> Tensor:
    """Return a part as a tensor on which everything can be done."""
    with torch._C.DisableTorchFunctionSubclass():
        found: Tensor = tensor.as_subclass(Tensor)
        return found


def _bare(name: str) -> str:
    """Return the name without the underscores of a special or private method; in-place functions keep theirs."""
    return name.strip("_") if name.startswith("_") else name
