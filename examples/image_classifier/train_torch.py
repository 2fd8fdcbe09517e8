"""Train on handwritten digits in plain torch: one process, on the CPU. Compare with train_lite.py."""

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


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)

    train_data, test_data = digits()
    train_loader = DataLoader(train_data, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_data, batch_size=256)

    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
    scheduler = ExponentialLR(optimizer, gamma=0.85)

    epoch, losses = 0, []
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        epoch, losses = state["epoch"], state["losses"]

    while epoch < args.epochs:
        model.train()
        for images, labels in progress(train_loader, f"epoch {epoch + 1:2d}"):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        epoch += 1

        loss_of_epoch = mean(losses[-len(train_loader) :])
        correct, total = evaluate(model, test_loader)
        print(f"epoch {epoch:2d}: loss {loss_of_epoch:.4f}, test accuracy {100 * correct / total:.1f} %")

        if args.checkpoint:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "epoch": epoch,
                "losses": losses,
            }
            torch.save(state, args.checkpoint)

    correct, total = evaluate(model, test_loader)
    print(f"test accuracy: {100 * correct / total:.1f} %")
    if args.losses:
        write_losses(args.losses, losses)
    if args.plot:
        plot_losses(args.plot, losses)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> tuple[int, int]:
    """Return the number of correctly classified images and the number of images."""
    model.eval()
    correct = total = 0
    for images, labels in loader:
        correct += (model(images).argmax(dim=1) == labels).sum().item()
        total += len(labels)
    return correct, total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per step")
    parser.add_argument("--lr", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="save here after each epoch, and resume from here")
    parser.add_argument("--losses", type=Path, help="write the loss of every step here, as lines of JSON")
    parser.add_argument("--plot", type=Path, default=Path("losses.png"), help="plot the loss of every step here")
    main(parser.parse_args())
