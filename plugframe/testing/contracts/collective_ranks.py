"""Collective contract checks that run on every rank of a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plugframe.core.registry.registry import Registry
from plugframe.errors import CollectiveMismatchError, SettingError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.placed import context_of
from plugframe.testing.contracts.running import broken, left, one_line, traces
from plugframe.testing.ranks import rank_store

LAW_5 = "Law 5 (one shape law for any number of ranks: all_gather stacks, all_reduce and broadcast keep the shape)"
REDUCED = "Reduced (each reduction computes what its name says, in the dtype it was given)"
INPUTS = "Inputs (what is passed in is never changed, and results are new and contiguous)"
MISMATCH = "Mismatch (unequal shapes or dtypes are a CollectiveMismatchError on all ranks, listing them)"
REFUSED = "Refused (a reduction that has no exact result is a SettingError that says what to use)"
GRADIENTS = "Gradients (with sync_grads they flow back to every rank's input)"
OBJECTS = "Objects (any object that can be pickled is gathered in rank order, and broadcast from its source)"
GROUPS = "Groups (a group holds the ranks it was made of)"
BARRIERS = "Barriers (a barrier returns once all are there, and a monitored one names who is missing)"
IN_TIME = "In time (an exchange that a rank does not take part in is an error after the timeout)"
CAPABLE = "Capable (it provides 'process-group' if collective_process_group() gives one, and only then)"
LOOPBACK = "Loopback (on one node nothing listens on other interfaces than loopback)"
LAW_9 = "Law 9 (nothing is left behind)"


@dataclass
class Settings:
    """What is under test, sent to the ranks.

    Attributes:
        spec: the name.
        options: constructor arguments.
        accelerator: the name of one on whose devices it works.
        provides: what its descriptor says.
        dtypes: that it can exchange.
    """

    spec: str
    options: dict[str, Any]
    accelerator: str
    provides: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    device: int = 0
    names: dict[str, str] = field(default_factory=dict)


class Group:
    """One rank with a collective that is set up: its hooks, called as the core calls them."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        registry = Registry.discover()
        self.accelerator = registry.make(registry.find("accelerator", settings.accelerator))
        indices = self.accelerator.accelerator_parse_devices(devices=world.local_world_size)
        self.device: torch.device = self.accelerator.accelerator_device(index=indices[world.local_rank])
        self.entry = registry.find("collective", settings.spec)
        self.registry = registry
        self.plugin = self.make()

    def make(self) -> Any:
        """Return another object of the plugin."""
        return self.registry.make(self.entry, self.settings.options)

    def context(self, *plugins: Any, timeout_s: float = 20.0) -> Context:
        """Return what the plugin sees of the job."""
        context = context_of(
            self.accelerator,
            *plugins,
            device=self.device,
            world=self.world,
            names={"collective": self.entry.name},
            environment_store=lambda context, timeout_s: rank_store(timeout_s),
        )
        object.__setattr__(context, "timeout_s", timeout_s)
        return context

    @property
    def rank(self) -> int:
        return self.world.global_rank

    @property
    def size(self) -> int:
        return self.world.world_size

    def tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make a tensor on this rank's device."""
        return torch.tensor(*args, **kwargs).to(self.device)

    def gather(self, tensor: Tensor, *, group: Any = None, sync_grads: bool = False) -> Tensor:
        found: Tensor = self.plugin.collective_all_gather(tensor=tensor, group=group, sync_grads=sync_grads)
        return found

    def reduce(self, tensor: Tensor, op: str, *, group: Any = None) -> Tensor:
        found: Tensor = self.plugin.collective_all_reduce(tensor=tensor, op=op, group=group)
        return found

    def scatter(self, tensor: Tensor, op: str, *, group: Any = None) -> Tensor:
        found: Tensor = self.plugin.collective_reduce_scatter(tensor=tensor, op=op, group=group)
        return found

    def broadcast(self, tensor: Tensor, src: int = 0, *, group: Any = None) -> Tensor:
        found: Tensor = self.plugin.collective_broadcast(tensor=tensor, src=src, group=group)
        return found

    def objects(self, obj: Any, *, group: Any = None) -> list[Any]:
        found: list[Any] = self.plugin.collective_all_gather_object(obj=obj, group=group)
        return found

    @contextmanager
    def set_up(self, plugin: Any, **settings: Any) -> Iterator[Any]:
        """Set a plugin up, and tear it down."""
        plugin.collective_setup(context=self.context(plugin, **settings))
        try:
            yield plugin
        finally:
            plugin.collective_teardown()


@contextmanager
def connected(world: World, settings: Settings) -> Iterator[Group]:
    """Give a group whose collective is set up."""
    group = Group(world, settings)
    group.accelerator.accelerator_setup(context=group.context())
    try:
        with group.set_up(group.plugin):
            yield group
    finally:
        group.accelerator.accelerator_teardown()


@contextmanager
def apart(world: World, settings: Settings) -> Iterator[Group]:
    """Give a group whose checks set up and tear down for themselves."""
    group = Group(world, settings)
    group.accelerator.accelerator_setup(context=group.context())
    try:
        yield group
    finally:
        group.accelerator.accelerator_teardown()


def _same(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors hold the same bits."""
    one, other = one.cpu().contiguous(), other.cpu().contiguous()
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# ---------------------------------------------------------------------- law 5


@rule(LAW_5)
def gathering_stacks(group: Group) -> None:
    """all_gather gives (ranks, *shape) in rank order, in every dtype, for one rank too."""
    for dtype in group.settings.dtypes:
        each = [torch.tensor([[0, 1, rank], [rank, 1, 0]]).to(dtype) for rank in range(group.size)]
        found = group.gather(each[group.rank].to(group.device))
        if found.shape != (group.size, 2, 3):
            broken(LAW_5, f"all_gather of (2, 3) on {group.size} ranks gave {tuple(found.shape)}")
        if not _same(found, torch.stack(each)):
            broken(LAW_5, f"all_gather of {dtype} gave {found.dtype} {found.tolist()}, not the ranks' in their order")


def _shapes() -> dict[str, Tensor]:
    base = torch.arange(12.0).view(3, 4)
    return {
        "a number": torch.tensor(1.5),
        "an empty tensor": torch.empty(0),
        "a tensor with an empty dimension": torch.empty(2, 0, 3),
        "a transposed tensor": base.t(),
        "every other column": base[:, ::2],
        "an expanded tensor": base[0].expand(2, 4),
    }


@rule(LAW_5)
def shapes_are_kept(group: Group) -> None:
    """Numbers, empty and strided tensors keep their shape in every call; the input stays as it is."""
    for what, made in _shapes().items():
        tensor = made.to(group.device)
        before = tensor.clone()
        results = {
            "all_gather": group.gather(tensor)[group.size - 1],
            "all_reduce": group.reduce(tensor, "mean"),
            "broadcast": group.broadcast(tensor, group.size - 1),
        }
        for call, found in results.items():
            if found.shape != made.shape:
                broken(LAW_5, f"{call} of {what}, {tuple(made.shape)}, gave {tuple(found.shape)}")
            if not torch.equal(found.cpu(), made):
                broken(REDUCED, f"{call} of {what} that is equal on all ranks gave other numbers")
            if not found.is_contiguous() or found.device != tensor.device:
                broken(INPUTS, f"{call} of {what} gave strides {found.stride()} on {found.device}")
            if found.numel() and found.data_ptr() == tensor.data_ptr():
                broken(INPUTS, f"{call} of {what} gave the memory of its input")
        for op in ("sum", "mean", "max"):
            group.reduce(tensor, op).add_(1.0)
            group.gather(tensor).add_(1.0)
            group.broadcast(tensor).add_(1.0)
        if not torch.equal(tensor, before):
            broken(INPUTS, f"{what} was changed by an exchange, or by writing to its result")


@rule(REDUCED)
def reductions_compute_their_names(group: Group) -> None:
    """sum, mean, avg, min, max and product, of all_reduce and reduce_scatter, keep the dtype."""
    for dtype in (d for d in group.settings.dtypes if d not in (torch.bool,) and not d.is_complex):
        each = torch.stack([torch.tensor([2, 3 + rank]) for rank in range(group.size)]).to(dtype)
        wide = each.double() if dtype.is_floating_point else each.long()
        want = {"sum": wide.sum(0), "min": wide.amin(0), "max": wide.amax(0), "product": wide.prod(0)}
        if dtype.is_floating_point:
            want["mean"] = want["avg"] = wide.mean(0)
        mine = each[group.rank].to(group.device)
        for op, expected in want.items():
            found = group.reduce(mine, op)
            if not _same(found, expected.to(dtype)):
                wanted = expected.to(dtype)
                broken(REDUCED, f"{op} of {dtype} gave {found.dtype} {found.tolist()}, not {wanted.tolist()}")
            rows = torch.stack([mine + row for row in range(group.size)])
            row = group.scatter(rows, op)
            if row.shape != mine.shape:
                broken(LAW_5, f"reduce_scatter of {tuple(rows.shape)} gave {tuple(row.shape)}")
            whole = torch.stack([group.reduce(mine + row, op) for row in range(group.size)])
            if not _same(row, whole[group.rank]):
                broken(REDUCED, f"reduce_scatter({op}) of {dtype} gave rank {group.rank} {row.tolist()}")


@rule(REDUCED)
def bools_stay_bools(group: Group) -> None:
    """The maximum of bools is 'any', the minimum 'all'."""
    if torch.bool not in group.settings.dtypes:
        return
    mine = group.tensor([True, group.rank == 0, False])
    for op, expected in {"max": [True, True, False], "min": [True, group.size == 1, False]}.items():
        found = group.reduce(mine, op)
        if found.dtype is not torch.bool or found.tolist() != expected:
            broken(REDUCED, f"{op} of bools gave {found.dtype} {found.tolist()}, not {expected}")


@rule(LAW_5)
def a_broadcast_gives_the_sources(group: Group) -> None:
    """Every rank gets rank src's tensor, bit for bit, and its own stays."""
    for src in range(group.size):
        for dtype in group.settings.dtypes:
            mine = group.tensor([[1, group.rank]]).to(dtype)
            before = mine.clone()
            found, expected = group.broadcast(mine, src), torch.tensor([[1, src]]).to(dtype)
            if not _same(found, expected):
                broken(LAW_5, f"broadcast of {dtype} from rank {src} gave {found.dtype} {found.float().tolist()}")
            if not _same(mine, before):
                broken(INPUTS, f"broadcast from rank {src} wrote into the tensor of rank {group.rank}")


# ---------------------------------------------------------------------- errors


def _raises(group: Group, kind: type[Exception], rule: str, what: str, call: Callable[[], Any]) -> str:
    """Check that a call raises on this rank, in one line, and return the message."""
    try:
        found = call()
    except kind as error:
        if "\n" in str(error).strip():
            broken(rule, f"{what}: the message has several lines: {error}")
        return str(error)
    except Exception as error:  # noqa: BLE001 - reported as it is
        broken(rule, f"{what}: on rank {group.rank} it raised {one_line(error)}, not a {kind.__name__}")
    broken(rule, f"{what}: on rank {group.rank} it gave {found!r}")


@rule(MISMATCH)
def unequal_tensors_are_an_error_on_every_rank(group: Group) -> None:
    """Shapes, dtypes and numbers of dimensions that differ are told on all ranks alike, and the next call works."""
    if group.size == 1:
        return
    different = {
        "unequal shapes": torch.ones(2 + group.rank),
        "unequal dtypes": torch.ones(2, dtype=(torch.float32, torch.float64)[group.rank % 2]),
        "unequal numbers of dimensions": torch.ones((2, 3) if group.rank else (6,)),
    }
    calls: dict[str, Callable[[Tensor], Any]] = {
        "all_gather": group.gather,
        "all_reduce": lambda tensor: group.reduce(tensor, "sum"),
        "broadcast": group.broadcast,
    }
    for what, made in different.items():
        for name, call in calls.items():
            tensor = made.to(group.device)
            said = _raises(group, CollectiveMismatchError, MISMATCH, f"{name} of {what}", lambda: call(tensor))  # noqa: B023
            everyone = group.objects(said)
            if len(set(everyone)) != 1:
                broken(MISMATCH, f"{name} of {what} is told differently: {' / '.join(everyone)}")
            if not all(str(rank) in said for rank in range(group.size)):
                broken(MISMATCH, f"{name} of {what}: the message does not list the ranks: {said}")
    if group.reduce(group.tensor([1.0]), "sum").tolist() != [float(group.size)]:
        broken(MISMATCH, "after errors the next exchange gave other numbers")


@rule(REFUSED)
def wrong_reductions_are_refused(group: Group) -> None:
    """An unknown reduction, and the mean of whole numbers, are refused on every rank."""
    for op, tensor in (("median", torch.ones(1)), ("mean", torch.ones(1, dtype=torch.int64))):
        what = f"{op!r} of {tensor.dtype}"
        said = _raises(group, SettingError, REFUSED, what, lambda: group.reduce(tensor.to(group.device), op))  # noqa: B023
        if op not in said:
            broken(REFUSED, f"{what}: the message does not name it: {said}")
    rows = torch.ones(group.size + 1, device=group.device)
    said = _raises(
        group, SettingError, REFUSED, f"reduce_scatter of {group.size + 1} rows", lambda: group.scatter(rows, "sum")
    )
    if str(group.size) not in said:
        broken(REFUSED, f"reduce_scatter of {group.size + 1} rows: the message does not say how many it takes: {said}")


# ---------------------------------------------------------------------- the rest


@rule(GRADIENTS)
def gradients_flow_back(group: Group) -> None:
    """Each input gets the sum over ranks of its row's gradients; without sync_grads there are none."""
    x = group.tensor([1.0, 2.0]).requires_grad_(True)
    weights = torch.arange(1.0, 1 + 2 * group.size, device=group.device).view(group.size, 2) * (group.rank + 1)
    found = group.gather(x, sync_grads=True)
    if found.shape != (group.size, 2):
        broken(LAW_5, f"all_gather(sync_grads=True) of (2,) gave {tuple(found.shape)}")
    if not found.requires_grad:
        broken(GRADIENTS, "the result of all_gather(sync_grads=True) does not require gradients")
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    total = sum(range(1, group.size + 1))
    expected = [total * (1.0 + 2 * group.rank), total * (2.0 + 2 * group.rank)]
    if x.grad is None or x.grad.tolist() != expected:
        broken(GRADIENTS, f"rank {group.rank} got {None if x.grad is None else x.grad.tolist()}, not {expected}")
    if group.gather(x).requires_grad or group.reduce(x, "sum").requires_grad:
        broken(GRADIENTS, "without sync_grads a result requires gradients, which nobody would send back")


@rule(OBJECTS)
def objects_travel(group: Group) -> None:
    """Objects of any size arrive, in rank order."""
    mine = {"rank": group.rank, "text": "x" * (1 + 1000 * group.rank), "t": torch.arange(group.rank)}
    everyone = group.objects(mine)
    if [each["rank"] for each in everyone] != list(range(group.size)) or len(everyone[-1]["text"]) != len(
        "x"
    ) + 1000 * (group.size - 1):
        broken(OBJECTS, f"all_gather_object gave {[each['rank'] for each in everyone]}")
    for src in range(group.size):
        found = group.plugin.collective_broadcast_object(obj=mine, src=src, group=None)
        if found["rank"] != src or found["t"].tolist() != list(range(src)):
            broken(OBJECTS, f"broadcast_object from rank {src} gave rank {found['rank']}'s")


@rule(GROUPS)
def groups_hold_their_members(group: Group) -> None:
    """A group has its own size, and its source ranks are those of the job."""
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
    """No rank leaves a barrier before all have come to it."""
    store = rank_store()
    for number in range(3):
        if group.size > 1 and group.rank == number % group.size:
            time.sleep(0.1)  # else the others may have come by luck
        store.add(f"came/{number}", 1)
        group.plugin.collective_barrier(name=f"number {number}", group=None)
        if store.add(f"came/{number}", 0) != group.size:
            broken(BARRIERS, f"rank {group.rank} left a barrier that others had not come to")


@rule(BARRIERS)
def who_is_missing_at_a_barrier_is_named(group: Group) -> None:
    """A monitored barrier lets all that came pass, and names who did not."""
    group.plugin.collective_monitored_barrier(name="all", timeout_s=20.0)
    if group.size == 1:
        return
    store = rank_store()
    absent = group.size - 1
    try:
        if group.rank != absent:
            group.plugin.collective_monitored_barrier(name="saving", timeout_s=0.2)
            broken(BARRIERS, f"a monitored barrier returned on rank {group.rank}, and rank {absent} never came")
    except RuntimeError as error:
        if str(absent) not in str(error):
            broken(BARRIERS, f"rank {absent} did not come, and the message does not say so: {error}")
    finally:
        store.set(f"named/{group.rank}", "")  # also by one that was told wrongly: the absent one waits for it
    store.wait([f"named/{rank}" for rank in range(group.size)])


@rule(CAPABLE)
def its_process_group_is_told(group: Group) -> None:
    """What strategies ask for by 'process-group' is there, and is torch's."""
    found = group.plugin.collective_process_group()
    promised = "process-group" in group.settings.provides
    if promised != (found is not None):
        broken(CAPABLE, f"provides={group.settings.provides!r}, and collective_process_group() gave {found!r}")
    if found is not None and not isinstance(found, torch.distributed.ProcessGroup):
        broken(CAPABLE, f"collective_process_group() gave a {type(found).__name__}, which torch does not know")


@rule(LOOPBACK)
def nothing_listens_beyond_loopback(group: Group) -> None:
    """Whoever is not on this machine cannot connect."""
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
    """Objects one after the other, and one object twice, connect and leave nothing."""
    with group.set_up(group.make()):
        pass  # what torch sets up once in a process is there now
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
    """Without a set-up, after one that failed, and a second time, it does nothing."""
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
    """An exchange that a rank takes no part in is an error on those that wait, not a hang."""
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
                broken(IN_TIME, f"a rank that did not come is told as one that came with something else: {error}")
            except Exception:  # noqa: BLE001, S110 - of whatever class, it has been told
                pass
            else:
                broken(IN_TIME, f"the others did not come, and all_reduce gave {found.tolist()}")
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
    groups_hold_their_members,
    its_process_group_is_told,
    wrong_reductions_are_refused,
    nothing_listens_beyond_loopback,
    unequal_tensors_are_an_error_on_every_rank,
    barriers_wait,
    who_is_missing_at_a_barrier_is_named,
)
APART: Sequence[Callable[[Group], None]] = (
    it_connects_again_and_again,
    tear_down_may_come_early_or_twice,
    who_does_not_come_is_told_in_time,
)
