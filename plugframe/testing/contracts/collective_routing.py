"""Collective contract checks of calls that send without computing; a collective of contract 1 has none of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from plugframe.errors import CollectiveMismatchError, SettingError, UnsupportedError
from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.collective_group import Group
from plugframe.testing.contracts.collective_rules import (
    ALL_TO_ALL,
    GATHERED,
    GRADIENTS,
    GROUPS,
    IN_TIME,
    INPUTS,
    RECEIVED,
    SCATTERED,
    SENT,
    UNSUPPORTED,
)
from plugframe.testing.contracts.collective_values import raises, same
from plugframe.testing.contracts.running import broken
from plugframe.testing.ranks import rank_store

Check = Callable[[Group], None]
#: Elements of a tensor that no collective sends along with a description of the call.
_MANY = 3000


def of_contract_2(*hooks: str) -> Callable[[Check], Check]:
    """Skip a check if the collective says that it does not implement one of the hooks."""

    def mark(check: Check) -> Check:
        @functools.wraps(check)
        def run(group: Group) -> None:
            try:
                check(group)
            except UnsupportedError as error:
                if not any(hook in str(error) for hook in hooks):
                    broken(UNSUPPORTED, f"on rank {group.rank} of {group.size} the message names no hook: {error}")
                pytest.skip(f"It does not implement {' or '.join(hooks)}.")

        return run

    return mark


def _tensors(group: Group, salt: int) -> Iterator[Tensor]:
    """Yield tensors of every dtype, size and layout, different for each `salt`."""
    for dtype in group.settings.dtypes:
        yield torch.tensor([[0, 1, salt], [salt, 1, 0]]).to(dtype)
    yield torch.tensor(float(salt))
    yield torch.empty(2, 0, 3)
    yield torch.arange(12.0).view(3, 4).t() + salt
    yield torch.arange(float(_MANY)).view(-1, 3)[:, 1:] + salt


@rule(RECEIVED)
@of_contract_2("collective_send", "collective_recv")
def messages_arrive(group: Group) -> None:
    """What a rank sends is what the other receives, bit for bit; neither call changes its tensor."""
    for src in range(group.size if group.size > 1 else 0):
        dst = (src + 1) % group.size
        sent = [tensor for salt in (1, 2) for tensor in _tensors(group, salt + src)]
        for tag, tensor in enumerate(sent):
            mine = tensor.to(group.device)
            before = mine.clone()
            if group.rank == src:
                group.send(mine, dst, tag)
            elif group.rank == dst:
                mine = torch.zeros_like(mine, memory_format=torch.contiguous_format)
                before = mine.clone()
                found = group.recv(mine, src, tag)
                what = f"recv of {tensor.dtype} {tuple(tensor.shape)} from rank {src}"
                if not same(found, tensor):
                    broken(RECEIVED, f"{what} gave {found.dtype} {tuple(found.shape)} {found.flatten()[:6].tolist()}")
                if not found.is_contiguous() or (found.numel() and found.data_ptr() == mine.data_ptr()):
                    broken(INPUTS, f"{what} gave strides {found.stride()}, or the memory of its argument")
            if not same(mine, before):
                broken(INPUTS, f"rank {group.rank}'s argument of a message was changed")


@rule(SENT)
@of_contract_2("collective_send", "collective_recv")
def messages_have_two_equal_ends(group: Group) -> None:
    """Unequal shapes, dtypes and tags are an error on both ranks; a message to oneself, or out of the group, too."""
    one = group.tensor([1.0, 2.0])
    if group.rank < 2 and group.size > 1:
        different = {
            "unequal shapes": (group.tensor([1.0, 2.0, 3.0]), 0),
            "unequal sizes": (group.tensor([0.0]).expand(_MANY), 0),
            "unequal dtypes": (one.double(), 0),
            "unequal tags": (one, 1),
        }
        for what, (other, tag) in different.items():
            for first, second in (((one, 0), (other, tag)), ((other, tag), (one, 0))):
                call: Callable[[], object] = functools.partial(group.send, first[0], 1, first[1])
                if group.rank == 1:
                    call = functools.partial(group.recv, second[0], 0, second[1])
                raises(group, CollectiveMismatchError, SENT, f"a message of {what}", call)
        if group.rank == 0:
            group.send(one, 1)
        elif not same(group.recv(one + 1.0, 0), one):
            broken(SENT, "after the errors the next message had other values")
    for rank in (group.rank, group.size):
        raises(group, SettingError, SENT, f"a send to rank {rank} of {group.size}", lambda: group.send(one, rank))  # noqa: B023
        raises(group, SettingError, SENT, f"a recv from rank {rank} of {group.size}", lambda: group.recv(one, rank))  # noqa: B023


@rule(ALL_TO_ALL)
@of_contract_2("collective_all_to_all")
def rows_go_to_their_ranks(group: Group) -> None:
    """Row i of every rank goes to rank i, and comes in rank order, in every dtype and shape."""
    everyone = [[*_tensors(group, 2 * src + 1)] for src in range(group.size)]
    for number, of_mine in enumerate(everyone[group.rank]):
        # Rank src sends to rank dst its tensor, shifted by dst places.
        rows = torch.stack([_shifted(of_mine, dst) for dst in range(group.size)]).to(group.device)
        expected = torch.stack([_shifted(tensors[number], group.rank) for tensors in everyone])
        before = rows.clone()
        found = group.all_to_all(rows)
        if not same(found, expected):
            first = found.flatten()[:6].tolist()
            broken(ALL_TO_ALL, f"rows of {rows.dtype} {tuple(of_mine.shape)} gave {found.dtype} {first}")
        found.logical_not_()
        if not same(rows, before) or not found.is_contiguous():
            broken(INPUTS, "all_to_all changed its input, or returned its memory")


def _shifted(tensor: Tensor, places: int) -> Tensor:
    return tensor.roll(places) if tensor.numel() else tensor


@rule(ALL_TO_ALL)
@of_contract_2("collective_all_to_all")
def any_number_of_rows_goes_to_a_rank(group: Group) -> None:
    """With sizes, as many rows as they say, none included, go to each rank; the next rank alone is a ring."""
    for shape in ((), (2,), (_MANY,), (0,)):
        for salt in range(3):
            sizes = [[(src + dst + salt) % 3 for dst in range(group.size)] for src in range(group.size)]
            _check_rows(group, shape, sizes)
    ring = [[4 * (dst == (src + 1) % group.size) for dst in range(group.size)] for src in range(group.size)]
    nothing = [[0] * group.size for _ in range(group.size)]
    for each in (ring, nothing):
        _check_rows(group, (2,), each)


def _check_rows(group: Group, shape: tuple[int, ...], sizes: list[list[int]]) -> None:
    """Send ``sizes[src][dst]`` rows with the value ``10 * src + dst`` each."""
    mine = sizes[group.rank]
    values = [10 * group.rank + dst for dst in range(group.size) for _ in range(mine[dst])]
    output = [sizes[src][group.rank] for src in range(group.size)]
    expected = [10 * src + group.rank for src in range(group.size) for _ in range(output[src])]
    found = group.all_to_all(_rows(group, values, shape), output, mine)
    if not same(found, _rows(group, expected, shape)):
        text = f"{tuple(found.shape)} {found.flatten()[:: max(found[:1].numel(), 1)][:8].tolist()}"
        broken(ALL_TO_ALL, f"with input_sizes={mine} and output_sizes={output} it gave {text}, not rows of {expected}")


def _rows(group: Group, values: list[int], shape: tuple[int, ...]) -> Tensor:
    rows = group.tensor(values, dtype=torch.float32).view(len(values), *(1 for _ in shape))
    return rows.expand(len(values), *shape).contiguous()


@rule(GRADIENTS)
@of_contract_2("collective_all_to_all")
def gradients_return_with_their_rows(group: Group) -> None:
    """With sync_grads the gradient of a row returns to the rank that sent it; without it, there is none."""
    sizes = [[1 + src + dst for dst in range(group.size)] for src in range(group.size)]
    uneven = [sizes[src][group.rank] for src in range(group.size)], sizes[group.rank]
    for output, mine in ((None, None), uneven):
        rows = group.size if mine is None else sum(mine)
        x = torch.ones(rows, 2, device=group.device, requires_grad=True)
        found = group.all_to_all(x, output, mine, sync_grads=True)
        (found * (group.rank + 1)).sum().backward()  # type: ignore[no-untyped-call]
        each = [1] * group.size if mine is None else mine
        expected = [float(dst + 1) for dst in range(group.size) for _ in range(each[dst])]
        got = None if x.grad is None else x.grad[:, 0].tolist()
        if got != expected:
            broken(GRADIENTS, f"all_to_all gave rank {group.rank} the gradients {got}, not {expected}")
        if group.all_to_all(x, output, mine).requires_grad:
            broken(GRADIENTS, "without sync_grads the result of all_to_all requires gradients")


@rule(ALL_TO_ALL)
@of_contract_2("collective_all_to_all")
def rows_that_do_not_fit_are_an_error_on_every_rank(group: Group) -> None:
    """Unequal shapes, dtypes and sizes are a CollectiveMismatchError on all ranks, a wrong number of rows an error."""
    size = group.size
    one = torch.ones(size, 2, device=group.device)
    if not same(group.all_to_all(one), one):
        broken(ALL_TO_ALL, "equal rows gave others")
    what = f"all_to_all of {size + 1} rows on {size} ranks"
    raises(group, SettingError, ALL_TO_ALL, what, lambda: group.all_to_all(torch.ones(size + 1, device=group.device)))
    for sizes in (([1] * size, None), ([2] * size, [2] * size), ([1] * (size + 1), [1] * (size + 1))):
        what = f"all_to_all of {size} rows with sizes {sizes}"
        raises(group, SettingError, ALL_TO_ALL, what, lambda: group.all_to_all(one, *sizes))  # noqa: B023
    if size == 1:
        return
    different = {
        "unequal shapes": lambda: group.all_to_all(torch.ones(size, 2 + group.rank, device=group.device)),
        "unequal dtypes": lambda: group.all_to_all(one.double() if group.rank else one),
        "sizes on some ranks only": lambda: group.all_to_all(one, *([[1] * size] * 2 if group.rank else ())),
        "output sizes that are not sent": lambda: group.all_to_all(one, [2] * size, [1] * size),
        "unequal shapes of rows": lambda: group.all_to_all(
            torch.ones(size, 2 + group.rank, device=group.device), [1] * size, [1] * size
        ),
    }
    for what, call in different.items():
        raises(group, CollectiveMismatchError, ALL_TO_ALL, f"all_to_all of {what}", call)
    if not same(group.all_to_all(one), one):
        broken(ALL_TO_ALL, "after the errors the next call gave other rows")


@rule(SCATTERED)
@of_contract_2("collective_scatter")
def rows_are_scattered(group: Group) -> None:
    """Row i of rank src's tensor is rank i's result, in every dtype; the others' tensors give shape and dtype only."""
    for src in range(group.size):
        for tensor in _tensors(group, src + 1):
            rows = torch.stack([_shifted(tensor, dst) for dst in range(group.size)]).to(group.device)
            mine = rows if group.rank == src else torch.zeros_like(rows[0])
            before = mine.clone()
            found = group.row(mine, src)
            if not same(found, rows[group.rank]):
                text = f"{found.dtype} {tuple(found.shape)} {found.flatten()[:6].tolist()}"
                broken(SCATTERED, f"{tensor.dtype} {tuple(tensor.shape)} from rank {src} gave rank {group.rank} {text}")
            found.logical_not_()
            if not same(mine, before) or not found.is_contiguous():
                broken(INPUTS, "scatter changed its input, or returned its memory")
    wrong = torch.ones(group.size + 1, 2, device=group.device)
    kind = SettingError if group.size == 1 else CollectiveMismatchError
    raises(group, kind, SCATTERED, f"scatter of {group.size + 1} rows", lambda: group.row(wrong[group.rank :], 0))
    if group.size > 1:
        like = wrong[:-1] if group.rank == 0 else wrong[0].double()
        raises(group, kind, SCATTERED, "scatter of unequal dtypes", lambda: group.row(like, 0))
        like = wrong[:-1] if group.rank == 0 else wrong[0, :1]
        raises(group, kind, SCATTERED, "scatter of unequal shapes", lambda: group.row(like, 0))
    raises(group, SettingError, SCATTERED, "scatter from no rank", lambda: group.row(wrong[:-1], group.size))


@rule(GATHERED)
@of_contract_2("collective_gather_object")
def objects_are_gathered_by_one_rank(group: Group) -> None:
    """Objects of any size are on their destination, in rank order; the other ranks get None."""
    for dst in range(group.size):
        for length in (1, _MANY):
            found = group.gathered({"rank": group.rank, "text": "x" * (length * (1 + group.rank))}, dst)
            seen = None if found is None else [(each["rank"], len(each["text"])) for each in found]
            expected = [(rank, length * (1 + rank)) for rank in range(group.size)] if group.rank == dst else None
            if seen != expected:
                broken(GATHERED, f"gather_object to rank {dst} gave rank {group.rank} {seen}, not {expected}")
    raises(group, SettingError, GATHERED, "gather_object to no rank", lambda: group.gathered(1, group.size))


@rule(GROUPS)
@of_contract_2("collective_all_to_all", "collective_scatter", "collective_gather_object", "collective_send")
def sources_in_a_group_are_ranks_of_the_job(group: Group) -> None:
    """In a group `src` and `dst` are numbered as in the job, and rows as in the group."""
    new = group.plugin.collective_new_group
    own = [new(ranks=[rank]) for rank in range(group.size)][group.rank]
    everyone = new(ranks=list(range(group.size)))
    mine = group.tensor([[float(group.rank)]])
    last = group.size - 1
    rows = torch.arange(float(group.size), device=group.device)
    found = {
        "broadcast": group.broadcast(mine, group.rank, group=own).tolist(),
        "scatter": group.row(mine, group.rank, group=own).tolist(),
        "gather_object": group.gathered(group.rank, group.rank, group=own),
        "all_to_all": group.all_to_all(mine, group=own).tolist(),
        "all_to_all with sizes": group.all_to_all(mine, [1], [1], group=own).tolist(),
        "scatter of all": group.row(rows if group.rank == last else rows[0], last, group=everyone).tolist(),
    }
    expected = {
        "broadcast": [[group.rank]],
        "scatter": [group.rank],
        "gather_object": [group.rank],
        "all_to_all": [[group.rank]],
        "all_to_all with sizes": [[group.rank]],
        "scatter of all": group.rank,
    }
    for name, value in expected.items():
        if found[name] != value:
            broken(GROUPS, f"{name} in a group gave rank {group.rank} {found[name]}, not {value}")
    if group.size > 1 and group.rank == last:
        group.send(mine, 0, group=everyone)
    elif group.size > 1 and group.rank == 0 and not same(group.recv(mine, last, group=everyone), mine + last):
        broken(GROUPS, f"a message from rank {last} in a group of all ranks gave other values")


@rule(IN_TIME)
@of_contract_2("collective_send", "collective_recv")
def a_message_without_its_other_end_is_told_in_time(group: Group) -> None:
    """A send that no rank receives is an error after the timeout, not a hang."""
    if group.size == 1:
        return
    store = rank_store(timeout_s=60.0)
    plugin = group.make()
    plugin.collective_setup(context=group.context(plugin, timeout_s=2.0))
    try:
        if group.rank == 0:
            try:
                # Large: a small one may be buffered.
                plugin.collective_send(tensor=torch.ones(1 << 24, device=group.device), dst=1, tag=0, group=None)
            except (CollectiveMismatchError, UnsupportedError):
                raise
            except Exception:  # noqa: BLE001, S110 - an error of any class will do
                pass
            else:
                broken(IN_TIME, "rank 1 did not receive it, and a send of 64 MiB returned")
    finally:
        store.set(f"alone/{group.rank}", "")
        # The other ranks stay until rank 0 got its error: otherwise it would report a lost connection.
        store.wait(["alone/0"])
        plugin.collective_teardown()
