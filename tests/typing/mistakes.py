"""What a user must not write is an error for mypy and pyright: every line with a comment; checked, never run.

Both checkers report a comment in whose line they find no error.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

from plugframe import Lite, seed_everything


def settings() -> None:
    Lite(accelerator=3)  # type: ignore[arg-type]
    Lite("cuda", "ddp", 2, 1, 16, (), {"data": 2})  # type: ignore[call-arg]
    Lite(strategy=None)  # type: ignore[arg-type]
    Lite(stratgy="ddp")  # type: ignore[call-arg]
    Lite(devices=1.5)  # type: ignore[arg-type]
    Lite(num_nodes="2")  # type: ignore[arg-type]
    Lite(precision=nn.Linear(1, 1))  # type: ignore[arg-type]
    Lite(loggers=3)  # type: ignore[arg-type]
    Lite(timeout_s="60")  # type: ignore[arg-type]


def seeds(lite: Lite) -> None:
    seed_everything(sed=1)  # type: ignore[call-arg]
    lite.seed_everything(1.5)  # type: ignore[arg-type]
    Lite.seed_everything(sed=1)  # type: ignore[call-arg]


def set_up(lite: Lite, net: nn.Linear, sgd: SGD, steps: StepLR, data: Dataset[int], loader: DataLoader[int]) -> None:
    lite.setup(sgd, net)  # type: ignore[call-overload]
    lite.setup(net, steps)  # type: ignore[call-overload]
    lite.setup(net, sgd, steps)  # type: ignore[call-overload]
    lite.setup(net, sgd, schedulers=steps)  # type: ignore[call-overload]
    lite.setup(net, move_to_device="cuda")  # type: ignore[call-overload]
    lite.setup_module(sgd)  # type: ignore[type-var]
    lite.setup_optimizers(net)  # type: ignore[call-overload]
    lite.setup_optimizers()  # type: ignore[call-overload]
    lite.setup_dataloaders(data)  # type: ignore[call-overload]
    lite.setup_dataloaders(loader, data)  # type: ignore[call-overload]
    lite.setup(net, sgd).train()  # type: ignore[attr-defined]
    _model, _optimizer, _scheduler = lite.setup(net, sgd)  # type: ignore[misc]


def step(lite: Lite, net: nn.Linear, sgd: SGD, loss: Tensor) -> None:
    lite.backward(3.0)  # type: ignore[arg-type]
    lite.backward(loss, reduction="max")  # type: ignore[arg-type]
    lite.backward(loss, retain=True)  # type: ignore[call-arg]
    lite.clip_gradients(net, max_norm=1.0)  # type: ignore[call-arg]
    lite.clip_gradients(sgd, net, max_norm=1.0)  # type: ignore[arg-type]
    lite.no_backward_sync(sgd)  # type: ignore[arg-type]


def collectives(lite: Lite, loss: Tensor) -> None:
    lite.all_reduce(loss, "sum")  # type: ignore[call-overload]
    lite.all_reduce("loss")  # type: ignore[call-overload]
    lite.all_reduce(loss, reduce_op=3)  # type: ignore[call-overload]
    lite.all_gather(loss, timeout=60)  # type: ignore[call-overload]
    lite.all_gather(2.5).append(1)  # type: ignore[attr-defined]
    print(lite.broadcast(3).shape)  # type: ignore[attr-defined]
    lite.barrier(60)  # type: ignore[arg-type]
    lite.assert_in_sync("net")  # type: ignore[arg-type]
    print(lite.autocast().device)  # type: ignore[attr-defined]


def state(lite: Lite, net: nn.Linear) -> None:
    lite.save(3, 4)  # type: ignore[call-overload]
    lite.save("last.ckpt")  # type: ignore[call-overload]
    lite.save("last.ckpt", net)  # type: ignore[call-overload]
    lite.save("a.ckpt", "b.ckpt")  # type: ignore[call-overload]
    lite.load(3)  # type: ignore[arg-type]
    lite.load("last.ckpt", net)  # type: ignore[arg-type]
    lite.load_raw("last.ckpt", {"model": net})  # type: ignore[arg-type]
    lite.state_dict({"model": net})  # type: ignore[arg-type]
    lite.checkpoints("runs", keep_best=("loss", "low", 1))  # type: ignore[arg-type]
    lite.checkpoints(keep_last=2)  # type: ignore[call-arg]


def train(lite: Lite, epochs: int) -> float:
    return epochs / 2


def job(lite: Lite, loss: Tensor) -> None:
    lite.launch(train)  # type: ignore[call-overload]
    lite.launch(train, "3")  # type: ignore[call-overload]
    lite.launch(train(lite, 3))  # type: ignore[call-overload]
    print(lite.launch(train, 3).shape)  # type: ignore[attr-defined]
    lite.log("loss", "high")  # type: ignore[arg-type]
    lite.log_dict(loss)  # type: ignore[arg-type]
    lite.print("a", color="red")  # type: ignore[call-arg]
    lite.fit(3)  # type: ignore[attr-defined]
