"""The example of Accelerate: prepare everything, gather for metrics, a scheduler."""

# ranks: 2
import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

EVAL_BATCH_SIZE = 4


def get_dataloaders(accelerator: Accelerator, batch_size: int):
    x = torch.sin(torch.arange(88.0)).view(22, 4)
    dataset = TensorDataset(x, x[:, :3].argmax(1))
    with accelerator.main_process_first():
        train = torch.utils.data.Subset(dataset, range(16))
    train_dataloader = DataLoader(train, shuffle=False, batch_size=batch_size)
    eval_dataloader = DataLoader(dataset, shuffle=False, batch_size=EVAL_BATCH_SIZE)
    return train_dataloader, eval_dataloader


def training_function(config, args):
    # Initialize accelerator
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    lr = config["lr"]
    num_epochs = int(config["num_epochs"])
    set_seed(int(config["seed"]))
    train_dataloader, eval_dataloader = get_dataloaders(accelerator, 8 // accelerator.num_processes)
    model = nn.Linear(4, 3)
    model = model.to(accelerator.device)
    optimizer = AdamW(params=model.parameters(), lr=lr)
    lr_scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))

    # Prepare everything
    # There is no specific order to remember, we just need to unpack the objects in the same order we gave them.
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    # Now we train the model
    for epoch in range(num_epochs):
        model.train()
        for step, batch in enumerate(train_dataloader):
            features, labels = batch
            outputs = model(features)
            loss = nn.functional.cross_entropy(outputs, labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

        model.eval()
        correct = count = 0
        for step, (features, labels) in enumerate(eval_dataloader):
            with torch.no_grad():
                predictions = model(features).argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, labels))
            correct += (predictions == references).sum().item()
            count += len(references)
        # Use accelerator.print to print only on the main process.
        accelerator.print(f"epoch {epoch}:", correct / count, count)
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Simple example of training script.")
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--cpu", action="store_true", default=True)
    training_function({"lr": 5e-2, "num_epochs": 2, "seed": 42}, parser.parse_args([]))
