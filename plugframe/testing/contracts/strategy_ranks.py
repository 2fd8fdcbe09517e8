"""Strategy contract checks on every rank of a job, compared with the same training in plain torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe.base import Extension
from plugframe.core.registry.registry import Registry
from plugframe.errors import PlugframeError
from plugframe.hooks import KINDS, hookimpl
from plugframe.hooks.world import World
from plugframe.lite import Lite
from plugframe.testing.contracts import states
from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.running import broken, left, one_line, traces

LAW_4 = "Law 4 (a run that is stopped and resumed ends bit for bit where the uninterrupted one ends)"
LAW_6 = "Law 6 (gradients on N ranks equal those of one process on the whole batch)"
LAW_7 = "Law 7 (clip_gradients gives the norm of one process, and the same error on gradients that are not finite)"
LAW_8 = "Law 8 (evaluation over N ranks sees every sample exactly once)"
LAW_9 = "Law 9 (nothing is left behind)"
START = "Start (training begins with the weights of rank 0, on all ranks, also where they were made without storage)"
STATE = "State (what is saved has the user's keys and whole tensors, and is loaded on any number of ranks)"
STATISTICS = "Statistics (running statistics, which are in no gradient, are equal on all ranks after a step)"
OWN = "Own objects (what is set up is the user's own model and optimizer, and tear-down gives them back)"
ONCE = "Once (a wrapper sees each call of the script's once)"
APART = "Apart (two jobs share nothing)"
LOCAL = "Local backward (what provides 'local-backward' exchanges nothing under strategy_no_sync, and averages later)"

SAMPLES, WINDOW, EPOCHS = 11, 4, 2
MAX_NORM = 0.1

Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    """A norm, two layers and a buffer: 6 inputs and 2 outputs."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(6)
        self.enter = nn.Linear(6, 16)
        self.leave = nn.Linear(16, 2)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.relu(self.enter(self.norm(x)))) * self.scale
        return out


@dataclass
class Settings:
    """What is under test, sent to the ranks.

    Attributes:
        spec: the name.
        options: constructor arguments.
        provides: what its descriptor says.
        lite: settings of `Lite`: accelerator, precision, and what the author adds.
        build: makes the model.
        tolerance: how far a weight may be from plain torch's, in parts of how far training moved it.
        folder: where checkpoints are left for the job on another number of ranks.
    """

    spec: str
    options: dict[str, Any]
    provides: tuple[str, ...]
    folder: str
    build: Callable[[], nn.Module] = Model
    tolerance: float = 1e-4
    lite: dict[str, Any] = field(default_factory=dict)


class Bench:
    """One rank of the job that the checks run in; each makes a `Lite` of its own."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        self.folder = Path(settings.folder)
        self.tolerance = settings.tolerance

    def strategy(self) -> Any:
        """Return what selects the strategy: its name, or an object where there are options."""
        if not self.settings.options:
            return self.settings.spec
        registry = Registry.discover()
        return registry.make(registry.find("strategy", self.settings.spec), self.settings.options)

    @contextmanager
    def lite(self, *plugins: Any, strategy: Any = None) -> Iterator[Lite]:
        """Run a job under the strategy."""
        chosen = self.strategy() if strategy is None else strategy
        settings = {"devices": self.world.local_world_size, **self.settings.lite}
        with Lite(strategy=chosen, plugins=plugins, **settings) as lite:
            lite.launch()
            yield lite

    def model(self, seed: int = 1) -> nn.Module:
        """Return a model, the same each time."""
        torch.manual_seed(seed)
        return self.settings.build()

    def loader(self, lite: Lite, size: int = WINDOW) -> Any:
        """Return a loader over the data, whose batches are of `size` samples over all ranks."""
        _, count = lite._hooks.strategy_data_shard()
        return lite.setup_dataloaders(DataLoader(data(), batch_size=max(1, size // count)))

    def window(self, lite: Lite, size: int = WINDOW) -> int:
        """Return how many samples all ranks together read of such a loader at once."""
        count = int(lite._hooks.strategy_data_shard()[1])
        return max(1, size // count) * count

    def share(self, lite: Lite, batch: Batch) -> Batch:
        """Return this rank's part of a batch, on its device."""
        index, count = lite._hooks.strategy_data_shard()
        x, y = (part[index::count].to(lite.device) for part in batch)
        return x, y

    def weights(self, lite: Lite, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole weights, on the CPU."""
        mine = lite._hooks.strategy_module_state(module=model, sharded=False)
        whole = {name: tensor.detach().cpu().clone() for name, tensor in mine.items()} if lite.is_global_zero else None
        found: dict[str, Tensor] = lite._hooks.collective_broadcast_object(obj=whole, src=0, group=None)
        return found

    def compare(
        self, law: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], begun: nn.Module, what: str
    ) -> None:
        """Check that weights moved as in plain torch."""
        if list(found) != list(expected):
            broken(STATE, f"the state has the keys {list(found)}, and the model's own are {list(expected)}")
        for name, value in begun.state_dict().items():
            moved = float((expected[name] - value).double().norm())
            apart = float((found[name].double() - expected[name].double()).norm())
            if not apart <= self.tolerance * max(moved, 1e-3):
                broken(
                    law,
                    f"{what}, {name} is {apart:.3g} from plain torch's, which moved it by {moved:.3g}; "
                    f"{self.tolerance:g} of that is allowed (tolerance= of the suite, for what rounds by design)",
                )


@contextmanager
def bench(world: World, settings: Settings) -> Iterator[Bench]:
    """Give what the checks of one start share. What is refused here is found out before any of them."""
    made = Bench(world, settings)
    with made.lite() as lite:
        model = made.model()
        lite.setup(model, optimizer_of(model))
    yield made


def data(number: int = SAMPLES) -> TensorDataset:
    """Return samples; the last batch is incomplete."""
    x, y = batch_of(number)
    return TensorDataset(x, y)


def batch_of(number: int, seed: int = 5) -> Batch:
    """Return so many samples, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 6, generator=generator)
    return x, torch.stack([x.sum(1), x.prod(1)], 1)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def optimizer_of(model: nn.Module, *, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Return an optimizer whose steps are as long as the gradients are: one that is half shows."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)


def _windows(size: int, number: int = SAMPLES) -> list[Batch]:
    x, y = batch_of(number)
    return [(x[start : start + size], y[start : start + size]) for start in range(0, number, size)]


# ---------------------------------------------------------------------- law 6


@rule(LAW_6)
def gradients_are_those_of_the_whole_batch(bench: Bench) -> None:
    """Steps over whole batches and a last one that is not end where plain torch ends."""
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model))
        loader, window = bench.loader(lite), bench.window(lite)
        for epoch in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                lite.backward(loss_of(model, x, y))
                optimizer.step()
            for x, y in _windows(window):
                other.zero_grad()
                loss_of(plain, x, y).backward()  # type: ignore[no-untyped-call]
                other.step()
            found = bench.weights(lite, model)
            bench.compare(LAW_6, found, plain.state_dict(), begun, f"after {epoch + 1} epochs over {SAMPLES} samples")


@rule(LAW_6)
def accumulated_gradients_are_those_of_the_whole(bench: Bench) -> None:
    """Micro-batches under no_backward_sync, nested in any way, add up, and afterwards each step is exchanged again."""
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain, momentum=0.0)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model, momentum=0.0))
        batches = [batch_of(4, seed) for seed in range(4)]

        def step(*micro: tuple[Batch, Sequence[bool]]) -> None:
            optimizer.zero_grad()
            other.zero_grad()
            for batch, nested in micro:
                contexts = [lite.no_backward_sync(model, enabled=enabled) for enabled in nested]
                for context in contexts:
                    context.__enter__()
                x, y = bench.share(lite, batch)
                lite.backward(loss_of(model, x, y) / len(micro))
                for context in reversed(contexts):
                    context.__exit__(None, None, None)
                (loss_of(plain, *batch) / len(micro)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            other.step()

        def check(what: str) -> None:
            bench.compare(LAW_6, bench.weights(lite, model), plain.state_dict(), begun, what)

        step((batches[0], [True]), (batches[1], [True]), (batches[2], []))
        check("with 3 micro-batches")
        step((batches[1], [True, True]), (batches[3], [True, False]))
        bench.compare(
            LAW_6, bench.weights(lite, model), plain.state_dict(), begun, "no_backward_sync(enabled=False) inside"
        )
        step((batches[0], [False]))
        step((batches[3], []))
        bench.compare(
            LAW_6, bench.weights(lite, model), plain.state_dict(), begun, "after no_backward_sync(enabled=False)"
        )
        try:
            with lite.no_backward_sync(model):
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        step((batches[2], []))
        bench.compare(
            LAW_6, bench.weights(lite, model), plain.state_dict(), begun, "after an error in no_backward_sync"
        )


class Tied(Model):
    """Has besides a weight that is used twice, and a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.again(self.frozen(torch.tanh(self.first(x))))))


@rule(LAW_6)
def models_train_together(bench: Bench) -> None:
    """Two models with an optimizer each, one with a shared weight and a frozen layer, in turns: each gets its own."""
    if bench.settings.build is not Model:
        return  # the author's model says that not any will do
    torch.manual_seed(2)
    plains = [Tied(), Model()]
    begun = copy.deepcopy(plains)
    others = [optimizer_of(plain) for plain in plains]
    with bench.lite() as lite:
        models, optimizers = copy.deepcopy(begun), []
        for number, model in enumerate(models):
            models[number], optimizer = lite.setup(model, optimizer_of(model))
            optimizers.append(optimizer)
        for seed in range(2):
            for model, optimizer, plain, other in zip(models, optimizers, plains, others, strict=True):
                optimizer.zero_grad()
                other.zero_grad()
                batch = batch_of(4, seed)
                lite.backward(loss_of(model, *bench.share(lite, batch)), model=model)
                loss_of(plain, *batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                other.step()
        for model, plain, first in zip(models, plains, begun, strict=True):
            found = bench.weights(lite, model)
            bench.compare(
                LAW_6, found, plain.state_dict(), first, f"with two models in turns, the {type(plain).__name__}"
            )


@rule(START)
def it_begins_with_rank_zeros_weights(bench: Bench) -> None:
    """Ranks that made different weights train those of rank 0, also those made without storage."""
    expected = bench.model(seed=3).state_dict()
    for empty in (False, True):
        how = f"init_module(empty_init={empty})"
        with bench.lite() as lite:
            # What is made without storage is drawn again at set-up, by the same generator on all ranks.
            torch.manual_seed(3 + (0 if empty else lite.global_rank))
            with lite.init_module(empty_init=empty):
                model = bench.settings.build()
            model, _ = lite.setup(model, optimizer_of(model))
            found = bench.weights(lite, model)
            for name, value in expected.items():
                if not torch.equal(found[name], value):
                    broken(START, f"with {how} {name} is not what rank 0 would have made")
            everyone = lite._hooks.collective_all_gather_object(obj=_outputs(bench, lite, model), group=None)
            for rank, out in enumerate(everyone):
                if not torch.allclose(out, everyone[0], rtol=1e-4, atol=1e-5):
                    broken(
                        START, f"with init_module(empty_init={empty}) rank {rank} computes something else than rank 0"
                    )


def _outputs(bench: Bench, lite: Lite, model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(batch_of(3)[0].to(lite.device)).cpu()
    return out


@rule(STATISTICS)
def running_statistics_are_equal(bench: Bench) -> None:
    """Ranks that saw other batches have one model after a step: the statistics of a norm are in no gradient."""
    torch.manual_seed(0)
    with bench.lite() as lite:
        own = Model()
        own.norm = nn.BatchNorm1d(6)
        model, optimizer = lite.setup(own, optimizer_of(own))
        for seed in range(2):
            x, y = batch_of(4, seed + 10 * lite.global_rank)
            lite.backward(loss_of(model, x.to(lite.device), y.to(lite.device)))
            optimizer.step()
            optimizer.zero_grad()
        mine = {name: buffer.detach().double().cpu().tolist() for name, buffer in model.named_buffers()}
        everyone = lite._hooks.collective_all_gather_object(obj=mine, group=None)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                broken(STATISTICS, f"after a step {name} of a BatchNorm1d differs on rank {rank} from that of rank 0")


@rule(LOCAL)
def a_local_backward_needs_no_other_rank(bench: Bench) -> None:
    """Under no_backward_sync one rank goes ahead by itself; the next synchronised backward averages all of it."""
    if "local-backward" not in bench.settings.provides:
        return
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain, momentum=0.0)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model, momentum=0.0))
        extra, batch = batch_of(4, 1), batch_of(4, 2)
        if lite.is_global_zero:
            with lite.no_backward_sync(model):
                lite.backward(loss_of(model, *(part.to(lite.device) for part in extra)))
        lite.backward(loss_of(model, *bench.share(lite, batch)))
        optimizer.step()
        (loss_of(plain, *extra) / lite.world_size + loss_of(plain, *batch)).backward()  # type: ignore[no-untyped-call]
        other.step()
        what = "after a micro-batch that rank 0 alone had, and one of all"
        bench.compare(LOCAL, bench.weights(lite, model), plain.state_dict(), begun, what)


# ---------------------------------------------------------------------- laws 7 and 8


@rule(LAW_7)
def clipping_is_that_of_the_whole(bench: Bench) -> None:
    """The norm is that of the whole gradients, equal on all ranks; the step is made with clipped ones."""
    for limit in ({"max_norm": MAX_NORM}, {"max_norm": 1e3}, {"clip_val": 0.01}):
        plain = bench.model()
        begun, other = bench.model(), optimizer_of(plain, lr=1.0, momentum=0.0)
        batch = batch_of(4)
        with bench.lite() as lite:
            model = bench.model()
            model, optimizer = lite.setup(model, optimizer_of(model, lr=1.0, momentum=0.0))
            lite.backward(loss_of(model, *bench.share(lite, batch)))
            norm = lite.clip_gradients(model, optimizer, **limit)  # type: ignore[arg-type]
            optimizer.step()
            loss_of(plain, *batch).backward()  # type: ignore[no-untyped-call]
            found = bench.weights(lite, model)
            everyone = lite._hooks.collective_all_gather_object(obj=None if norm is None else float(norm), group=None)
        if "clip_val" in limit:
            nn.utils.clip_grad_value_(plain.parameters(), limit["clip_val"])
            if norm is not None:
                broken(LAW_7, f"clipping by value returned {norm}, not None")
        else:
            expected = float(nn.utils.clip_grad_norm_(plain.parameters(), limit["max_norm"]))
            if norm is None or norm.dim() != 0:
                broken(LAW_7, f"clip_gradients(max_norm=…) returned {norm!r}, not a 0-d tensor")
            if len(set(everyone)) != 1:
                broken(LAW_7, f"the ranks were given different norms: {everyone}")
            if not abs(everyone[0] - expected) <= max(bench.tolerance, 1e-4) * expected:
                broken(
                    LAW_7,
                    f"clip_gradients(max_norm={limit['max_norm']}) gave {everyone[0]:.6g}, plain torch {expected:.6g}",
                )
        other.step()
        bench.compare(LAW_7, found, plain.state_dict(), begun, f"after a step clipped with {limit}")


@rule(LAW_7)
def gradients_that_are_not_finite_are_an_error(bench: Bench) -> None:
    """Though one rank alone has the bad sample, all raise, unless they are told not to; then training goes on."""
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain, momentum=0.0)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model, momentum=0.0))
        for raises in (True, False):
            x, y = bench.share(lite, batch_of(4))
            index, count = lite._hooks.strategy_data_shard()
            if index == count - 1:
                x[0, 0] = float("inf")
            lite.backward(loss_of(model, x, y))
            said = ""
            try:
                lite.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=raises)
            except RuntimeError as error:
                said = str(error)
            everyone = lite._hooks.collective_all_gather_object(obj=bool(said), group=None)
            if everyone != [raises] * lite.world_size:
                heard = ", ".join(f"rank {rank}" for rank, each in enumerate(everyone) if each) or "no rank"
                broken(LAW_7, f"clip_gradients(error_if_nonfinite={raises}) of such gradients raised on {heard}")
            if raises and "finite" not in said:
                broken(LAW_7, f"the error does not say what is the matter: {said}")
            optimizer.zero_grad()
        batch = batch_of(4)
        lite.backward(loss_of(model, *bench.share(lite, batch)))
        optimizer.step()
        loss_of(plain, *batch).backward()  # type: ignore[no-untyped-call]
        other.step()
        found = bench.weights(lite, model)
    bench.compare(LAW_7, found, plain.state_dict(), begun, "after zero_grad() and a step on finite gradients")


@rule(LAW_8)
def evaluation_sees_every_sample_once(bench: Bench) -> None:
    """The shards of the data are 0, 1, …; without gradients the ranks read each sample once, and compute alike."""
    plain = bench.model()
    with bench.lite() as lite:
        model = lite.setup(bench.model())
        shard = tuple(lite._hooks.strategy_data_shard())
        if shard != tuple(lite._hooks.strategy_data_shard()):
            broken(LAW_8, f"strategy_data_shard() gave {shard}, and something else when asked again")
        shards = lite._hooks.collective_all_gather_object(obj=shard, group=None)
        if {count for _, count in shards} != {shards[0][1]} or {i for i, _ in shards} != set(range(shards[0][1])):
            broken(LAW_8, f"strategy_data_shard() gave the ranks {shards}: not 0, 1, … of one number")
        if "sharded" not in bench.settings.provides and shard[1] != lite.world_size:
            broken(LAW_8, f"{lite.world_size} ranks with the whole model each divide the data in {shard[1]}")
        model.eval()
        for number, shuffle in ((SAMPLES, False), (SAMPLES, True), (1, False), (8, True)):
            torch.manual_seed(4)
            numbers = TensorDataset(torch.arange(number), batch_of(number)[0])
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


# ---------------------------------------------------------------------- state


def _train(bench: Bench, lite: Lite, parts: Mapping[str, Any], epochs: int) -> list[float]:
    losses = []
    loader = bench.loader(lite)
    for _ in range(epochs):
        for x, y in loader:
            parts["optimizer"].zero_grad()
            loss = loss_of(parts["model"], x, y)
            lite.backward(loss)
            parts["optimizer"].step()
            parts["scheduler"].step()
            losses.append(loss.item())
    return losses


def _parts(bench: Bench, lite: Lite, seed: int) -> dict[str, Any]:
    model = bench.model(seed)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-4)
    model, optimizer = lite.setup(model, adam)
    return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)}


def _load(lite: Lite, path: str, parts: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ ranks? saved, \d+ load")
        lite.load(path, parts)


@rule(LAW_4)
def a_run_goes_on_from_its_checkpoint(bench: Bench) -> None:
    """Loaded into other weights in a new job, training ends with the same bits, schedule included."""
    path = str(bench.folder / f"middle-{bench.world.world_size}")
    with bench.lite() as lite:
        parts = _parts(bench, lite, seed=1)
        _train(bench, lite, parts, 1)
        lite.save(path, parts)
        losses = _train(bench, lite, parts, EPOCHS)
        expected = bench.weights(lite, parts["model"])
    with bench.lite() as lite:
        parts = _parts(bench, lite, seed=2)
        _load(lite, path, parts)
        again = _train(bench, lite, parts, EPOCHS)
        found = bench.weights(lite, parts["model"])
        scheduled = [group["lr"] for group in parts["optimizer"].param_groups]
    differs = states.difference(expected, found)
    if differs:
        broken(LAW_4, f"the run that was loaded ends with other weights: {differs}")
    if losses != again:
        broken(LAW_4, f"the run that was loaded has the losses {again}, the other had {losses}")
    steps = (1 + EPOCHS) * len(losses) // EPOCHS
    if scheduled != [0.01 * 0.5 ** (steps // 4)]:
        broken(LAW_4, f"after {steps} steps of the schedule the learning rate is {scheduled}")


@rule(STATE)
def a_state_is_the_users(bench: Bench) -> None:
    """The state of model and optimizer has the keys and shapes of plain torch's, and comes back as it was."""
    plain = bench.model()
    path = str(bench.folder / f"state-{bench.world.world_size}")
    with bench.lite() as lite:
        parts = _parts(bench, lite, seed=1)
        _train(bench, lite, parts, 1)
        lite.save(path, parts)
        kept = bench.weights(lite, parts["model"])
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in kept.items()}
        if shapes != {name: (tensor.shape, tensor.dtype) for name, tensor in plain.state_dict().items()}:
            broken(STATE, f"the whole state of the model has {shapes}")
        held = lite.load(path)
        differs = states.difference(kept, {name: tensor.cpu() for name, tensor in held["model"].items()})
        if differs:
            broken(STATE, f"of the model in a checkpoint: {differs}")
        load = lite._hooks.strategy_load_module_state
        state = {name: value for name, value in held["model"].items() if name != "norm.weight"}
        missing, unexpected = load(module=parts["model"], state={**state, "more": torch.ones(1)}, strict=False)
        wrong = ["norm.weight"] if "norm.weight" in kept else []
        if (list(missing), list(unexpected)) != (wrong, ["more"]):
            broken(
                STATE, f"of a state without {wrong} and with ['more'], missing is {missing}, unexpected {unexpected}"
            )


@rule(STATE)
def a_checkpoint_is_loaded_on_other_ranks(bench: Bench) -> None:
    """What a job of another number of ranks has saved is loaded here, with the same weights."""
    for other in (1, 2):
        path, weights = bench.folder / f"state-{other}", bench.folder / f"weights-{other}"
        if other == bench.world.world_size or not (path.exists() and weights.exists()):
            continue
        with bench.lite() as lite:
            parts = _parts(bench, lite, seed=2)
            _load(lite, str(path), parts)
            found = bench.weights(lite, parts["model"])
            differs = states.difference(torch.load(weights, weights_only=True), found)
            if differs:
                broken(STATE, f"what {other} ranks saved came to {bench.world.world_size} as something else: {differs}")
            _train(bench, lite, parts, 1)


# ---------------------------------------------------------------------- objects, wrappers, what is left


@rule(OWN)
def objects_stay_the_users_own(bench: Bench) -> None:
    """Set-up gives the very objects back, with their classes, keys and names; so does tear-down."""
    with bench.lite() as lite:
        model = bench.model()
        cls, keys, names = type(model), list(model.state_dict()), [name for name, _ in model.named_parameters()]
        adam = torch.optim.AdamW(model.parameters(), lr=0.1)
        made, optimizer = lite.setup(model, adam)
        if made is not model or not isinstance(made, cls):
            broken(OWN, f"lite.setup() gave back a {type(made).__name__} for a {cls.__name__}")
        if optimizer is not adam and not isinstance(optimizer, torch.optim.AdamW):
            broken(OWN, f"lite.setup() gave back a {type(optimizer).__name__} for an AdamW")
        for what, found, expected in (
            ("the keys of its state", _keys(made) or list(lite.state_dict(made, all_ranks=True)), keys),
            ("its parameters", [name for name, _ in made.named_parameters()], names),
        ):
            if found != expected:
                broken(OWN, f"{what} are {found} after set-up, and were {expected}")
        held = {id(p) for p in made.parameters()}
        stray = [p.shape for group in optimizer.param_groups for p in group["params"] if id(p) not in held]
        if stray:
            broken(OWN, f"the optimizer holds {len(stray)} parameters that the model has not: a step changes nothing")
    after = _keys(model)
    if type(model) is not cls or (after is not None and after != keys):
        broken(OWN, f"after tear-down the {cls.__name__} is a {type(model).__name__} with the keys {after}")


def _keys(model: Any) -> list[str] | None:
    """Return the keys of a model's state; None if the strategy refuses to give the state of a model in parts."""
    try:
        return list(model.state_dict())
    except PlugframeError:
        return None


def _counter() -> tuple[Extension, dict[str, int]]:
    """Return an extension that wraps every hook of strategies, and what it counts."""
    calls: dict[str, int] = {}

    def wrapper(name: str) -> Any:
        def hook(self: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return (yield)

        hook.__name__ = name
        return hookimpl(wrapper=True)(hook)

    wrapped = {name: wrapper(name) for name in KINDS["strategy"].hooks if name != "strategy_describe"}
    return type("Counter", (Extension,), wrapped)(), calls


@rule(ONCE)
def wrappers_see_each_call_once(bench: Bench) -> None:
    """An extension around every hook counts what the script did: neither more nor less."""
    counter, calls = _counter()
    with bench.lite(counter) as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model))
        for _ in range(3):
            for enabled in (True, False):
                with lite.no_backward_sync(model, enabled=enabled):
                    lite.backward(loss_of(model, *bench.share(lite, batch_of(4))))
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
            broken(ONCE, f"the script came to {name} {count} times, and a wrapper saw {calls.get(name, 0)} calls")


@rule(APART)
def jobs_are_apart(bench: Bench) -> None:
    """One object serves one job after another; a model of the first is not seen by the second."""
    strategy = bench.strategy()
    if isinstance(strategy, str):
        registry = Registry.discover()
        strategy = registry.make(registry.find("strategy", strategy))
    ends = []
    kept: list[Any] = []
    for number in range(2):
        with bench.lite(strategy=strategy) as lite:
            parts = _parts(bench, lite, seed=1)
            kept.append(parts)
            losses = _train(bench, lite, parts, 1)
            ends.append((losses, bench.weights(lite, parts["model"])))
        if number and (ends[0][0] != ends[1][0] or states.difference(ends[0][1], ends[1][1])):
            broken(APART, f"the same training by the same object again has the losses {ends[1][0]}, not {ends[0][0]}")


@rule(LAW_9)
def nothing_is_left_behind(bench: Bench) -> None:
    """After a job, and after ones that ended with an error in the script or in a forward, everything is as before."""

    def job(fails: str = "") -> None:
        with bench.lite() as lite:
            parts = _parts(bench, lite, seed=1)
            _train(bench, lite, parts, 1)
            if fails == "a forward":
                parts["model"](torch.ones(2, 5, device=lite.device))
            if fails:
                raise ZeroDivisionError

    job()  # what torch sets up once in a process is there now
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


@rule(STATE)
def its_weights_are_left_for_others(bench: Bench) -> None:
    """Keep what `a_state_is_the_users` saved, for the job of another number of ranks."""
    with bench.lite() as lite:
        held = lite.load(str(bench.folder / f"state-{bench.world.world_size}"))
        if lite.is_global_zero:
            weights = {name: tensor.cpu() for name, tensor in held["model"].items()}
            torch.save(weights, bench.folder / f"weights-{bench.world.world_size}")


#: Of strategies that average the gradients of all ranks in each backward.
AVERAGING = (
    gradients_are_those_of_the_whole_batch,
    accumulated_gradients_are_those_of_the_whole,
    models_train_together,
    clipping_is_that_of_the_whole,
    gradients_that_are_not_finite_are_an_error,
    running_statistics_are_equal,
    a_local_backward_needs_no_other_rank,
)
#: Of all.
ALWAYS = (
    it_begins_with_rank_zeros_weights,
    evaluation_sees_every_sample_once,
    a_run_goes_on_from_its_checkpoint,
    a_state_is_the_users,
    its_weights_are_left_for_others,
    a_checkpoint_is_loaded_on_other_ranks,
    objects_stay_the_users_own,
    wrappers_see_each_call_once,
    jobs_are_apart,
    nothing_is_left_behind,
)
