"""Compare collective calls over ranks before tensors are sent."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.errors import CollectiveMismatchError
from plugframe.utils.rank_text import ranks_text
from plugframe_builtins._shared.torch_collective.compat import all_gather_single

#: Bytes of an encoded description, the same on every rank.
WIDTH = 192
#: Further bytes, in which small payloads travel at once.
ROOM = 256


def agree(
    call: str,
    tensor: Tensor | None,
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    carry: Tensor | None = None,
    shape: str = "",
) -> Tensor:
    """Check that all ranks of `group` make the same call, with equal shape, dtype and device type.

    Unequal tensors would abort one rank and leave the other with uninitialised memory, so each rank first
    sends a fixed-size description of its call through `device`.

    Args:
        carry: payload sent along, of dtype uint8 and shape (n,) with n of at most `ROOM`.
        shape: what is compared instead of the tensor's shape, where that may differ between ranks.

    Returns:
        The payloads of all ranks, of dtype uint8 and shape (ranks, n), on `device`.

    Raises:
        CollectiveMismatchError: on all ranks, with the call of each.
    """
    mine = encode(call if tensor is None else describe(call, tensor, shape)).to(device)
    size = 0 if carry is None else carry.numel()
    if carry is not None:
        mine[WIDTH : WIDTH + size] = carry
    everyone = mine.new_empty(group.size() * (WIDTH + ROOM))
    all_gather_single(everyone, mine, group=group)
    rows = everyone.view(-1, WIDTH + ROOM)
    if bool((rows[:, :WIDTH] == mine[:WIDTH]).all()):
        return rows[:, WIDTH : WIDTH + size].contiguous()
    ranks: dict[str, list[int]] = {}
    for rank, row in zip(dist.get_process_group_ranks(group), rows[:, :WIDTH].tolist(), strict=True):
        ranks.setdefault(_text(row), []).append(rank)
    calls = "; ".join(f"{ranks_text(members)}: {text}" for text, members in ranks.items())
    raise CollectiveMismatchError(
        f"The ranks do not agree on a collective: {calls}. Make the same call on every rank, "
        "with one shape and dtype (pad what differs, or gather it as an object)."
    )


def describe(call: str, tensor: Tensor, shape: str = "") -> str:
    """Return a call with its tensor: ``all_reduce(sum) of (3, 4) float32 on cpu``."""
    dtype, layout = (str(each).removeprefix("torch.") for each in (tensor.dtype, tensor.layout))
    kind = dtype if tensor.layout is torch.strided else f"{dtype} {layout}"
    return f"{call} of {shape or tuple(tensor.shape)} {kind} on {tensor.device.type}"


def encode(text: str) -> Tensor:
    """Return a description as `WIDTH` bytes and room for a payload: dtype uint8, shape (`WIDTH` + `ROOM`,)."""
    data = text.encode()
    if len(data) > WIDTH:
        data = data[: WIDTH - 9] + b"#%08x" % zlib.crc32(data)
    return torch.frombuffer(bytearray(data.ljust(WIDTH + ROOM, b"\0")), dtype=torch.uint8)


def decode(row: Tensor) -> str:
    """Return the description in the bytes of `encode`."""
    return _text(row[:WIDTH].tolist())


def _text(data: list[int]) -> str:
    return bytes(data).rstrip(b"\0").decode(errors="replace")
