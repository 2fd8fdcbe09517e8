"""Collective contract checks that run on every rank of a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from plugframe.errors import CollectiveMismatchError
from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.collective_group import Group, Settings, apart, connected
from plugframe.testing.contracts.collective_routing import (
    a_message_without_its_other_end_is_told_in_time,
    any_number_of_rows_goes_to_a_rank,
    gradients_return_with_their_rows,
    messages_arrive,
    messages_have_two_equal_ends,
    objects_are_gathered_by_one_rank,
    rows_are_scattered,
    rows_go_to_their_ranks,
    rows_that_do_not_fit_are_an_error_on_every_rank,
    sources_in_a_group_are_ranks_of_the_job,
)
from plugframe.testing.contracts.collective_rules import (
    ALL_TO_ALL,
    BARRIERS,
    CAPABLE,
    GATHERED,
    GRADIENTS,
    GROUPS,
    IN_TIME,
    INPUTS,
    LAW_5,
    LAW_9,
    LOOPBACK,
    MISMATCH,
    OBJECTS,
    RECEIVED,
    REDUCED,
    REFUSED,
    SCATTERED,
    SENT,
    UNSUPPORTED,
)
from plugframe.testing.contracts.collective_values import (
    a_broadcast_gives_the_sources,
    bools_stay_bools,
    gathering_stacks,
    gradients_flow_back,
    objects_travel,
    reductions_compute_their_names,
    shapes_are_kept,
    unequal_tensors_are_an_error_on_every_rank,
    wrong_reductions_are_refused,
)
from plugframe.testing.contracts.running import broken, left, one_line, traces
from plugframe.testing.ranks import rank_store

__all__ = [
    "ALL_TO_ALL",
    "APART",
    "BARRIERS",
    "CAPABLE",
    "CONNECTED",
    "GATHERED",
    "GRADIENTS",
    "GROUPS",
    "INPUTS",
    "IN_TIME",
    "LAW_5",
    "LAW_9",
    "LOOPBACK",
    "MISMATCH",
    "OBJECTS",
    "RECEIVED",
    "REDUCED",
    "REFUSED",
    "SCATTERED",
    "SENT",
    "UNSUPPORTED",
    "Group",
    "Settings",
    "apart",
    "connected",
]


@rule(GROUPS)
def groups_hold_their_members(group: Group) -> None:
    """A group has its own size; source ranks are numbered as in the job."""
    new = group.plugin.collective_new_group
    alone = [new(ranks=[rank]) for rank in range(group.size)]
    whole = new(ranks=list(range(group.size)))
    mine = group.tensor([float(group.rank)])
    own = alone[group.rank]
    found = {
        "all_gather": group.gather(mine, group=own).tolist(),
        "all_reduce": group.reduce(mine, "sum", group=own).tolist(),
        "broadcast": group.broadcast(mine, group.rank, group=own).tolist(),
        "all_gather_object": group.objects(group.rank, group=own),
        "all_gather of all": group.gather(mine, group=whole).tolist(),
    }
    expected = {
        "all_gather": [[group.rank]],
        "all_reduce": [group.rank],
        "broadcast": [group.rank],
        "all_gather_object": [group.rank],
        "all_gather of all": [[rank] for rank in range(group.size)],
    }
    if found != expected:
        wrong = next(name for name in expected if found[name] != expected[name])
        broken(GROUPS, f"{wrong} in a group gave rank {group.rank} {found[wrong]}, not {expected[wrong]}")
    group.plugin.collective_barrier(name="whole", group=whole)


@rule(BARRIERS)
def barriers_wait(group: Group) -> None:
    """No rank leaves a barrier before all have entered it."""
    store = rank_store()
    for number in range(3):
        if group.size > 1 and group.rank == number % group.size:
            time.sleep(0.1)  # otherwise the others may have entered by chance
        store.add(f"came/{number}", 1)
        group.plugin.collective_barrier(name=f"number {number}", group=None)
        if store.add(f"came/{number}", 0) != group.size:
            broken(BARRIERS, f"rank {group.rank} left a barrier that others had not entered")


@rule(BARRIERS)
def who_is_missing_at_a_barrier_is_named(group: Group) -> None:
    """A monitored barrier returns if all ranks enter it, and otherwise names the missing ones."""
    group.plugin.collective_monitored_barrier(name="all", timeout_s=20.0)
    if group.size == 1:
        return
    store = rank_store()
    absent = group.size - 1
    try:
        if group.rank != absent:
            group.plugin.collective_monitored_barrier(name="saving", timeout_s=0.2)
            broken(BARRIERS, f"a monitored barrier returned on rank {group.rank}, and rank {absent} never entered it")
    except RuntimeError as error:
        if str(absent) not in str(error):
            broken(BARRIERS, f"rank {absent} did not enter it, and the message does not name it: {error}")
    finally:
        store.set(f"named/{group.rank}", "")  # also after a wrong message: the absent rank waits for it
    store.wait([f"named/{rank}" for rank in range(group.size)])


@rule(CAPABLE)
def its_process_group_is_told(group: Group) -> None:
    """The process group exists if the capability 'process-group' is provided, and is torch's."""
    found = group.plugin.collective_process_group()
    promised = "process-group" in group.settings.provides
    if promised != (found is not None):
        broken(CAPABLE, f"provides={group.settings.provides!r}, and collective_process_group() gave {found!r}")
    if found is not None and not isinstance(found, torch.distributed.ProcessGroup):
        broken(CAPABLE, f"collective_process_group() gave a {type(found).__name__}, not one of torch")


@rule(LOOPBACK)
def nothing_listens_beyond_loopback(group: Group) -> None:
    """No other machine can connect."""
    from plugframe.testing.contracts.environment import _listening

    if not sys.platform.startswith("linux"):
        return
    group.plugin.collective_new_group(ranks=list(range(group.size)))
    wide = sorted(each for each in _listening() if not each.startswith(("127.", "::1", "::ffff:127.")))
    if wide:
        broken(LOOPBACK, f"rank {group.rank} listens on {', '.join(wide)}")


# ---------------------------------------------------------------------- set-up and tear-down


@rule(LAW_9)
def it_connects_again_and_again(group: Group) -> None:
    """Several objects in turn, and one object twice, connect and leave nothing behind."""
    with group.set_up(group.make()):
        pass  # torch creates some state once in a process
    before = traces()
    again = group.make()
    for number, plugin in enumerate((group.make(), again, again), 1):
        try:
            with group.set_up(plugin):
                found = plugin.collective_all_reduce(tensor=group.tensor([1.0]), op="sum", group=None).tolist()
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(LAW_9, f"connection {number} in one process raised {one_line(error)}")
        if found != [float(group.size)]:
            broken(LAW_9, f"connection {number} in one process gave the sum {found}")
        what = left(before, traces(collect=False)) and left(before, traces())
        if what:
            broken(LAW_9, f"after connection {number} {what}")


@rule(LAW_9)
def tear_down_may_come_early_or_twice(group: Group) -> None:
    """Tear-down does nothing without a set-up, after one that failed, and the second time."""
    plugin = group.make()
    before = traces()
    store = rank_store()

    class Lost(Exception):
        pass

    def lose(context: Any, timeout_s: float) -> Any:
        raise Lost

    try:
        plugin.collective_teardown()
        context = group.context()
        context.hooks.environment_store = lose
        with suppress(Lost):
            plugin.collective_setup(context=context)
        plugin.collective_teardown()
        plugin.collective_teardown()
    except Exception as error:  # noqa: BLE001 - reported as it is
        broken(LAW_9, f"a tear-down without a set-up, after one that failed, or a second one raised {one_line(error)}")
    what = left(before, traces())
    if what:
        broken(LAW_9, f"after a set-up that failed {what}")
    store.set(f"early/{group.rank}", "")
    store.wait([f"early/{rank}" for rank in range(group.size)])


@rule(IN_TIME)
def who_does_not_come_is_told_in_time(group: Group) -> None:
    """A collective that one rank does not call is an error on the others, not a hang."""
    if group.size == 1:
        return
    store = rank_store(timeout_s=60.0)
    plugin = group.make()
    plugin.collective_setup(context=group.context(plugin, timeout_s=2.0))
    try:
        if group.rank == 0:
            try:
                found = plugin.collective_all_reduce(tensor=group.tensor([1.0]), op="sum", group=None)
            except CollectiveMismatchError as error:
                broken(IN_TIME, f"a missing rank is reported as one with another tensor: {error}")
            except Exception:  # noqa: BLE001, S110 - an error of any class will do
                pass
            else:
                broken(IN_TIME, f"the others did not call it, and all_reduce gave {found.tolist()}")
    finally:
        store.set(f"told/{group.rank}", "")
        # Absent ranks stay until the others got their error: otherwise those would report a lost connection.
        store.wait(["told/0"])
        plugin.collective_teardown()


CONNECTED: Sequence[Callable[[Group], None]] = (
    gathering_stacks,
    shapes_are_kept,
    reductions_compute_their_names,
    bools_stay_bools,
    a_broadcast_gives_the_sources,
    gradients_flow_back,
    objects_travel,
    messages_arrive,
    rows_go_to_their_ranks,
    any_number_of_rows_goes_to_a_rank,
    gradients_return_with_their_rows,
    rows_are_scattered,
    objects_are_gathered_by_one_rank,
    groups_hold_their_members,
    sources_in_a_group_are_ranks_of_the_job,
    its_process_group_is_told,
    wrong_reductions_are_refused,
    nothing_listens_beyond_loopback,
    unequal_tensors_are_an_error_on_every_rank,
    messages_have_two_equal_ends,
    rows_that_do_not_fit_are_an_error_on_every_rank,
    barriers_wait,
    who_is_missing_at_a_barrier_is_named,
)
APART: Sequence[Callable[[Group], None]] = (
    it_connects_again_and_again,
    tear_down_may_come_early_or_twice,
    who_does_not_come_is_told_in_time,
    a_message_without_its_other_end_is_told_in_time,
)
