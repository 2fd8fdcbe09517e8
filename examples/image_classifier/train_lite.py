"""Train on handwritten digits with plugframe: any device, any number of processes, the losses of one process."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch
from digits import convnet, digits, plot_losses, progress, write_losses
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from plugframe import Lite


def main(args: argparse.Namespace) -> None:
    lite = Lite()
    lite.launch()  # starts the processes under plain python; does nothing if they already run
    lite.seed_everything(args.seed)

    train_data, test_data = digits()
    train_loader = DataLoader(train_data, batch_size=args.batch_size // lite.world_size, shuffle=True)
    test_loader = DataLoader(test_data, batch_size=256)
    train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)

    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
    model, optimizer = lite.setup(model, optimizer)
    scheduler = ExponentialLR(optimizer, gamma=0.85)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0, "losses": []}
    if args.checkpoint and args.checkpoint.exists():
        lite.load(args.checkpoint, state)
    epoch, losses = state["epoch"], state["losses"]

    while epoch < args.epochs:
        model.train()
        epoch_losses = []
        for images, labels in progress(train_loader, f"epoch {epoch + 1:2d}", show=lite.is_global_zero):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            lite.backward(loss)
            optimizer.step()
            epoch_losses.append(loss.item() * lite.batch_weight)
        scheduler.step()
        epoch += 1

        losses += lite.all_reduce(torch.tensor(epoch_losses, device=lite.device), reduce_op="mean").tolist()
        loss_of_epoch = mean(losses[-len(train_loader) :])
        correct, total = evaluate(lite, model, test_loader)
        lite.print(f"epoch {epoch:2d}: loss {loss_of_epoch:.4f}, test accuracy {100 * correct / total:.1f} %")

        if args.checkpoint:
            lite.save(args.checkpoint, {**state, "epoch": epoch, "losses": losses})

    correct, total = evaluate(lite, model, test_loader)
    lite.print(f"test accuracy: {100 * correct / total:.1f} %")
    if args.losses and lite.is_global_zero:
        write_losses(args.losses, losses)
    if args.plot and lite.is_global_zero:
        plot_losses(args.plot, losses)


@torch.no_grad()
def evaluate(lite: Lite, model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> tuple[int, int]:
    """Return the number of correctly classified images and the number of images."""
    model.eval()
    correct = total = 0
    for images, labels in loader:
        correct += (model(images).argmax(dim=1) == labels).sum().item()
        total += len(labels)
    correct, total = lite.all_reduce((correct, total), reduce_op="sum")
    return int(correct), int(total)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step, over all processes")
    parser.add_argument("--lr", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="save here after each epoch, and resume from here")
    parser.add_argument("--losses", type=Path, help="write the loss of every step here, as lines of JSON")
    parser.add_argument("--plot", type=Path, default=Path("losses.png"), help="plot the loss of every step here")
    main(parser.parse_args())
