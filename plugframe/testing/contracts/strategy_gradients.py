"""Strategy contract checks of gradients: averaging, accumulation and clipping."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.running import broken
from plugframe.testing.contracts.strategy_bench import (
    EPOCHS,
    MAX_NORM,
    SAMPLES,
    Batch,
    Bench,
    Model,
    batch_of,
    loss_of,
    optimizer_of,
)
from plugframe.testing.contracts.strategy_rules import LAW_6, LAW_7, LOCAL, STATISTICS


@rule(LAW_6)
def gradients_are_those_of_the_whole_batch(bench: Bench) -> None:
    """Training with an incomplete last batch ends with the weights of plain torch."""
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model))
        loader, window = bench.loader(lite), bench.window(lite)
        for epoch in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                lite.backward(bench.loss(model, x, y))
                optimizer.step()
            for x, y in bench.windows(window):
                other.zero_grad()
                bench.loss(plain, x, y).backward()  # type: ignore[no-untyped-call]
                other.step()
            found = bench.weights(lite, model)
            bench.compare(LAW_6, found, plain.state_dict(), begun, f"after {epoch + 1} epochs over {SAMPLES} samples")


@rule(LAW_6)
def accumulated_gradients_are_those_of_the_whole(bench: Bench) -> None:
    """Micro-batches under nested no_backward_sync accumulate, and later backwards synchronise again."""
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain, momentum=0.0)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model, momentum=0.0))
        batches = [bench.batch(4, seed) for seed in range(4)]

        def step(*micro: tuple[Batch, Sequence[bool]]) -> None:
            optimizer.zero_grad()
            other.zero_grad()
            for batch, nested in micro:
                contexts = [lite.no_backward_sync(model, enabled=enabled) for enabled in nested]
                for context in contexts:
                    context.__enter__()
                x, y = bench.share(lite, batch)
                lite.backward(bench.loss(model, x, y) / len(micro))
                for context in reversed(contexts):
                    context.__exit__(None, None, None)
                (bench.loss(plain, *batch) / len(micro)).backward()  # type: ignore[no-untyped-call]
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
    """A `Model` with a shared weight and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.again(self.frozen(torch.tanh(self.first(x))))))


@rule(LAW_6)
def models_train_together(bench: Bench) -> None:
    """Two models with an optimizer each, trained in turns: each gets its own gradients."""
    if bench.settings.build is not Model:
        return  # the strategy does not support arbitrary models
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
                batch = bench.batch(4, seed)
                lite.backward(bench.loss(model, *bench.share(lite, batch)), model=model)
                bench.loss(plain, *batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                other.step()
        for model, plain, first in zip(models, plains, begun, strict=True):
            found = bench.weights(lite, model)
            bench.compare(
                LAW_6, found, plain.state_dict(), first, f"with two models in turns, the {type(plain).__name__}"
            )


@rule(STATISTICS)
def running_statistics_are_equal(bench: Bench) -> None:
    """Running statistics of a norm are equal on ranks that saw different batches."""
    torch.manual_seed(0)
    with bench.lite() as lite:
        own = Model()
        own.norm = nn.BatchNorm1d(6)
        model, optimizer = lite.setup(own, optimizer_of(own))
        for seed in range(2):
            x, y = batch_of(4, seed + 10 * lite.global_rank)  # the model is the suite's own too
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
    """One rank may run backward alone under no_backward_sync; the next synchronised backward averages all."""
    if "local-backward" not in bench.settings.provides:
        return
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain, momentum=0.0)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model, momentum=0.0))
        extra, batch = bench.batch(4, 1), bench.batch(4, 2)
        if lite.is_global_zero:
            with lite.no_backward_sync(model):
                lite.backward(bench.loss(model, *(tensor.to(lite.device) for tensor in extra)))
        lite.backward(bench.loss(model, *bench.share(lite, batch)))
        optimizer.step()
        (bench.loss(plain, *extra) / lite.world_size + bench.loss(plain, *batch)).backward()  # type: ignore[no-untyped-call]
        other.step()
        what = "after a micro-batch on rank 0 only, and one on all ranks"
        bench.compare(LOCAL, bench.weights(lite, model), plain.state_dict(), begun, what)


@rule(LAW_7)
def clipping_is_that_of_the_whole(bench: Bench) -> None:
    """The norm is that of the full gradients, equal on all ranks; the step uses the clipped ones."""
    for limit in ({"max_norm": MAX_NORM}, {"max_norm": 1e3}, {"clip_val": 0.01}):
        plain = bench.model()
        begun, other = bench.model(), optimizer_of(plain, lr=1.0, momentum=0.0)
        batch = bench.batch(4)
        with bench.lite() as lite:
            model = bench.model()
            model, optimizer = lite.setup(model, optimizer_of(model, lr=1.0, momentum=0.0))
            lite.backward(bench.loss(model, *bench.share(lite, batch)))
            norm = lite.clip_gradients(model, optimizer, **limit)  # type: ignore[arg-type]
            optimizer.step()
            bench.loss(plain, *batch).backward()  # type: ignore[no-untyped-call]
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
                broken(LAW_7, f"the ranks got different norms: {everyone}")
            if not abs(everyone[0] - expected) <= max(bench.tolerance, 1e-4) * expected:
                broken(
                    LAW_7,
                    f"clip_gradients(max_norm={limit['max_norm']}) gave {everyone[0]:.6g}, plain torch {expected:.6g}",
                )
        other.step()
        bench.compare(LAW_7, found, plain.state_dict(), begun, f"after a step clipped with {limit}")


@rule(LAW_7)
def gradients_that_are_not_finite_are_an_error(bench: Bench) -> None:
    """All ranks raise though only one has the bad sample, unless error_if_nonfinite=False; training continues."""
    plain = bench.model()
    begun, other = bench.model(), optimizer_of(plain, momentum=0.0)
    with bench.lite() as lite:
        model = bench.model()
        model, optimizer = lite.setup(model, optimizer_of(model, momentum=0.0))
        for raises in (True, False):
            x, y = bench.share(lite, bench.batch(4))
            index, count = lite._hooks.strategy_data_shard()
            if index == count - 1:
                x[0, 0] = float("inf")
            lite.backward(bench.loss(model, x, y))
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
                broken(LAW_7, f"the error does not mention finite gradients: {said}")
            optimizer.zero_grad()
        batch = bench.batch(4)
        lite.backward(bench.loss(model, *bench.share(lite, batch)))
        optimizer.step()
        bench.loss(plain, *batch).backward()  # type: ignore[no-untyped-call]
        other.step()
        found = bench.weights(lite, model)
    bench.compare(LAW_7, found, plain.state_dict(), begun, "after zero_grad() and a step on finite gradients")
