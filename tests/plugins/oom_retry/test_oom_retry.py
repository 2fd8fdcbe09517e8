"""The extension oom-retry: a step that runs out of memory on any rank is run again by all, in halves."""

from __future__ import annotations

import dataclasses
import random
import sys
import warnings
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import warm
from plugframe import Lite, OrderError, PlugframeWarning, SettingError, UnsupportedError
from plugframe.hooks.world import World
from plugframe_builtins.ddp.strategy import DDP
from plugframe_builtins.oom_retry import batches
from plugframe_builtins.oom_retry.extension import OomRetry
from plugframe_builtins.oom_retry.memory import is_out_of_memory
from ranks import run_checks

NAME = "oom-retry"
Pair = tuple[Tensor, Tensor]


class Model(nn.Module):
    """A model that has memory for `most` samples at a time, in forward or in backward."""

    def __init__(self, most: int | None = None, *, dropout: float = 0.0, backward: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.most = most
        self.backward = backward
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.seen += len(x)
        hidden = self.first(x)
        if self.backward:
            hidden.register_hook(lambda _: self.use(len(x)))
        out: Tensor = self.last(self.dropout(hidden).tanh())
        if not self.backward:
            self.use(len(x))
        return out

    def use(self, samples: int) -> None:
        if self.most is not None and samples > self.most:
            raise torch.OutOfMemoryError(f"no room for {samples}")


def model(most: int | None = None, **options: Any) -> Model:
    torch.manual_seed(1)
    return Model(most, **options)


def data(samples: int, rank: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(samples, 4, generator=generator), torch.randn(samples, 3, generator=generator)


def stepping(lite: Lite, module: nn.Module) -> Callable[[Pair], Tensor]:
    def step(batch: Pair) -> Tensor:
        loss = nn.functional.mse_loss(module(batch[0]), batch[1])
        lite.backward(loss)
        return loss

    return step


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def whole(*parts: Pair) -> list[Tensor | None]:
    """Return the gradients that plain torch computes, averaged over the parts."""
    module = model()
    for x, y in parts:
        (nn.functional.mse_loss(module(x), y) / len(parts)).backward()
    return gradients(module)


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None], factor: float = 1.0) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other * factor)


@pytest.fixture
def lite() -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1, plugins=NAME) as made:
        yield made


def set_up(lite: Lite, module: Model) -> tuple[OomRetry, Model, Callable[[Pair], Tensor]]:
    lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    return lite.extension(NAME), module, stepping(lite, module)


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_without_memory_is_run_in_halves(lite: Lite, backward: bool) -> None:
    """Gradients and result are those of the whole batch, uneven last part included, and the size is kept."""
    retry, module, step = set_up(lite, model(2, backward=backward))
    batch = data(7)
    with pytest.warns(
        PlugframeWarning, match="Memory ran out with 7 and 4 samples at a time: oom-retry goes on with 2"
    ):
        loss = retry.run(batch, step)
    expected = whole(batch)
    assert_equal(gradients(module), expected)
    torch.testing.assert_close(loss, nn.functional.mse_loss(model()(batch[0]), batch[1]).detach())
    assert not loss.requires_grad
    assert module.sizes[:6] == [7, 4, 2, 2, 2, 1]
    assert module.seen == 7  # a buffer has seen every sample once, as if nothing had happened
    assert retry.micro_batch == 2
    module.sizes.clear()
    module.zero_grad()
    retry.run(batch, step)
    assert module.sizes == [2, 2, 2, 1]
    assert_equal(gradients(module), expected)


def test_without_need_a_step_is_as_it_was(lite: Lite) -> None:
    """A batch that fits is one part, the very object, with the loss and the gradients of a plain loop to the bit."""
    retry, module, step = set_up(lite, model(dropout=0.5))
    batch = data(6)
    seen: list[Any] = []

    def noted(part: Pair) -> Tensor:
        seen.append(part)
        return step(part)

    torch.manual_seed(3)
    loss = retry.run(batch, noted)
    found = gradients(module)
    module.zero_grad()
    torch.manual_seed(3)
    assert torch.equal(loss, step(batch))
    assert seen == [batch]
    assert seen[0] is batch
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(module), strict=True) if a is not None)
    assert retry.micro_batch is None


def test_gradients_accumulate_on_what_was_there(lite: Lite) -> None:
    """What earlier batches accumulated stays, once, whether a step is tried again or not."""
    retry, module, step = set_up(lite, model())
    batch = data(6)
    retry.run(batch, step)
    module.most = 3
    with pytest.warns(PlugframeWarning, match="with 6 samples"):
        retry.run(batch, step)
    assert_equal(gradients(module), whole(batch), 2.0)


def test_a_step_that_is_tried_again_draws_the_same(lite: Lite) -> None:
    """The generators are put back: a run that finds the size ends as one that knew it, to the bit."""
    retry, module, step = set_up(lite, model(2, dropout=0.5))
    batch = data(5)

    def drawing(part: Pair) -> dict[str, float]:
        return {"loss": step(part).item(), "drawn": random.random()}

    results = []
    for known in (False, True):
        torch.manual_seed(3)
        random.seed(3)
        module.zero_grad()
        if known:
            results.append((retry.run(batch, drawing), gradients(module)))
        else:
            with pytest.warns(PlugframeWarning, match="Memory ran out"):
                results.append((retry.run(batch, drawing), gradients(module)))
    (first, one), (second, two) = results
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None)


def test_below_the_minimum_it_is_an_error_that_changes_nothing(lite: Lite) -> None:
    """The error names the sizes tried and what torch said; the gradients stay as they were before the step."""
    retry, module, step = set_up(lite, model())
    batch = data(5)
    retry.run(batch, step)
    before = gradients(module)
    module.most = 0
    words = r"rank 0 with 5, 3, 2 and 1 samples at a time, and min_micro_batch=1 allows no fewer. no room for 1"
    with pytest.raises(torch.OutOfMemoryError, match=words):
        retry.run(batch, step)
    retry.min_micro_batch = 3
    with pytest.raises(torch.OutOfMemoryError, match=r"with 5 and 3 samples at a time, and min_micro_batch=3"):
        retry.run(batch, step)
    assert_equal(gradients(module), before)
    assert retry.micro_batch is None


def test_another_error_goes_through(lite: Lite) -> None:
    """What is no lack of memory is not tried again, and the gradients stay as they were."""
    retry, module, step = set_up(lite, model())
    calls = 0

    def failing(part: Pair) -> None:
        nonlocal calls
        calls += 1
        step(part)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        retry.run(data(4), failing)
    assert calls == 1
    assert gradients(module) == [None] * 4
    retry.run(data(4), step)


def test_memory_of_the_failed_attempt_is_free_before_the_next(lite: Lite) -> None:
    """Neither the error nor the frames it came from keep tensors alive while the smaller parts run."""
    retry, module, _ = set_up(lite, model())
    alive: list[weakref.ref[Tensor]] = []

    def step(part: Pair) -> None:
        assert not [reference for reference in alive if reference() is not None]
        out = module(part[0])
        alive.append(weakref.ref(out))
        if len(part[0]) > 2:
            raise torch.OutOfMemoryError("no room")
        lite.backward(nn.functional.mse_loss(out, part[1]))

    with pytest.warns(PlugframeWarning, match="oom-retry goes on with 2"):
        assert retry.run(data(4), step) is None
    assert len(alive) == 3


def test_the_size_is_part_of_a_saved_run(lite: Lite, tmp_path: Path) -> None:
    """The extension is saved and loaded like any object with a state, also while whole batches fit."""
    retry = lite.extension(NAME)
    for size in (4, None):
        retry.micro_batch = size
        lite.save(tmp_path / "run.ckpt", {"retry": retry})
        retry.micro_batch = 99
        lite.load(tmp_path / "run.ckpt", {"retry": retry})
        assert retry.micro_batch == size


def test_batch_normalisation_is_told_of(lite: Lite) -> None:
    """Where the update cannot be that of the whole batch, the message says so."""
    module = nn.Sequential(nn.BatchNorm1d(4), Model(2))
    lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.warns(PlugframeWarning, match="goes on with 2. Batch normalisation sees only so many samples"):
        lite.extension(NAME).run(data(4), stepping(lite, module))
    assert module[0].num_batches_tracked == 2


def test_what_cannot_work_is_refused(lite: Lite) -> None:
    """A call out of place is an error at once, which says what to do."""
    retry = lite.extension(NAME)
    with pytest.raises(OrderError, match="call lite.setup"):
        retry.run(data(2), lambda part: None)
    retry, module, step = set_up(lite, model())
    with pytest.raises(OrderError, match="cannot run another one"):
        retry.run(data(2), lambda part: retry.run(part, step))
    with torch.no_grad(), pytest.raises(OrderError, match="gradients are off"):
        retry.run(data(2), step)
    with pytest.raises(SettingError, match="size= and take= together"):
        retry.run(data(2), step, size=2)
    with pytest.raises(OrderError, match="use lite.backward"):
        retry.run(data(2), lambda part: module(part[0]).sum().backward())
    with pytest.raises(SettingError, match="returns a tensor or a number, a dict of those, or None; got str"):
        retry.run(data(2), lambda part: "loss")


def test_wrong_settings_are_refused() -> None:
    """Sizes are numbers from 1, and the first is not below the least."""
    with pytest.raises(SettingError, match=r"OomRetry\(min_micro_batch=0\): it is an integer from 1"):
        OomRetry(min_micro_batch=0)
    with pytest.raises(SettingError, match="micro_batch=2 of extension 'oom-retry' is below min_micro_batch=4"):
        OomRetry(min_micro_batch=4, micro_batch=2)


def test_an_extension_that_is_not_in_use_is_named() -> None:
    """``lite.extension`` gives the object in use, made here or by the user, or says how to use one."""
    own = OomRetry(micro_batch=4)
    with Lite(accelerator="cpu", devices=1, plugins=own) as lite:
        assert lite.extension(NAME) is own
        with pytest.raises(
            SettingError, match=r"extension\('oom-retri'\).*Did you mean 'oom-retry'\?.* --plugins=oom-"
        ):
            lite.extension("oom-retri")
    with Lite(accelerator="cpu", devices=1) as lite, pytest.raises(SettingError, match=r"In use: none"):
        lite.extension(NAME)


def test_a_strategy_that_gathers_in_forward_is_refused() -> None:
    """Strategies that do not say that a backward can stay local are refused before anything runs."""
    with pytest.raises(UnsupportedError, match="'fsdp' does not provide 'local-backward', which extension 'oom-retry'"):
        Lite(accelerator="cpu", devices=1, strategy="fsdp", plugins=NAME)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    """torch's own class, and the words of its allocators and libraries that raise a plain RuntimeError."""
    assert is_out_of_memory(error) is expected


def test_a_real_lack_of_memory_on_the_host_is_known() -> None:
    """What torch's CPU allocator raises today is recognised."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


Point = namedtuple("Point", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Texts:
    tokens: Tensor
    names: list[str]


def test_batches_of_many_forms_are_divided() -> None:
    """Tensors, arrays and lists of plain values are divided in containers of their types; the rest is shared."""
    x = torch.arange(6).reshape(3, 2)
    scale = torch.tensor(2.0)
    batch = {
        "pair": (x, [x, x]),
        "point": Point(x, scale),
        "texts": Texts(x, ["a", "b", "c"]),
        "ordered": OrderedDict(x=x),
        "array": x.numpy(),
        "size": (3, 3, 3),
        "flag": True,
    }
    assert batches.count(batch) == 3
    part = batches.take(batch, 1, 3, size=3)
    assert torch.equal(part["pair"][0], x[1:])
    assert torch.equal(part["pair"][1][1], x[1:])
    assert isinstance(part["point"], Point)
    assert part["point"].y is scale
    assert part["texts"].names == ["b", "c"]
    assert batch["texts"].names == ["a", "b", "c"]
    assert type(part["ordered"]) is OrderedDict
    assert part["array"].tolist() == [[2, 3], [4, 5]]
    assert (part["size"], part["flag"]) == ((3, 3, 3), True)
    assert part["pair"][0].data_ptr() == x[1:].data_ptr()  # a view


def test_a_batch_of_unclear_size_needs_words(lite: Lite) -> None:
    """Tensors of different lengths are refused, and divided as the user says."""
    retry, module, step = set_up(lite, model(1))
    x, y = data(2)
    odd = {"x": x, "y": y, "other": torch.zeros(5)}
    with pytest.raises(SettingError, match=r"has tensors of 2 and 5 rows: say how it is divided"):
        retry.run(odd, step)
    with pytest.raises(SettingError, match=r"has no tensor with rows"):
        retry.run({"x": 3}, step)
    with pytest.warns(PlugframeWarning, match="goes on with 1"):
        retry.run(odd, step, size=2, take=lambda batch, i, j: (batch["x"][i:j], batch["y"][i:j]))
    assert_equal(gradients(module), whole((x, y)))


# On two ranks.


def job(world: World, **settings: Any) -> Any:
    return Lite(accelerator="cpu", devices=world.world_size, plugins=NAME, **settings)


@contextmanager
def plain(world: World) -> Iterator[Lite]:
    with job(world) as lite:
        yield lite


@contextmanager
def unused(world: World) -> Iterator[Lite]:
    with job(world, strategy=DDP(find_unused_parameters=True)) as lite:
        yield lite


@contextmanager
def static(world: World) -> Iterator[Lite]:
    with job(world, strategy=DDP(static_graph=True)) as lite:
        yield lite


def told(lite: Lite) -> Any:
    """Expect the message on rank 0, and none on another."""
    return pytest.warns(PlugframeWarning, match="oom-retry goes on") if lite.is_global_zero else quiet()


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def check_one_rank_without_memory(lite: Lite) -> None:
    """All halve when one fails, in backward as in forward; gradients are averaged once, over uneven batches too."""
    parts = data(7, 0), data(5, 1)
    for backward in (False, True):
        for failing in (0, 1):
            module = model(2 if lite.global_rank == failing else None, backward=backward)
            retry, module, step = set_up(lite, module)
            retry.micro_batch = None
            with told(lite):
                retry.run(parts[lite.global_rank], step)
            assert retry.micro_batch == 2
            assert_equal(gradients(module), whole(*parts))
            module.sizes.clear()
            module.zero_grad()
            retry.run(parts[lite.global_rank], step)
            assert module.sizes == ([2, 2, 2, 1] if lite.global_rank == 0 else [2, 2, 1])
            assert_equal(gradients(module), whole(*parts))


def check_one_rank_that_never_reaches_the_model(lite: Lite) -> None:
    """Nothing is exchanged in a forward either: not in the first, nor after a step outside, with or without buffers."""
    module = model()
    lite.setup_module(module)  # without an optimizer the strategy has buffers equal before each forward
    retry, step = lite.extension(NAME), stepping(lite, module)
    parts = data(4, 0), data(4, 1)

    def failing(part: Pair) -> None:
        if len(part[0]) > 2 and lite.global_rank:
            raise torch.OutOfMemoryError("no room")
        step(part)

    for _ in range(2):
        retry.micro_batch = None
        with told(lite):
            retry.run(parts[lite.global_rank], failing)
        assert_equal(gradients(module), whole(*parts))
        module.zero_grad()
        step(parts[lite.global_rank])
        assert_equal(gradients(module), whole(*parts))
        module.zero_grad()


def check_training_stays_in_step(lite: Lite) -> None:
    """After steps with and without memory every rank has one model, that of a hand-written loop."""
    retry, module, step = set_up(lite, model(3 if lite.global_rank else None))
    retry.micro_batch = None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = lite.setup_optimizers(optimizer)
    twin = model()
    plain_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for number in range(3):
        optimizer.zero_grad()
        with told(lite) if number == 0 else quiet():
            retry.run(data(6, 2 * number + lite.global_rank), step)
        optimizer.step()
        plain_optimizer.zero_grad()
        for rank in range(2):
            x, y = data(6, 2 * number + rank)
            (nn.functional.mse_loss(twin(x), y) / 2).backward()
        plain_optimizer.step()
    torch.testing.assert_close([*module.parameters()], [*twin.parameters()])


def check_accumulation_over_batches(lite: Lite) -> None:
    """Within no_backward_sync gradients stay local, and the first step outside of it averages all of them."""
    retry, module, step = set_up(lite, model(2 if lite.global_rank else None))
    retry.micro_batch = None
    mine = data(4, lite.global_rank)
    with lite.no_backward_sync(module), told(lite):
        retry.run(mine, step)
    assert_equal(gradients(module), whole(mine))
    retry.run(mine, step)
    assert_equal(gradients(module), whole(data(4, 0), data(4, 1)), 2.0)
    with quiet():  # of gradients that were never averaged
        lite.setup_optimizers(torch.optim.SGD(module.parameters(), lr=0.1)).step()


def check_the_error_is_on_all_ranks(lite: Lite) -> None:
    """At the minimum all ranks get the error, which names the rank."""
    retry, module, step = set_up(lite, model(0 if lite.global_rank else None))
    retry.micro_batch = None
    with pytest.raises(torch.OutOfMemoryError, match="on rank 1 with 3, 2 and 1 samples at a time.*no room for 1"):
        retry.run(data(3), step)
    assert gradients(module) == [None] * 4


def check_exchanges_within_a_step_are_refused(lite: Lite) -> None:
    """A collective within a step is refused before it can hang."""
    retry, _, step = set_up(lite, model())
    with pytest.raises(OrderError, match="collective_all_reduce was called within a step"):
        retry.run(data(2), lambda part: lite.all_reduce(step(part)))
    lite.barrier()


def check_frozen_and_new_parameters(lite: Lite) -> None:
    """Parameters that are frozen or unfrozen between steps are no reason to exchange anything within one."""
    retry, module, step = set_up(lite, model())
    retry.micro_batch = 2
    parts = data(4, 0), data(4, 1)
    module.first.requires_grad_(False)
    retry.run(parts[lite.global_rank], step)
    assert gradients(module)[:2] == [None, None]
    module.zero_grad()
    module.first.requires_grad_(True)
    retry.run(parts[lite.global_rank], step)
    assert_equal(gradients(module), whole(*parts))


def check_two_models(lite: Lite) -> None:
    """Of two models that were set up, the one a step does not use is left alone."""
    other = model()
    lite.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
    retry, module, _ = set_up(lite, model(2 if lite.global_rank else None))
    retry.micro_batch = None
    parts = data(4, 0), data(4, 1)
    for user, idle in ((module, other), (other, module)):
        retry.micro_batch = None
        other.most = module.most
        with told(lite):
            retry.run(parts[lite.global_rank], stepping(lite, user))
        assert_equal(gradients(user), whole(*parts))
        assert gradients(idle) == [None] * 4
        user.zero_grad()


PLAIN = [
    check_one_rank_that_never_reaches_the_model,
    check_one_rank_without_memory,
    check_training_stays_in_step,
    check_accumulation_over_batches,
    check_the_error_is_on_all_ranks,
    check_exchanges_within_a_step_are_refused,
    check_frozen_and_new_parameters,
    check_two_models,
]


class Branches(Model):
    """Uses another layer on each rank, and one on none."""

    def __init__(self, rank: int, most: int | None) -> None:
        super().__init__(most)
        self.own = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.never = nn.Linear(2, 2)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.own[self.rank](x))


def check_parameters_some_ranks_leave_out(lite: Lite) -> None:
    """What one rank used is averaged with zeros, what none used has no gradient, as without oom-retry."""
    module = Branches(lite.global_rank, 2 if lite.global_rank else None)
    retry, _, step = set_up(lite, module)
    mine = data(4, lite.global_rank)
    module.most, most = None, module.most
    retry.micro_batch = 2
    retry.run(mine, step)
    halves = gradients(module)
    module.zero_grad()
    step(mine)
    assert_equal(halves, gradients(module))
    assert module.never.weight.grad is None
    module.zero_grad()
    module.most, retry.micro_batch = most, None
    with told(lite):
        retry.run(mine, step)
    assert_equal(gradients(module), halves)


def check_a_static_graph(lite: Lite) -> None:
    """The first backward of a static graph, which averages in any case, is over before memory can run out."""
    retry, module, step = set_up(lite, model(2 if lite.global_rank else None))
    parts = data(4, 0), data(4, 1)
    for number in range(2):
        with told(lite) if number == 0 else quiet():
            retry.run(parts[lite.global_rank], step)
        assert_equal(gradients(module), whole(*parts))
        module.zero_grad()


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    return {
        **run_checks(2, plain, PLAIN),
        **run_checks(2, unused, [check_parameters_some_ranks_leave_out]),
        **run_checks(2, static, [check_a_static_graph]),
    }


@pytest.mark.parametrize(
    "check", [*PLAIN, check_parameters_some_ranks_leave_out, check_a_static_graph], ids=lambda check: check.__name__[6:]
)
def test_on_two_ranks(outcome: dict[str, str], check: Callable[[Any], None]) -> None:
    """The check passes on two ranks; at most one of them runs out of memory."""
    assert not outcome[check.__name__], outcome[check.__name__]


def test_it_is_selected_on_the_command_line(tmp_path: Path) -> None:
    """``--plugins=oom-retry`` puts it into a job of two ranks, with its options."""
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "from plugframe import Lite\n"
        "lite = Lite()\n"
        "model = torch.nn.Linear(2, 1)\n"
        "model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "sizes = []\n"
        "def step(batch):\n"
        "    sizes.append(len(batch))\n"
        "    if len(batch) > 3 and lite.global_rank == 1:\n"
        "        raise torch.OutOfMemoryError('full')\n"
        "    lite.backward(model(batch).mean())\n"
        "lite.extension('oom-retry').run(torch.ones(8, 2), step)\n"
        "lite.print('sizes', sizes, lite.extension('oom-retry').min_micro_batch)\n"
    )
    options = ["--accelerator=cpu", "--devices=2", "--plugins=oom-retry", "--extension.oom-retry.min-micro-batch=2"]
    done = warm.run(
        [sys.executable, "-m", "plugframe", "run", "train.py", *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert "sizes [8, 4, 4, 2, 2, 2, 2] 2" in done.stdout, done.stderr
    assert "Memory ran out with 8 and 4 samples at a time: oom-retry goes on with 2." in done.stderr
