"""Strategy contract checks on every rank of a job, compared with the same training in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe.base import Extension
from plugframe.core.registry.registry import Registry
from plugframe.errors import PlugframeError
from plugframe.hooks import KINDS, hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.markers import is_per_plugin
from plugframe.lite import Lite
from plugframe.testing.contracts import states
from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.running import broken, left, one_line, traces
from plugframe.testing.contracts.strategy_bench import (
    SAMPLES,
    Bench,
    Model,
    Settings,
    bench,
    optimizer_of,
    set_up_training,
    train,
)
from plugframe.testing.contracts.strategy_gradients import (
    a_local_backward_needs_no_other_rank,
    accumulated_gradients_are_those_of_the_whole,
    clipping_is_that_of_the_whole,
    gradients_are_those_of_the_whole_batch,
    gradients_that_are_not_finite_are_an_error,
    models_train_together,
    running_statistics_are_equal,
)
from plugframe.testing.contracts.strategy_rules import (
    APART,
    LAW_4,
    LAW_6,
    LAW_7,
    LAW_8,
    LAW_9,
    LOCAL,
    ONCE,
    OWN,
    SKIPPED,
    START,
    STATE,
    STATISTICS,
)
from plugframe.testing.contracts.strategy_state import (
    a_checkpoint_is_loaded_on_other_ranks,
    a_run_goes_on_from_its_checkpoint,
    a_state_is_the_users,
    its_weights_are_left_for_others,
)

__all__ = [
    "ALWAYS",
    "APART",
    "AVERAGING",
    "LAW_4",
    "LAW_6",
    "LAW_7",
    "LAW_8",
    "LAW_9",
    "LOCAL",
    "ONCE",
    "OWN",
    "SKIPPED",
    "START",
    "STATE",
    "STATISTICS",
    "Bench",
    "Model",
    "Settings",
    "bench",
]


@rule(START)
def it_begins_with_rank_zeros_weights(bench: Bench) -> None:
    """Ranks with different weights train those of rank 0, also in modules made without storage."""
    expected = bench.model(seed=3).state_dict()
    for empty in (False, True):
        how = f"init_module(empty_init={empty})"
        with bench.lite() as lite:
            # Modules without storage are initialised at set-up, with the same generator on all ranks.
            torch.manual_seed(3 + (0 if empty else lite.global_rank))
            with lite.init_module(empty_init=empty):
                model = bench.settings.build()
            model, _ = lite.setup(model, optimizer_of(model))
            found = bench.weights(lite, model)
            for name, value in expected.items():
                if not torch.equal(found[name], value):
                    broken(START, f"with {how} {name} is not the one of rank 0")
            everyone = lite._hooks.collective_all_gather_object(obj=_outputs(bench, lite, model), group=None)
            for rank, out in enumerate(everyone):
                if not torch.allclose(out, everyone[0], rtol=1e-4, atol=1e-5):
                    broken(START, f"with init_module(empty_init={empty}) rank {rank} has other outputs than rank 0")


def _outputs(bench: Bench, lite: Lite, model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(bench.batch(3)[0].to(lite.device)).cpu()
    return out


@rule(LAW_8)
def evaluation_sees_every_sample_once(bench: Bench) -> None:
    """Data shards are 0, 1, …; evaluation reads each sample once, with the outputs of plain torch."""
    plain = bench.model()
    with bench.lite() as lite:
        model = lite.setup(bench.model())
        shard = tuple(lite._hooks.strategy_data_shard())
        if shard != tuple(lite._hooks.strategy_data_shard()):
            broken(LAW_8, f"strategy_data_shard() returned {shard}, and another value the second time")
        shards = lite._hooks.collective_all_gather_object(obj=shard, group=None)
        if {count for _, count in shards} != {shards[0][1]} or {i for i, _ in shards} != set(range(shards[0][1])):
            broken(LAW_8, f"strategy_data_shard() returned {shards} on the ranks: not 0, 1, … of one count")
        shares = "sharded" in bench.settings.provides or bench.settings.shares
        if not shares and shard[1] != lite.world_size:
            broken(LAW_8, f"{lite.world_size} ranks with the full model each divide the data into {shard[1]} shards")
        model.eval()
        for number, shuffle in ((SAMPLES, False), (SAMPLES, True), (1, False), (8, True)):
            torch.manual_seed(4)
            numbers = TensorDataset(torch.arange(number), bench.batch(number)[0])
            seen: list[int] = []
            with torch.no_grad():
                for indices, x in lite.setup_dataloaders(DataLoader(numbers, batch_size=2, shuffle=shuffle)):
                    seen += indices.tolist()
                    apart = float((model(x).cpu() - plain(x.cpu())).abs().max()) if len(x) else 0.0
                    if not apart <= 1e-4:
                        broken(LAW_8, f"an output of the model is {apart:.3g} from plain torch's")
            everyone = dict(lite._hooks.collective_all_gather_object(obj=(shard, seen), group=None))
            read = sorted(index for each in everyone.values() for index in each)
            if read != list(range(number)):
                broken(LAW_8, f"of {number} samples these were read by {lite.world_size} ranks: {read}")


@rule(OWN)
def objects_stay_the_users_own(bench: Bench) -> None:
    """Set-up returns the same objects, with their classes, keys and names; tear-down restores them."""
    with bench.lite() as lite:
        model = bench.model()
        cls, keys, names = type(model), list(model.state_dict()), [name for name, _ in model.named_parameters()]
        adam = torch.optim.AdamW(model.parameters(), lr=0.1)
        made, optimizer = lite.setup(model, adam)
        if made is not model or not isinstance(made, cls):
            broken(OWN, f"lite.setup() returned a {type(made).__name__} for a {cls.__name__}")
        if optimizer is not adam and not isinstance(optimizer, torch.optim.AdamW):
            broken(OWN, f"lite.setup() returned a {type(optimizer).__name__} for an AdamW")
        for what, found, expected in (
            ("the keys of its state", _keys(made) or list(lite.state_dict(made, all_ranks=True)), keys),
            ("its parameters", [name for name, _ in made.named_parameters()], names),
        ):
            if found != expected:
                broken(OWN, f"{what} are {found} after set-up, and were {expected}")
        held = {id(p) for p in made.parameters()}
        stray = [p.shape for group in optimizer.param_groups for p in group["params"] if id(p) not in held]
        if stray:
            broken(OWN, f"the optimizer holds {len(stray)} parameters that are not in the model: a step has no effect")
    after = _keys(model)
    if type(model) is not cls or (after is not None and after != keys):
        broken(OWN, f"after tear-down the {cls.__name__} is a {type(model).__name__} with the keys {after}")


def _keys(model: Any) -> list[str] | None:
    """Return the keys of a model's state; None if the strategy refuses to return the state of a sharded model."""
    try:
        return list(model.state_dict())
    except PlugframeError:
        return None


def _counter() -> tuple[Extension, dict[str, int]]:
    """Return an extension that wraps every strategy hook, and its call counts by hook."""
    calls: dict[str, int] = {}

    def wrapper(name: str) -> Any:
        def hook(self: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return (yield)

        hook.__name__ = name
        return hookimpl(wrapper=True)(hook)

    wrapped = {name: wrapper(name) for name in _wrappable()}
    return type("Counter", (Extension,), wrapped)(), calls


def _wrappable() -> list[str]:
    spec = KINDS["strategy"].spec
    hooks = [name for name in KINDS["strategy"].hooks if not is_per_plugin(getattr(spec, name))]
    return [name for name in hooks if name != "strategy_describe"]


@rule(ONCE)
def wrappers_see_each_call_once(bench: Bench) -> None:
    """An extension around every hook counts the calls of the script exactly."""
    counter, calls = _counter()
    with bench.lite(counter) as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model))
        for _ in range(3):
            for enabled in (True, False):
                with lite.no_backward_sync(model, enabled=enabled):
                    lite.backward(bench.loss(model, *bench.share(lite, bench.batch(4))))
            lite.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        bench.weights(lite, model)
    expected = {
        "strategy_setup": 1,
        "strategy_setup_module_and_optimizers": 1,
        "strategy_backward": 6,
        "strategy_no_sync": 6,
        "strategy_clip_gradients": 3,
        "strategy_optimizer_step": 3,
        "strategy_zero_grad": 3,
        "strategy_module_state": 1,
        "strategy_teardown": 1,
    }
    for name, count in expected.items():
        if calls.get(name, 0) != count:
            broken(ONCE, f"the script caused {count} calls of {name}, and a wrapper saw {calls.get(name, 0)}")


class _Skips(Extension):
    """Skip the second step, on the last rank's request."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.is_last = False

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self.is_last = context.world.global_rank == context.world.world_size - 1

    @hookimpl
    def skip_optimizer_step(self) -> bool:
        self.num_steps += 1
        return self.is_last and self.num_steps == 2


@rule(SKIPPED)
def a_skipped_step_is_no_step(bench: Bench) -> None:
    """Training in which an extension skips a step ends as one in which the script leaves it out."""
    ends = []
    for skips in (True, False):
        with bench.lite(*[_Skips()] * skips) as lite:
            model = bench.model()
            model, optimizer = lite.setup(model, optimizer_of(model))
            for number in range(3):
                optimizer.zero_grad()
                lite.backward(bench.loss(model, *bench.share(lite, bench.batch(4, seed=number))))
                if skips or number != 1:
                    optimizer.step()
            ends.append(bench.weights(lite, model))
    differs = states.difference(ends[1], ends[0])
    if differs:
        broken(SKIPPED, f"after a skipped step and one more: {differs} (strategy_skip_step makes no update)")


@rule(APART)
def jobs_are_apart(bench: Bench) -> None:
    """One strategy object can run several jobs in turn; models of the first do not affect the second."""
    strategy = bench.strategy()
    if isinstance(strategy, str):
        registry = Registry.discover()
        strategy = registry.make(registry.find("strategy", strategy))
    ends = []
    kept: list[Any] = []
    for number in range(2):
        with bench.lite(strategy=strategy) as lite:
            training = set_up_training(bench, lite, seed=1)
            kept.append(training)
            losses = train(bench, lite, training, 1)
            ends.append((losses, bench.weights(lite, training["model"])))
        if number and (ends[0][0] != ends[1][0] or states.difference(ends[0][1], ends[1][1])):
            broken(APART, f"the same training by the same object again has the losses {ends[1][0]}, not {ends[0][0]}")


@rule(LAW_9)
def nothing_is_left_behind(bench: Bench) -> None:
    """A job leaves nothing behind, also after an error in the script or in a forward."""

    def job(fails: str = "") -> None:
        with bench.lite() as lite:
            training = set_up_training(bench, lite, seed=1)
            train(bench, lite, training, 1)
            if fails == "a forward":
                training["model"](torch.ones(2, 5, device=lite.device))
            if fails:
                raise ZeroDivisionError

    job()  # torch creates some state once in a process
    before = traces()
    for fails in ("", "the script", "a forward"):
        try:
            job(fails)
        except ZeroDivisionError:
            pass
        except Exception as error:  # noqa: BLE001 - reported as it is
            if fails != "a forward":
                broken(LAW_9, f"an error in {fails or 'nothing'} became {one_line(error)}")
        what = left(before, traces(collect=False)) and left(before, traces())
        if what:
            broken(LAW_9, f"after {f'an error in {fails}' if fails else 'a job'} {what}")


#: Checks of strategies that average the gradients of all ranks in each backward.
AVERAGING = (
    gradients_are_those_of_the_whole_batch,
    accumulated_gradients_are_those_of_the_whole,
    models_train_together,
    clipping_is_that_of_the_whole,
    gradients_that_are_not_finite_are_an_error,
    running_statistics_are_equal,
    a_local_backward_needs_no_other_rank,
)
#: Checks of all strategies.
ALWAYS = (
    it_begins_with_rank_zeros_weights,
    evaluation_sees_every_sample_once,
    a_run_goes_on_from_its_checkpoint,
    a_state_is_the_users,
    its_weights_are_left_for_others,
    a_checkpoint_is_loaded_on_other_ranks,
    objects_stay_the_users_own,
    wrappers_see_each_call_once,
    a_skipped_step_is_no_step,
    jobs_are_apart,
    nothing_is_left_behind,
)
