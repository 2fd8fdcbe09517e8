"""Asking every rank what it is about to send, before it is sent."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.errors import CollectiveMismatchError
from plugframe_builtins.torch_collective.compat import all_gather_single

#: Bytes of a description on the wire: the same on every rank, whatever it is about to send.
WIDTH = 192


def agree(call: str, tensor: Tensor | None, group: dist.ProcessGroup, device: torch.device) -> None:
    """Check that all ranks of `group` make the same call, of a tensor with the same shape, dtype and kind of device.

    Unequal tensors would abort one rank and leave the other with uninitialised memory, so each rank first
    sends a fixed number of bytes that say what it is up to, through `device`.

    Raises:
        CollectiveMismatchError: on all ranks, with what each of them called.
    """
    mine = _encode(call if tensor is None else _describe(call, tensor)).to(device)
    everyone = mine.new_empty(group.size() * WIDTH)
    all_gather_single(everyone, mine, group=group)
    rows = everyone.view(-1, WIDTH)
    if bool((rows == mine).all()):
        return
    ranks: dict[str, list[int]] = {}
    for rank, row in zip(dist.get_process_group_ranks(group), rows.tolist(), strict=True):
        ranks.setdefault(bytes(row).rstrip(b"\0").decode(errors="replace"), []).append(rank)
    calls = "; ".join(f"{_name(members)}: {text}" for text, members in ranks.items())
    raise CollectiveMismatchError(
        f"The ranks do not agree on a collective: {calls}. Make the same call on every rank, "
        "with one shape and dtype (pad what differs, or gather it as an object)."
    )


def _describe(call: str, tensor: Tensor) -> str:
    return f"{call} of {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"


def _encode(text: str) -> Tensor:
    data = text.encode()
    if len(data) > WIDTH:
        data = data[: WIDTH - 9] + b"#%08x" % zlib.crc32(data)
    return torch.frombuffer(bytearray(data.ljust(WIDTH, b"\0")), dtype=torch.uint8)


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
