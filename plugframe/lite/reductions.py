"""Reductions over ranks: the names of operations, the dtype of each result, and gradients."""

from __future__ import annotations

import opcode
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from plugframe.base.collective import REDUCTIONS
from plugframe.errors import CollectiveMismatchError, SettingError, closest

Reduce = Callable[[Tensor, str], Tensor]

#: Reduced as they are: nothing is lost in their own dtype.
_AS_IT_IS = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)
#: Floats of fewer than 32 bits.
_HALVES = sorted(
    {each for each in vars(torch).values() if isinstance(each, torch.dtype) and each.is_floating_point}, key=str
)
_HALVES = [each for each in _HALVES if each.itemsize < 4]
#: Dimensions of size 1 after those of a tensor that is sent in a wider dtype. The ranks compare shapes before they
#: send anything, so that another dtype on another rank is found without an exchange of its own.
_MARKS = {
    **{dtype: number for number, dtype in enumerate(_INTEGERS, 1)},
    **{dtype: number for number, dtype in enumerate(_HALVES, 1)},
    torch.int64: len(_INTEGERS) + 1,
}
#: Integers that gloo cannot compare.
_NOT_SENT = (torch.int16, torch.uint16, torch.uint32)
_LOW = 0xFFFFFFFF
#: Instructions of Python's byte code: what may follow a call at once, and what drops its result.
_CACHE, _POP_TOP = opcode.opmap.get("CACHE", -1), opcode.opmap["POP_TOP"]


def operation(reduce_op: Any) -> str:
    """Return the name of a reduction: one of "sum", "mean", "min", "max", "product".

    Args:
        reduce_op: a name in any case, or one of `torch.distributed.ReduceOp`.

    Raises:
        SettingError: for any other, with the closest match.
    """
    name = reduce_op if isinstance(reduce_op, str) else _torch_name(reduce_op)
    name = name.lower().removeprefix("reduceop.")
    if name not in REDUCTIONS:
        shown = f"ReduceOp.{name.upper()}" if name and not isinstance(reduce_op, str) else repr(reduce_op)
        raise SettingError(
            f"reduce_op={shown} is not a reduction.{closest(name, REDUCTIONS)} "
            f"Use one of {', '.join(map(repr, REDUCTIONS))}, or torch.distributed.ReduceOp."
        )
    return "mean" if name == "avg" else name


def _torch_name(reduce_op: Any) -> str:
    """Return the name of an operation of ``torch.distributed``, ``""`` for any other object."""
    kind: Any = getattr(getattr(torch, "distributed", None), "ReduceOp", None)
    if kind is None or not isinstance(reduce_op, (kind, kind.RedOpType)):
        return ""
    operation = getattr(reduce_op, "op", reduce_op)  # ReduceOp(ReduceOp.SUM) holds the other in `op`
    return str(getattr(operation, "name", operation)).rpartition(".")[2]


def reduce_tensor(tensor: Tensor, op: str, hooks: Any, group: Any) -> Tensor:
    """Return the reduction of `tensor` over ranks, of its shape: `tensor` itself, reduced in place, where it can be.

    A tensor with a graph is reduced into a new one through which gradients flow. A sum of half precision is a new
    float32 tensor, and `tensor` holds it rounded.
    """
    reduce = _checked(tensor, hooks, group)
    if tensor.requires_grad and (tensor.grad_fn is not None or torch.is_grad_enabled()):
        return _with_gradient(tensor, op, reduce, hooks, group)
    result = _reduced(tensor, op, reduce)
    if result.dtype is not tensor.dtype and not (result.is_floating_point() and tensor.is_floating_point()):
        return result
    if not tensor.is_contiguous() and _overlaps(tensor):
        return result
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            tensor.copy_(result)
    else:
        tensor.detach().copy_(result)
    return tensor if result.dtype is tensor.dtype else result


def _overlaps(tensor: Tensor) -> bool:
    """Return whether several elements share memory, as in an expanded tensor."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def reduce_integer(value: int, op: str, hooks: Any, group: Any, device: torch.device) -> Tensor:
    """Return the reduction over ranks of a Python integer within int64: int64, or float64 for the mean.

    Raises:
        SettingError: on all ranks, if a sum is beyond int64.
    """
    tensor = torch.tensor(value, device=device)
    reduce = _checked(tensor, hooks, group)
    if op not in ("sum", "mean"):
        return reduce(tensor, op)
    high, low, size = reduce(_marked(_parts(tensor), torch.int64), "sum").flatten().tolist()
    total = (high << 32) + low
    if op == "mean":
        return _float64(total / size, device)
    if not -(1 << 63) <= total < 1 << 63:
        raise SettingError(f"all_reduce(): the sum {total} is beyond int64: pass floats.")
    return torch.tensor(total, device=device)


def why_not_in_place(data: Any) -> str:
    """Return why `data` is not reduced in place, for a message."""
    if isinstance(data, Tensor) and data.requires_grad:
        return "It has a graph: pass x.detach(), or call it under torch.no_grad(), to reduce it in place."
    return "Its docstring says what is reduced in place."


def is_dropped(frame: FrameType) -> bool:
    """Return whether the caller discards the result of its call: the call is an expression statement."""
    code, at = frame.f_code.co_code, frame.f_lasti + 2
    while at < len(code) and code[at] == _CACHE:
        at += 2
    return at < len(code) and code[at] == _POP_TOP


def _checked(tensor: Tensor, hooks: Any, group: Any) -> Reduce:
    """Return the collective's all_reduce, with errors about differing ranks in terms of the arguments here."""
    hook = hooks.collective_all_reduce

    def reduce(sent: Tensor, op: str) -> Tensor:
        try:
            return cast(Tensor, hook(tensor=sent, op=op, group=group))
        except CollectiveMismatchError as error:
            if sent is tensor:
                raise
            mine = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            how = f"{tuple(sent.shape)} {str(sent.dtype).removeprefix('torch.')}"
            raise CollectiveMismatchError(f"{error} This rank passed {mine}, which is sent as {how}.") from None

    return reduce


def _reduced(tensor: Tensor, op: str, reduce: Reduce) -> Tensor:
    """Return the reduction in the dtype given in the table of `Lite.all_reduce`; differentiable if `reduce` is."""
    dtype = tensor.dtype
    if op in ("min", "max"):
        return _extreme(tensor, op, reduce)
    if dtype in _AS_IT_IS or tensor.is_complex() or tensor.layout is not torch.strided:
        return reduce(tensor, op)  # which refuses sparse ones
    if tensor.is_floating_point():
        result: Tensor = reduce(_marked(tensor.float(), dtype), op).view(tensor.shape)
        return result.to(dtype) if op == "mean" else result
    if op != "mean":
        sent = tensor if dtype is torch.int64 else _marked(tensor.long(), dtype)
        return reduce(sent, op).view(tensor.shape)
    if dtype is torch.int64:
        return _mean_of_int64(reduce(_marked(_parts(tensor), dtype), "sum").view(3, *tensor.shape))
    return reduce(_marked(_float64(tensor, tensor.device), dtype), op).view(tensor.shape)


def _extreme(tensor: Tensor, op: str, reduce: Reduce) -> Tensor:
    """Return the minimum or maximum, in the same dtype; NaN where a rank has NaN, which backends pass over."""
    dtype = tensor.dtype
    if tensor.is_complex() or tensor.layout is not torch.strided:
        return reduce(tensor, op)  # which refuses them
    if not tensor.is_floating_point():
        if dtype in _NOT_SENT:
            return reduce(_marked(tensor.long(), dtype), op).view(tensor.shape).to(dtype)
        return reduce(tensor, op)
    wide = tensor if dtype in _AS_IT_IS else tensor.float()
    sign = 1.0 if op == "max" else -1.0
    missing = wide.isnan()
    pair = torch.stack([wide.masked_fill(missing, -sign * torch.inf), missing.to(wide.dtype) * sign])
    values, found = reduce(_marked(pair, dtype), op).view(pair.shape)
    result: Tensor = values.masked_fill(found != 0, torch.nan).to(dtype)
    return result


def _marked(sent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the substitute that is sent for a tensor of another dtype, with a shape that encodes the dtype."""
    return sent.reshape(*sent.shape, *(1,) * _MARKS.get(dtype, 0))


def _parts(tensor: Tensor) -> Tensor:
    """Return shape (3, *S): the high and the low halves of int64, whose sums cannot overflow, and ones."""
    return torch.stack([tensor >> 32, tensor & _LOW, torch.ones_like(tensor)])


def _mean_of_int64(sums: Tensor) -> Tensor:
    """Return the mean from the sums over ranks of `_parts`, as float64: exact up to the last rounding."""
    high, low, size = sums
    rest = high.remainder(size).mul_(1 << 32).add_(low)
    whole = high.div(size, rounding_mode="floor").mul_(1 << 32).add_(rest.div(size, rounding_mode="floor"))
    fraction: Tensor = _float64(rest.remainder(size), rest.device) / size
    return _float64(whole, whole.device) + fraction


def _float64(value: Any, device: torch.device) -> Tensor:
    """Return `value` as float64 on `device`; on the CPU where the device has no such numbers (Apple's GPUs)."""
    try:
        return torch.as_tensor(value, dtype=torch.float64, device=device)
    except TypeError:
        return torch.as_tensor(value, device="cpu").to(torch.float64)


class _Reduction(torch.autograd.Function):
    """A differentiable sum or mean over ranks, whose backward is the same reduction of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, op: str, reduce: Reduce) -> Tensor:
        ctx.rest = op, reduce
        return reduce(tensor.detach(), op)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        return _Reduction.apply(grads[0], *ctx.rest), None, None  # type: ignore[no-untyped-call]


def _with_gradient(tensor: Tensor, op: str, reduce: Reduce, hooks: Any, group: Any) -> Tensor:
    if op in ("sum", "mean"):
        return _reduced(tensor, op, lambda sent, op: _Reduction.apply(sent, op, reduce))  # type: ignore[no-untyped-call]
    if tensor.is_complex() or tensor.layout is not torch.strided:
        return reduce(tensor, op)  # which refuses them
    rows: Tensor = hooks.collective_all_gather(tensor=tensor, group=group, sync_grads=True)
    if op == "product":
        return (rows if tensor.dtype in _AS_IT_IS else rows.float()).prod(0)
    return rows.amax(0) if op == "max" else rows.amin(0)
