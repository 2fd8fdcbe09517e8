"""Metrics over ranks are those of one process: gathered samples, weighted means."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from plugframe import CollectiveMismatchError, Lite, OrderError, SettingError, rank_zero_only
from plugframe.hooks.world import World
from plugframe.lite.metrics import _order
from ranks import run_checks


@contextmanager
def ranks(world: World) -> Iterator[Any]:
    torch.manual_seed(0)
    with Lite(accelerator="cpu", strategy="ddp", devices=world.world_size) as lite:
        lite.launch()
        yield lite


class Numbers(IterableDataset[Tensor]):
    """A stream of numbers."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(self.number))[:, None])

    def __len__(self) -> int:
        return self.number


def column(number: int) -> Tensor:
    return torch.arange(float(number))[:, None]


def every_sample_comes_once_and_in_order(lite: Any) -> None:
    """Whatever the sizes, samplers and streams, with gradients off before the loop or in it, and in training."""
    model = lite.setup(nn.Linear(1, 1))
    for number in (5, 7, 8, 9):
        batches = [list(range(at, min(at + 2, number))) for at in range(0, number, 2)]
        loaders = [
            DataLoader(column(number), batch_size=2),
            DataLoader(column(number), batch_size=1),
            DataLoader(column(number), batch_sampler=batches),
            DataLoader(column(number), sampler=batches, batch_size=None),
            DataLoader(Numbers(number), batch_size=2),
        ]
        if number == 7:
            loaders += [DataLoader(kind, batch_size=1, num_workers=1) for kind in (column(number), Numbers(number))]
        for loader in lite.setup_dataloaders(*loaders):
            for mode in ("off", "inside", "trains"):
                model.train(mode == "trains")
                seen = []
                with torch.set_grad_enabled(mode != "off"):
                    for x in loader:
                        with torch.set_grad_enabled(mode == "trains"):
                            out = model(x)
                        if mode == "trains":
                            lite.backward(out.mean())
                        rows, again = lite.gather_for_metrics((x, {"out": out}))
                        assert torch.equal(again["out"], model(rows).detach())
                        seen += rows.flatten().tolist()
                assert seen == list(range(number)), (number, mode, loader.batch_sampler, seen)


def values_keep_their_structure_and_type(lite: Any) -> None:
    """Tensors of each dtype, arrays, objects and shuffled samples; ranks with other structures are refused."""
    data = [{"x": torch.tensor([float(i)]), "name": f"sample {i}"} for i in range(7)]
    loader = lite.setup_dataloaders(DataLoader(data, batch_size=2, shuffle=True))
    found: list[Any] = []
    with torch.no_grad():
        for batch in loader:
            x = batch["x"]
            given = (
                x.bfloat16(),
                x[:, 0] > 2,
                x.numpy(),
                {"names": batch["name"], "none": None},
                [torch.ones(3)] * len(x),
            )
            found.append(lite.gather_for_metrics(given))
    half, big, array, named, ones = zip(*found, strict=True)
    assert half[0].dtype == torch.bfloat16
    assert big[0].dtype == torch.bool
    assert isinstance(array[0], np.ndarray)
    assert array[0].dtype == np.float32
    assert all(torch.equal(each, torch.ones(3)) for group in ones for each in group)
    names = [name for each in named for name in each["names"]]
    assert sorted(names) == [f"sample {i}" for i in range(7)]
    values = torch.cat(half).flatten().tolist()
    assert names == [f"sample {int(value)}" for value in values]
    assert np.concatenate(array).flatten().tolist() == values
    with torch.no_grad():
        for batch in loader:
            other = batch["x"].double() if lite.is_global_zero else batch["x"]
            with pytest.raises(CollectiveMismatchError, match="float64 on rank 0, and for x: .* float32 on rank 1"):
                lite.gather_for_metrics(other)
            with pytest.raises(SettingError if lite.is_global_zero else CollectiveMismatchError, match="a number"):
                lite.gather_for_metrics(torch.tensor(1.0) if lite.is_global_zero else batch["x"])


def calls_without_a_known_batch_are_refused(lite: Any) -> None:
    """Outside of a loop, for other rows, ahead, for dropped samples, too few samples, other loaders."""
    model = lite.setup(nn.Linear(1, 1)).eval()

    def refused(loader: Any, match: str, *, ahead: bool = False, error: Any = OrderError) -> None:
        batches = iter(loader)
        x = next(batches)
        for _ in range(ahead):
            next(batches)
        with pytest.raises(error, match=match):
            lite.gather_for_metrics(x)
        batches.close()  # type: ignore[attr-defined]

    with torch.no_grad():
        with pytest.raises(OrderError, match="outside of a loop over a loader that was set up"):
            lite.gather_for_metrics(torch.ones(2))
        refused(lite.setup_dataloaders(DataLoader(column(9), batch_size=2)), "read before this call", ahead=True)
        dropped = DataLoader(column(7), batch_size=2, drop_last=True)
        refused(
            lite.setup_dataloaders(dropped), "leaves out 3 of 7 samples on 2 ranks, and 1 on one", error=SettingError
        )
        fewer = DataLoader(column(8), batch_size=2, collate_fn=lambda items: torch.stack(items[:1]))
        refused(lite.setup_dataloaders(fewer), "got 1 rows for a batch of 2 samples", error=SettingError)
        own = lite.setup_dataloaders(DataLoader(column(8), batch_size=2), use_distributed_sampler=False)
        refused(own, "does not divide the samples")
        one = lite.setup_dataloaders(DataLoader(column(1), batch_size=2))
        if lite.is_global_zero:
            refused(one, "fewer samples than ranks are left")
        else:
            assert not list(one)
    model.train()
    plain = DataLoader(column(8), batch_size=2)
    for x in lite.setup_dataloaders(DataLoader(column(8), batch_size=2)):
        lite.backward(model(x).mean())
        model.eval()
        with torch.no_grad():
            lite.gather_for_metrics(model(next(iter(plain))))
            out = model(next(iter(plain)))
            with pytest.raises(OrderError, match="an inner loop over a loader that was not set up"):
                lite.gather_for_metrics(out)
        break


def some_batches_may_be_gathered(lite: Any) -> None:
    """Every second batch gives the samples of those batches."""
    model = lite.setup(nn.Linear(1, 1)).eval()
    seen = []
    with torch.no_grad():
        for at, x in enumerate(lite.setup_dataloaders(DataLoader(column(12), batch_size=2))):
            model(x)
            if at % 2:
                seen += lite.gather_for_metrics(x).flatten().tolist()
    assert seen == [4, 5, 6, 7]


def means_are_weighted(lite: Any) -> None:
    """By samples, without ranks that have none, and without batches that repeat samples."""
    rank = lite.global_rank
    found = lite.reduce_mean({"a": torch.tensor([1.0, float(rank)]), "b": rank}, weight=1 + 2 * rank)
    assert found["a"].tolist() == [1.0, 0.75]
    assert found["b"].item() == 0.75
    assert lite.reduce_mean(float("nan") if rank else 3.0, weight=0 if rank else 5).item() == 3.0
    for wrong in (-1, "many"):
        with pytest.raises(SettingError, match="number of samples or tokens"):
            lite.reduce_mean(1.0, weight=wrong)
    with torch.no_grad():
        means = [
            (lite.reduce_mean(x.mean(), weight=len(x)).item())
            for x in lite.setup_dataloaders(DataLoader(column(5), batch_size=1))
        ]
    assert means == [0.5, 2.5, 4.0]


def running_totals_are_refused(lite: Any) -> None:
    """In the last step, a rank without samples would be left out with all that it has seen."""
    loader = lite.setup_dataloaders(DataLoader(column(7), batch_size=1))
    for seen, _ in enumerate(loader, 1):
        if seen < 4:
            lite.reduce_mean(1.0, weight=seen)
        else:
            with pytest.raises(OrderError, match="weights of all batches so far.*or call it once, after"):
                lite.reduce_mean(1.0, weight=seen)
    numbers = [30, 20, 25, 27]  # tokens of single batches
    with torch.no_grad():
        for x, number in zip(loader, numbers, strict=True):
            lite.reduce_mean(x.mean(), weight=number)


def decisions_are_those_of_all_ranks(lite: Any) -> None:
    """Any, all, rank 0; flags and ways that differ are refused on all ranks."""
    mine = lite.global_rank == 1
    assert [lite.agree(mine, how) for how in ("any", "all", "rank_zero")] == [True, False, False]
    with pytest.raises(SettingError if mine else CollectiveMismatchError, match="bool"):
        lite.agree("x" if mine else True)
    with pytest.raises(CollectiveMismatchError, match="how='all'. on rank 0 meets how='any' on rank 1"):
        lite.agree(True, "any" if mine else "all")


def collectives_on_rank_zero_alone_are_refused(lite: Any) -> None:
    """What every rank must call raises in a function that rank 0 runs alone."""

    @rank_zero_only
    def report() -> None:
        lite.all_reduce(1.0)

    if not lite.is_global_zero:
        report()
        return
    with pytest.raises(OrderError, match=r"all_reduce\(\) in .*report\(\), which runs on rank 0 alone"):
        report()


def tensors_are_padded_and_items_split(lite: Any) -> None:
    """To the largest size of any rank, in one dimension; each rank gets its part."""
    rank = lite.global_rank
    x = torch.full((2, 1 + rank), float(rank))
    padded = lite.pad_across_processes([x, x], dim=1, pad_index=-1, pad_first=True)
    assert lite.all_gather(padded[1])[0].tolist() == [[-1.0, 0.0]] * 2
    with lite.split_between_processes([0, 1, 2]) as mine:
        assert mine == [[0, 1], [2]][rank]
    with pytest.raises(CollectiveMismatchError, match="another structure"):
        lite.pad_across_processes(x if rank else x[0])


def scikit_learn_computes_as_in_one_process(lite: Any) -> None:
    """scikit-learn gets what one process gives it."""
    metrics = importlib.import_module("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(37, generator=generator), torch.randint(0, 2, (37,), generator=generator)
    loader = lite.setup_dataloaders(DataLoader(list(zip(scores, labels, strict=True)), batch_size=4))
    found: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for batch in loader:
            for into, part in zip(found, lite.gather_for_metrics(tuple(batch)), strict=True):
                into.append(part)
    assert torch.equal(torch.cat(found[1]), labels)
    area = metrics.roc_auc_score(torch.cat(found[1]), torch.cat(found[0]))
    assert area == metrics.roc_auc_score(labels, scores)


def torchmetrics_computes_as_in_one_process(lite: Any) -> None:
    """A metric of torchmetrics that gathers nothing by itself."""
    torchmetrics = importlib.import_module("torchmetrics")
    metric = torchmetrics.MeanMetric(sync_on_compute=False)
    with torch.no_grad():
        for x in lite.setup_dataloaders(DataLoader(column(7), batch_size=2)):
            metric.update(lite.gather_for_metrics(x))
    assert metric.compute().item() == 3.0


CHECKS = [
    every_sample_comes_once_and_in_order,
    values_keep_their_structure_and_type,
    some_batches_may_be_gathered,
    means_are_weighted,
    running_totals_are_refused,
    tensors_are_padded_and_items_split,
    collectives_on_rank_zero_alone_are_refused,
    decisions_are_those_of_all_ranks,
    scikit_learn_computes_as_in_one_process,
    *([torchmetrics_computes_as_in_one_process] if importlib.util.find_spec("torchmetrics") else []),
    calls_without_a_known_batch_are_refused,
]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return run_checks(2, ranks, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_metrics_of_two_ranks(check: Callable[..., None], results: dict[str, str]) -> None:
    assert not results[check.__name__], results[check.__name__]


def test_ranks_that_read_the_same_samples_count_as_one() -> None:
    """Under strategies that share batches between ranks, the first rank of each data shard is taken."""
    headers = [{"index": rank // 2, "rows": 2, "start": rank // 2, "step": 2} for rank in range(4)]
    assert _order(headers) == [(0, 0, 0), (1, 0, 2), (2, 1, 0), (3, 1, 2)]
