"""What `Lite` returns keeps the user's own types: checked by mypy and pyright, never run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from typing_extensions import assert_type

from plugframe import CheckpointManager, Context, Lite, Plan, SaveHandle, World, seed_everything
from plugframe.base import Strategy


class Net(nn.Module):
    width = 3


class Images(DataLoader[tuple[Tensor, ...]]):
    size = 28


class Losses(NamedTuple):
    fit: Tensor
    penalty: Tensor


@dataclass
class Outputs:
    logits: Tensor


def modules_and_optimizers(lite: Lite, net: Net, adamw: AdamW, sgd: SGD, adam: Adam, steps: StepLR) -> None:
    assert_type(lite.setup(net), Net)
    assert_type(lite.setup(module=net), Net)
    assert_type(lite.setup(net, move_to_device=False, forward_methods=("training_step", net.forward)), Net)
    assert_type(lite.setup(net, adamw), tuple[Net, AdamW])
    assert_type(lite.setup(net, adamw, sgd), tuple[Net, AdamW, SGD])
    assert_type(lite.setup(net, adamw, sgd, adam), tuple[Net, AdamW, SGD, Adam])
    assert_type(lite.setup(net, adamw, sgd, adam, sgd), tuple[Net, AdamW, SGD, Adam, SGD])
    assert_type(lite.setup(net, scheduler=steps), tuple[Net, StepLR])
    assert_type(lite.setup(net, adamw, scheduler=steps), tuple[Net, AdamW, StepLR])
    assert_type(lite.setup(net, adamw, sgd, scheduler=steps), tuple[Net, AdamW, SGD, StepLR])
    assert_type(lite.setup(net, adamw, sgd, adam, scheduler=steps), tuple[Net, AdamW, SGD, Adam, StepLR])
    net, adamw = lite.setup(net, adamw)
    net, adamw, steps = lite.setup(net, adamw, scheduler=steps)
    assert_type(net.width, int)


def made() -> tuple[Net, SGD]:
    net = Net()
    return net, SGD(net.parameters(), lr=0.1)


def unpacked(lite: Lite, net: Net, several: list[Optimizer]) -> None:
    assert_type(lite.setup(*made()), tuple[Net, SGD])
    net, *others = lite.setup(net, *several)
    assert_type(others, list[Optimizer])
    for optimizer in lite.setup_optimizers(*several):
        assert_type(optimizer, Optimizer)


def apart(lite: Lite, net: Net, adamw: AdamW, sgd: SGD, adam: Adam) -> None:
    assert_type(lite.setup_module(net), Net)
    assert_type(lite.setup_optimizers(adamw), AdamW)
    assert_type(lite.setup_optimizers(adamw, sgd), tuple[AdamW, SGD])
    assert_type(lite.setup_optimizers(adamw, sgd, adam), tuple[AdamW, SGD, Adam])


def loaders(lite: Lite, images: Images, plain: DataLoader[int], several: list[DataLoader[int]]) -> None:
    assert_type(lite.setup_dataloaders(images), Images)
    assert_type(lite.setup_dataloaders(plain, weigh_uneven=False), DataLoader[int])
    assert_type(lite.setup_dataloaders(plain, plain), list[DataLoader[int]])
    assert_type(lite.setup_dataloaders(images, plain), list[Images | DataLoader[int]])
    train, val = lite.setup_dataloaders(images, images)
    assert_type(train, Images)
    assert_type(val.size, int)
    for loader in lite.setup_dataloaders(*several):
        assert_type(loader, DataLoader[int])


def gathered(
    lite: Lite, loss: Tensor, parameter: nn.Parameter, text: str | None, losses: Losses, mixed: dict[str, object]
) -> None:
    assert_type(lite.all_gather(loss), Tensor)
    assert_type(lite.all_gather(parameter), Tensor)
    assert_type(lite.all_gather(2.5), Tensor)
    assert_type(lite.all_gather(True), Tensor)
    assert_type(lite.all_gather(np.ones(3)), Tensor)
    assert_type(lite.all_gather("host"), list[str])
    assert_type(lite.all_gather(text), list[str | None])
    assert_type(lite.all_gather({"loss": loss}), dict[str, Tensor])
    assert_type(lite.all_gather({"hits": 3}), dict[str, Tensor])
    assert_type(lite.all_gather([1, 2]), list[Tensor])
    assert_type(lite.all_gather((loss, loss)), tuple[Tensor, Tensor])
    assert_type(lite.all_gather(losses), Losses)
    assert_type(lite.all_gather({"a": [loss]}), dict[str, list[Tensor]])
    assert_type(lite.all_gather(Outputs(loss)), Outputs)
    assert_type(lite.all_gather({"name": "host"}, as_object=True), list[dict[str, str]])
    assert_type(lite.all_gather(mixed), Any)


def reduced(lite: Lite, loss: Tensor, losses: Losses, counts: dict[str, int], mixed: dict[str, Tensor | float]) -> None:
    assert_type(lite.all_reduce(loss), Tensor)
    assert_type(lite.all_reduce(loss, reduce_op="sum"), Tensor)
    assert_type(lite.all_reduce(loss, reduce_op=torch.distributed.ReduceOp.SUM), Tensor)
    assert_type(lite.all_reduce(3), Tensor)
    assert_type(lite.all_reduce(np.ones(3)), Tensor)
    assert_type(lite.all_reduce(counts), dict[str, Tensor])
    assert_type(lite.all_reduce(mixed), dict[str, Tensor])
    assert_type(lite.all_reduce([1.0, 2.0]), list[Tensor])
    assert_type(lite.all_reduce([loss, loss]), list[Tensor])
    assert_type(lite.all_reduce((loss, loss)), tuple[Tensor, Tensor])
    assert_type(lite.all_reduce(losses), Losses)
    assert_type(lite.all_reduce({"a": {"b": loss}}), dict[str, dict[str, Tensor]])
    assert_type(lite.all_reduce(Outputs(loss)), Outputs)


def between_ranks(lite: Lite, path: Path | None, state: dict[str, int]) -> None:
    assert_type(lite.broadcast(3), int)
    assert_type(lite.broadcast(path), Path | None)
    assert_type(lite.broadcast(state, src=1, timeout_s=60), dict[str, int])
    with lite.rank_zero_first(local=True) as nothing:
        assert_type(nothing, None)


def contexts(lite: Lite, net: Net) -> Tensor:
    assert_type(lite.no_backward_sync(net), AbstractContextManager[object])
    with lite.init_module(empty_init=True), lite.init_tensor():
        built = Net()
    # No context swallows errors: the function is known to return.
    with lite.autocast(), lite.no_backward_sync(built, enabled=False):
        return torch.zeros(())


def devices(lite: Lite, net: Net, batch: dict[str, Tensor]) -> None:
    assert_type(lite.to_device(net), Net)
    assert_type(lite.to_device(batch), dict[str, Tensor])
    assert_type(lite.device, torch.device)


def state(lite: Lite, net: Net, sgd: SGD, steps: StepLR) -> None:
    state = {"model": net, "optimizer": sgd, "step": 1}
    assert_type(lite.save("last.ckpt", state), SaveHandle | None)
    assert_type(lite.save({"model": net}, Path("last.ckpt"), wait=False), SaveHandle | None)
    lite.save("weights.ckpt", state, filter={"model": lambda name, value: name != "head"})
    assert_type(lite.load("last.ckpt", state), dict[str, Any])
    assert_type(lite.load(Path("last.ckpt")), dict[str, Any])
    assert_type(lite.state_dict(net), dict[str, Any])
    lite.load_raw("net.pt", net)
    lite.load_raw("sgd.pt", sgd)
    lite.load_raw("steps.pt", steps)
    kept = lite.checkpoints("runs/a", keep_best=("loss", "min", 2), every_s=60)
    assert_type(kept, CheckpointManager)
    assert_type(kept.resume(state), bool)
    assert_type(kept.best(), str | None)


def train(lite: Lite, epochs: int, *, rate: float = 0.1) -> float:
    return epochs * rate


class Trainer(Lite):
    def fit(self, epochs: int) -> int:
        return epochs


def fit(trainer: Trainer, epochs: int) -> list[int]:
    return [trainer.fit(epochs)]


def launched(lite: Lite, trainer: Trainer) -> None:
    assert_type(lite.launch(train, 3, rate=0.5), float)
    assert_type(trainer.launch(fit, 3), list[int])
    assert_type(trainer.launch(train, epochs=3), float)
    lite.launch()
    with trainer as entered:
        assert_type(entered, Trainer)


def the_job(lite: Lite, net: Net, loss: Tensor) -> None:
    assert_type(lite.plan, Plan)
    assert_type(lite.seed_everything(1), int)
    assert_type(Lite.seed_everything("1", per_rank=True), int)
    assert_type(seed_everything(1), int)
    assert_type(lite.clip_gradients(net, SGD(net.parameters(), lr=0.1), max_norm=1.0), Tensor | None)
    assert_type(lite.should_stop, bool)
    assert_type(lite.requeue(), bool)
    assert_type(lite.extension("profiler"), Any)
    lite.backward(loss, retain_graph=True, batch=loss, reduction="sum")
    lite.backward(loss, gradient=torch.ones(2))
    lite.log("loss", loss)
    lite.log_dict({"loss": loss, "hits": 3, "rate": np.float32(0.1)}, step=1)
    lite.logger.logger_log(metrics={"loss": 1.0}, step=None)
    lite.call("on_epoch_end", lite, epoch=3)
    lite.print("a", 1, sep="")


def chosen(own: Strategy) -> None:
    Lite(accelerator="cuda", strategy="ddp", devices=[0, 1], precision="bf16-mixed", plugins="profiler")
    Lite(accelerator="acme-chips:chip", strategy=own, devices="auto", precision=16, plugins=["lockstep", own])
    Lite(loggers=["csv", "acme"], callbacks=[print], timeout_s=60, num_nodes=2, checkpoint="dcp", launcher="spawn")


def seen_by_plugins(context: Context) -> None:
    assert_type(context.world, World)
    assert_type(context.world.world_size, int)
