"""The DDP strategy on real gloo ranks, and the single strategy beside it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugframe.errors import (
    CollectiveMismatchError,
    OrderError,
    PlugframeWarning,
    SettingError,
    UnsupportedError,
)
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins import ddp, single
from plugframe_builtins.ddp.batchnorm import sync_batchnorm
from plugframe_builtins.ddp.strategy import DDP
from plugframe_builtins.single.strategy import SingleRank
from plugframe_builtins.torch_collective.collective import TorchCollective
from ranks import Tracking, buffers_on_ranks, hooks_of, rank_store, run_checks


def context_of(world: World, **hooks: Any) -> Context:
    """Return a context on the CPU with a precision that leaves everything as it is."""
    plain: dict[str, Any] = {
        "environment_store": lambda context, timeout_s: rank_store(timeout_s),
        "accelerator_collective_backend": lambda: "gloo",
        "precision_backward": lambda loss, args, kwargs: loss.backward(*args, **kwargs),
        "precision_optimizer_step": lambda optimizer, step, closure: step(closure),
    }
    names = {"collective": "torch", "strategy": "ddp"}
    hooks = SimpleNamespace(**{**plain, **hooks})
    return Context(world=world, device=torch.device("cpu"), hooks=hooks, names=names, timeout_s=20.0)


@contextmanager
def job(world: World) -> Iterator[Context]:
    """Yield a context whose collective is set up."""
    collective = TorchCollective()
    context = context_of(world, **vars(hooks_of(collective)))
    collective.collective_setup(context=context)
    try:
        yield context
    finally:
        collective.collective_teardown()


class Training:
    """A module under DDP, and the loop's calls on it."""

    def __init__(self, strategy: DDP, module: nn.Module, lr: float = 0.1) -> None:
        self.hooks = hooks_of(strategy)
        self.module = module
        self.optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        self.engine, _ = self.hooks.strategy_setup_module_and_optimizers(module=module, optimizers=[self.optimizer])

    def __call__(self, *args: Any) -> Any:
        return self.module(*args) if self.engine is None else self.engine(self.module.forward, *args)

    def backward(self, loss: Tensor) -> None:
        self.hooks.strategy_backward(loss=loss, module=self.module, args=(), kwargs={})

    def step(self) -> None:
        step = self.optimizer.step
        self.hooks.strategy_optimizer_step(optimizer=self.optimizer, step=step, closure=None)

    def no_sync(self, enabled: bool = True) -> Any:
        return self.hooks.strategy_no_sync(module=self.module, engine=self.engine, enabled=enabled)


@contextmanager
def strategy_of(context: Context, **options: Any) -> Iterator[DDP]:
    """Yield a DDP strategy that is set up."""
    strategy = DDP(**options)
    strategy.strategy_setup(context=context)
    try:
        yield strategy
    finally:
        strategy.strategy_teardown()


def network(seed: int = 0) -> nn.Sequential:
    """Return a small network with the weights of that seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def normed(seed: int = 0) -> nn.Sequential:
    """Return a network with running statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def data(num: int = 8) -> tuple[Tensor, Tensor]:
    """Return the whole batch, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, generator=generator), torch.randn(num, 2, generator=generator)


def reference(batches: int = 1) -> nn.Sequential:
    """Return the network with the gradients of one process on the whole batch, or the sum over its pieces."""
    module = network()
    inputs, targets = data()
    for x, y in zip(inputs.chunk(batches), targets.chunk(batches), strict=True):
        nn.functional.mse_loss(module(x), y).backward()
    return module


def assert_same_gradients(module: nn.Module, expected: nn.Module) -> None:
    for (name, mine), theirs in zip(module.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def accumulate(training: Training, world: World, batches: int) -> None:
    """Run this rank's share of every micro-batch; average gradients with the last."""
    inputs, targets = data()
    for index, (x, y) in enumerate(zip(inputs.chunk(batches), targets.chunk(batches), strict=True)):
        with nullcontext() if index == batches - 1 else training.no_sync():
            mine = slice(world.global_rank, None, world.world_size)
            training.backward(nn.functional.mse_loss(training(x[mine]), y[mine]))


def gradients_are_those_of_one_process(context: Context) -> None:
    """Law 6: after backward on N ranks, gradients equal one process's on the whole batch, accumulated or not."""
    variants: list[dict[str, Any]] = [
        {},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 1},
        {"static_graph": True},
        {"timeout_s": 20.0},
    ]
    for options in variants:
        for batches in (1, 2, 4):
            with strategy_of(context, **options) as strategy:
                training = Training(strategy, network())
                for _ in range(3):
                    training.optimizer.zero_grad()
                    accumulate(training, context.world, batches)
                    assert_same_gradients(training.module, reference(batches))


def the_module_stays_the_users(context: Context) -> None:
    """The engine stands beside the module: same object, same keys, and every rank starts as rank 0."""
    module = normed(seed=context.world.global_rank)
    module[1].running_mean.fill_(context.world.global_rank)
    keys, children = list(module.state_dict()), list(module.modules())
    with strategy_of(context) as strategy:
        engine = strategy.strategy_setup_module(module=module)
        assert list(module.state_dict()) == keys
        assert all(a is b for a, b in zip(module.modules(), children, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), normed(0).parameters(), strict=True))
        assert module[1].running_mean.sum() == 0
        module.eval()
        assert engine(module.forward, torch.ones(2, 3)).shape == (2, 1)
        assert not module.training
        assert type(copy.deepcopy(module)) is type(pickle.loads(pickle.dumps(module))) is nn.Sequential


def no_sync_nests_in_any_way(context: Context) -> None:
    """Inside, gradients stay local (True) or are averaged (False); leaving restores what held, after errors too."""
    rank = context.world.global_rank
    with strategy_of(context) as strategy:
        training = Training(strategy, nn.Linear(1, 1, bias=False))

        def gradient() -> float:
            training.optimizer.zero_grad()
            training.backward(training(torch.tensor([[float(rank)]])).sum())
            return training.module.weight.grad.item()

        assert gradient() == 0.5
        with training.no_sync():
            assert gradient() == rank
            with training.no_sync(enabled=False):
                assert gradient() == 0.5
                with training.no_sync():
                    assert gradient() == rank
                assert gradient() == 0.5
            assert gradient() == rank
        with pytest.raises(ZeroDivisionError), training.no_sync():
            1 / 0  # noqa: B018
        assert gradient() == 0.5
        with training.no_sync(enabled=False):
            assert gradient() == 0.5


def a_frozen_module_exchanges_nothing(context: Context) -> None:
    """Without trainable parameters nothing is exchanged but at set-up: the module becomes rank 0's everywhere."""
    teacher = normed(seed=context.world.global_rank).requires_grad_(False)
    with strategy_of(context) as strategy:
        engine = strategy.strategy_setup_module(module=teacher)
        if context.world.global_rank == 0:
            assert engine(teacher.forward, torch.ones(2, 3)).shape == (2, 1)
        assert strategy.strategy_setup_module(module=nn.ReLU()) is None
        with strategy.strategy_no_sync(module=teacher, engine=None, enabled=True):
            assert teacher(torch.ones(2, 3)).shape == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), normed(0).parameters(), strict=True))


def parameters_may_be_left_out(context: Context) -> None:
    """A forward may leave parameters out, on all ranks or on some: a gradient that no rank has is none."""
    rank = context.world.global_rank
    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        with strategy_of(context, **options) as strategy:
            training = Training(strategy, network())
            for number in range(3):
                training.optimizer.zero_grad(set_to_none=number < 2)
                loss = training.engine(training.module[0].forward, torch.ones(1, 3)).sum()
                training.backward(loss)
                assert training.module[2].weight.grad is None
                assert torch.equal(training.module[0].weight.grad, torch.ones(5, 3))
            training.optimizer.zero_grad()
            training.backward(training(torch.ones(1, 3)).sum() if rank == 1 else training.module[0].bias.sum())
            hidden = training.module[1](training.module[0](torch.ones(1, 3))).detach()
            torch.testing.assert_close(training.module[2].weight.grad, hidden.expand(2, -1) / 2)
            assert_equal_on_all_ranks(context, [p.grad for p in training.module.parameters()])


def evaluation_needs_no_other_rank(context: Context) -> None:
    """A forward without gradients never communicates: one rank may evaluate alone, or more batches."""
    with strategy_of(context) as strategy:
        training = Training(strategy, normed())
        training.backward(training(torch.randn(4, 3)).sum())
        training.step()
        if context.world.global_rank == 1:
            with torch.no_grad():
                training(torch.randn(4, 3))
            with torch.inference_mode():
                training(torch.randn(4, 3))
        training.backward(training(torch.randn(4, 3)).sum())
        assert_equal_on_all_ranks(context, training.module.parameters())


def assert_equal_on_all_ranks(context: Context, tensors: Any) -> None:
    for tensor in tensors:
        first, second = context.hooks.collective_all_gather(tensor=tensor, group=None, sync_grads=False)
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def every_rank_evaluates_one_model(context: Context) -> None:
    """After a step, running statistics are rank 0's on every rank; with broadcast_buffers=False each has its own."""
    rank = context.world.global_rank
    for wanted in (True, False):
        with strategy_of(context, broadcast_buffers=wanted) as strategy:
            module = normed()
            module.register_buffer("flag", torch.tensor(rank == 0))
            training = Training(strategy, module)
            for _ in range(2):
                with training.no_sync():
                    training.backward(training(torch.randn(4, 3) + rank).sum())
                # Two forwards before one backward: their statistics must not be overwritten in between.
                loss = training(torch.randn(4, 3) + rank) - training(torch.randn(4, 3) + 10 * rank)
                training.backward(loss.sum())
                training.step()
            means = context.hooks.collective_all_gather(tensor=module[1].running_mean, group=None, sync_grads=False)
            assert torch.equal(means[0], means[1]) is wanted
            assert module.flag.item()
            assert module[1].num_batches_tracked.item() == 6


def buffers_out_of_the_state_are_made_equal_too(context: Context) -> None:
    """After a step all buffers are rank 0's on every rank, persistent or not, as under torch's own DDP."""
    rank = context.world.global_rank
    with strategy_of(context) as strategy:
        training = Training(strategy, Tracking())
        training.backward(training(torch.full((4 + rank, 3), 1.0 + rank)).sum())
        first, second = buffers_on_ranks(training.module)
        assert all(ours != theirs for ours, theirs in zip(first, second, strict=True))
        training.step()
        assert buffers_on_ranks(training.module) == [first, first]


def buffers_follow_the_optimizer_that_owns_the_module(context: Context) -> None:
    """A step touches the buffers of the modules it updates alone; one optimizer may update several."""
    rank = context.world.global_rank
    with strategy_of(context) as strategy:
        modules = [normed(seed) for seed in range(4)]
        engines = [strategy.strategy_setup_module(module=module) for module in modules]
        parameters = [p for module in modules[:3] for p in module.parameters()]
        optimizers = [torch.optim.SGD(parameters, lr=0.1), torch.optim.SGD(modules[3].parameters(), lr=0.1)]
        strategy.strategy_setup_optimizers(module=None, optimizers=optimizers)
        x = torch.randn(4, 3) + 5 * rank
        losses = [engine(module.forward, x).sum() for engine, module in zip(engines, modules, strict=True)]
        sum(losses[:3]).backward()
        strategy.strategy_optimizer_step(optimizer=optimizers[0], step=optimizers[0].step, closure=None)
        for index, module in enumerate(modules):
            means = context.hooks.collective_all_gather(tensor=module[1].running_mean, group=None, sync_grads=False)
            assert torch.equal(means[0], means[1]) is (index < 3)
        losses[3].backward()
        strategy.strategy_optimizer_step(optimizer=optimizers[1], step=optimizers[1].step, closure=None)
        assert_equal_on_all_ranks(context, modules[3].buffers())


def buffers_without_a_set_up_optimizer_follow_torchs_rule(context: Context) -> None:
    """Where the user steps an optimizer of his own, buffers are made equal before each forward."""
    rank = context.world.global_rank
    with strategy_of(context) as strategy:
        module = normed()
        engine = strategy.strategy_setup_module(module=module)
        engine(module.forward, torch.randn(4, 3) + rank).sum().backward()
        if rank == 1:
            with torch.no_grad():
                engine(module.forward, torch.randn(4, 3))
        engine(module.eval().forward, torch.randn(4, 3)).sum().backward()
        assert_equal_on_all_ranks(context, module.buffers())


def compressed_gradients_are_close_and_equal(context: Context) -> None:
    """fp16, bf16 and PowerSGD give every rank the same gradients, near the exact ones."""
    variants: list[dict[str, Any]] = [
        {"gradient_compression": "fp16"},
        {"gradient_compression": "bf16"},
        {
            "gradient_compression": "powersgd",
            "powersgd": {
                "matrix_approximation_rank": 2,
                "start_powerSGD_iter": 2,
                "min_compression_rate": 0.1,
            },
        },
    ]
    for options in variants:
        with strategy_of(context, **options) as strategy:
            training = Training(strategy, network(), lr=0.0)
            for _ in range(5):
                training.optimizer.zero_grad()
                accumulate(training, context.world, 1)
            assert_equal_on_all_ranks(context, [p.grad for p in training.module.parameters()])
            for mine, exact in zip(training.module.parameters(), reference().parameters(), strict=True):
                torch.testing.assert_close(mine.grad, exact.grad, rtol=0.2, atol=0.05)
    misfit = r"powersgd=\{'rank': 1\} does not fit torch's PowerSGDState"
    wrong = strategy_of(context, gradient_compression="powersgd", powersgd={"rank": 1})
    with wrong as strategy, pytest.raises(SettingError, match=misfit):
        strategy.strategy_setup_module(module=network())


def clipping_agrees_with_one_process(context: Context) -> None:
    """Law 7: the norm is one process's on the whole batch, and non-finite gradients raise on every rank."""
    with strategy_of(context) as strategy:
        training = Training(strategy, network())
        accumulate(training, context.world, 1)
        clip = training.hooks.strategy_clip_gradients
        parameters = list(training.module.parameters())
        limits = {"clip_value": None, "max_norm": 0.1, "norm_type": 2.0, "error_if_nonfinite": True}
        norm = clip(module=training.module, parameters=parameters, **limits)
        single = reference()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(single.parameters(), 0.1))
        assert_same_gradients(training.module, single)
        training.optimizer.zero_grad()
        x = torch.full((1, 3), float("inf") if context.world.global_rank == 1 else 1.0)
        training.backward(training.engine(training.module[0].forward, x).sum() + 0 * training(x.clamp(max=1)).sum())
        with pytest.raises(RuntimeError, match="non-finite"):
            clip(module=training.module, parameters=parameters, **limits)


def models_that_differ_are_refused(context: Context) -> None:
    """Ranks with different parameters or buffers are an error on all of them, with the first difference."""
    rank = context.world.global_rank
    with strategy_of(context) as strategy:
        module = nn.Linear(2 + rank, 1)
        shapes = r"Linear has parameter 'weight' \(1, 2\) torch.float32 on rank 0, and .* \(1, 3\) .* on rank 1"
        with pytest.raises(CollectiveMismatchError, match=shapes):
            strategy.strategy_setup_module(module=module)
        module = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(1 + rank)])
        missing = "has nothing more on rank 0, and parameter '1.weight'"
        with pytest.raises(CollectiveMismatchError, match=missing):
            strategy.strategy_setup_module(module=module)
        module = nn.Linear(2, 2, bias=False).requires_grad_(rank == 0)
        with pytest.raises(CollectiveMismatchError, match="has parameter 'weight' .*, and frozen parameter 'weight'"):
            strategy.strategy_setup_module(module=module)
        assert strategy.strategy_setup_module(module=network()) is not None


def the_strategy_keeps_no_module_alive(context: Context) -> None:
    """A module that the user drops is freed, engine and all."""
    with strategy_of(context) as strategy:
        training = Training(strategy, normed())
        training.backward(training(torch.randn(2, 3)).sum())
        alive = [weakref.ref(training.module), weakref.ref(training.engine)]
        del training
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


def a_timeout_of_its_own_bounds_gradients_alone(context: Context) -> None:
    """timeout_s makes a group for gradients; when a rank is missing there, the collective still works."""
    with strategy_of(context, timeout_s=0.5) as strategy:
        training = Training(strategy, network())
        if context.world.global_rank == 0:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                accumulate(training, context.world, 1)
        context.hooks.collective_barrier(name="after", group=None)
    context.hooks.collective_barrier(name="torn down", group=None)


CHECKS = [
    gradients_are_those_of_one_process,
    the_module_stays_the_users,
    no_sync_nests_in_any_way,
    a_frozen_module_exchanges_nothing,
    parameters_may_be_left_out,
    evaluation_needs_no_other_rank,
    every_rank_evaluates_one_model,
    buffers_out_of_the_state_are_made_equal_too,
    buffers_follow_the_optimizer_that_owns_the_module,
    buffers_without_a_set_up_optimizer_follow_torchs_rule,
    compressed_gradients_are_close_and_equal,
    clipping_agrees_with_one_process,
    models_that_differ_are_refused,
    the_strategy_keeps_no_module_alive,
    a_timeout_of_its_own_bounds_gradients_alone,
]


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, str]:
    """Run every check on two ranks of one job."""
    return run_checks(2, job, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_ranks(check: Callable[[Context], None], on_two_ranks: dict[str, str]) -> None:
    """The rule in the check's docstring holds on both of two gloo ranks."""
    assert not on_two_ranks[check.__name__], on_two_ranks[check.__name__]


@contextmanager
def no_job(world: World) -> Iterator[World]:
    """Yield the world, with nothing set up."""
    yield world


def engines_may_outlive_their_group(world: World) -> None:
    """Tear-down while the user still holds a trained module ends, every time."""
    for _ in range(20):
        with job(world) as context, strategy_of(context) as strategy:
            training = Training(strategy, network())
            accumulate(training, world, 1)
        del training


def test_tear_down_does_not_wait_for_engines() -> None:
    """The process group can be destroyed before the engines that use it, without a deadlock."""
    results = run_checks(2, no_job, [engines_may_outlive_their_group])
    assert not any(results.values()), results


def test_one_rank_is_a_job_too() -> None:
    """DDP on a single rank trains as on many."""
    checks = [trains_on_one_rank]
    assert run_checks(1, job, checks) == {"trains_on_one_rank": ""}


def trains_on_one_rank(context: Context) -> None:
    """Gradients on one rank are the plain ones."""
    with strategy_of(context) as strategy:
        training = Training(strategy, network())
        accumulate(training, context.world, 2)
        assert_same_gradients(training.module, reference(2))
        training.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_compression": "fp_16"},
            r"DDP\(gradient_compression='fp_16'\): it is one of fp16, bf16, powersgd\. Did you mean 'fp16'\?",
        ),
        ({"powersgd": {}}, r"powersgd=\{\} has no effect: it goes with gradient_compression='powersgd'"),
        ({"static_graph": "yes"}, r"DDP\(static_graph='yes'\): it is true or false"),
        ({"bucket_cap_mb": 0}, r"DDP\(bucket_cap_mb=0\): it is an integer above 0"),
        ({"timeout_s": True}, r"DDP\(timeout_s=True\): it is a number above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """An option with a wrong value is an error that says what is allowed."""
    with pytest.raises(SettingError, match=message):
        DDP(**options)


def test_sync_batchnorm_is_refused_where_torch_has_none() -> None:
    """On the CPU torch has no SyncBatchNorm, which is said at set-up and not in the first forward."""
    with pytest.raises(UnsupportedError, match="sync_batchnorm=True does not work on cpu"):
        DDP(sync_batchnorm=True).strategy_setup(context=context_of(World()))


def test_a_collective_without_process_group_is_refused() -> None:
    """DDP over a collective that has no process group names the one that has."""
    context = context_of(World(), collective_process_group=lambda: None)
    with pytest.raises(UnsupportedError, match="needs a process group, .* use collective='torch'"):
        DDP().strategy_setup(context=context)


def test_parameters_must_exist_before_set_up() -> None:
    """Lazy and meta parameters are refused by name, with what to do."""
    strategy = DDP()
    with pytest.raises(OrderError, match=r"Parameter 'weight' has no shape yet: run one forward"):
        strategy.strategy_setup_module(module=nn.LazyLinear(2))
    with pytest.raises(UnsupportedError, match=r"Parameter 'weight' is on the meta device"):
        strategy.strategy_setup_module(module=nn.Linear(2, 2, device="meta"))


def test_sync_batchnorm_changes_the_users_own_modules_and_back() -> None:
    """Batch norms become synchronised in place, hooks and references kept; copies and tear-down are plain."""
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm3d(2)))
    norm, calls = module[0], []
    norm.register_forward_hook(lambda *_: calls.append(1))
    keys = list(module.state_dict())
    undo = sync_batchnorm(module, warn=True)
    assert module[0] is norm
    assert isinstance(norm, nn.SyncBatchNorm)
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(module[1][0], nn.SyncBatchNorm)
    assert isinstance(module[1][1], nn.SyncBatchNorm)
    assert list(module.state_dict()) == keys
    norm.eval()(torch.ones(3, 2))
    assert calls == [1]
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(module[1]))[0]):
        assert type(other) in (nn.BatchNorm1d, nn.BatchNorm2d)
        assert "process_group" not in vars(other)
    undo()
    assert type(norm) is nn.BatchNorm1d
    assert "process_group" not in vars(norm)


def test_sync_batchnorm_converts_a_module_that_is_itself_a_batch_norm() -> None:
    """There is nothing around it to put another module into, and none is needed."""
    norm = nn.BatchNorm1d(2)
    sync_batchnorm(norm, warn=True)
    assert isinstance(norm, nn.SyncBatchNorm)


class Scaled(nn.BatchNorm1d):
    """A batch norm that does more than its base."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_sync_batchnorm_leaves_subclasses_with_a_warning() -> None:
    """A subclass may compute something else: it stays, and one warning on rank 0 names it."""
    module = nn.Sequential(Scaled(2))
    with pytest.warns(PlugframeWarning, match="sync_batchnorm=True leaves Scaled as it is"):
        sync_batchnorm(module, warn=True)
    sync_batchnorm(module, warn=False)
    assert type(module[0]) is Scaled


def test_descriptors_say_where_they_work() -> None:
    """ddp takes any number of ranks over a process group, and its aliases imply a launcher."""
    assert (ddp.plugin.ranks, ddp.plugin.priority) == ("any", 10)
    assert ddp.plugin.needs == {"collective": ("process-group",)}
    aliases = {"spawn": ddp.spawn, "fork": ddp.fork, "notebook": ddp.notebook}
    launchers = {name: (alias.alias_of, alias.implies["launcher"]) for name, alias in aliases.items()}
    assert launchers == {"spawn": ("ddp", "spawn"), "fork": ("ddp", "fork"), "notebook": ("ddp", "fork")}
    assert "strategy='ddp'" in ddp.plugin.retired["dp"]
    assert "strategy='fsdp'" in ddp.plugin.retired["ddp_sharded"]
    assert (single.plugin.ranks, single.plugin.priority) == ("one", 100)


def test_the_single_strategy_refuses_more_than_one_rank() -> None:
    """Two ranks under strategy='single' would train two models: it is refused."""
    with pytest.raises(UnsupportedError, match="works on one rank, and this job has 2: use strategy='ddp'"):
        SingleRank().strategy_setup(context=context_of(World(world_size=2)))


def test_the_single_strategy_adds_nothing() -> None:
    """On one rank there is no engine, and the whole of the data is this rank's."""
    strategy = SingleRank()
    strategy.strategy_setup(context=context_of(World()))
    assert strategy.strategy_setup_module(module=network()) is None
    assert strategy.strategy_data_shard() == (0, 1)
