"""Train a small GPT on Python code in plain torch: one process, on the CPU. Compare with train_lite.py."""

from __future__ import annotations

import argparse
from itertools import chain, repeat
from math import cos, pi
from pathlib import Path

import torch
from model import GPT
from text import ALPHABET, SourceCode, decode, encode, plot_losses
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)

    train_text = SourceCode(block=args.block, validation=False)
    validation_text = SourceCode(block=args.block, validation=True)
    batch_size = args.batch_size // args.accumulate
    train_loader = DataLoader(train_text, batch_size=batch_size, shuffle=True, drop_last=True)
    validation_loader = DataLoader(validation_text, batch_size=64)

    model = GPT(alphabet=len(ALPHABET), block=args.block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, args.warm_up, args.steps))

    start_step = 0
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        start_step = state["step"]

    training, validation = [], {start_step: validate(model, validation_loader)}
    print(f"step {start_step:3d}: validation loss {validation[start_step]:.3f}")
    batches = chain.from_iterable(repeat(train_loader))  # endless: epoch after epoch
    for step in range(start_step + 1, args.steps + 1):
        step_loss = 0.0
        optimizer.zero_grad()
        for _ in range(args.accumulate):
            text, targets = next(batches)
            loss = next_character_loss(model, text, targets) / args.accumulate
            loss.backward()
            step_loss += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        training.append(step_loss)

        if step % args.validate_every == 0 or step == args.steps:
            validation[step] = validate(model, validation_loader)
            print(f"step {step:3d}: validation loss {validation[step]:.3f}, training {training[-1]:.3f}")
            if args.checkpoint:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "rng": torch.get_rng_state(),
                    "step": step,
                }
                torch.save(state, args.checkpoint)

    print(decode(model.generate(encode("def ").unsqueeze(0), length=args.sample)[0]))
    if args.plot:
        plot_losses(args.plot, training, validation)


def next_character_loss(model: nn.Module, text: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of the next character, in nats."""
    return cross_entropy(model(text).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss over the loader."""
    model.eval()
    total, count = 0.0, 0
    for text, targets in loader:
        total += next_character_loss(model, text, targets).item() * len(text)
        count += len(text)
    model.train()
    return total / count


def warm_up_then_cosine(step: int, warm_up: int, steps: int) -> float:
    """Return the learning rate factor: linear warm-up from 0, then cosine decay to 0.05."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.05 + 0.95 * (1 + cos(pi * (step - warm_up) / max(steps - warm_up, 1))) / 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step")
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes per step")
    parser.add_argument("--block", type=int, default=64, help="characters per sample")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--warm-up", type=int, default=30, help="steps of learning rate warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=int, default=50, help="steps between validations")
    parser.add_argument("--sample", type=int, default=300, help="characters to generate at the end")
    parser.add_argument("--checkpoint", type=Path, help="save here at every validation, and resume from here")
    parser.add_argument("--plot", type=Path, default=Path("losses.png"), help="plot the losses here")
    main(parser.parse_args())
