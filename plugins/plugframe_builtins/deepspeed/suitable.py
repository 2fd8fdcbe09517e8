"""Refuse models and optimizers that DeepSpeed cannot train, at set-up on all ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Adagrad, Optimizer

from plugframe.errors import UnsupportedError
from plugframe_builtins.deepspeed.fragments import extent
from plugframe_builtins.deepspeed.guard import refused_hook
from plugframe_builtins.deepspeed.trial import check_elementwise


def check_parameters(module: nn.Module, stage: int) -> None:
    """Raise if DeepSpeed does not support a parameter's dtype, size, hooks or gradients.

    Raises:
        UnsupportedError: naming a parameter.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for name, parameter in trained:
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            instead = "leave out the .half() or .double()"
            raise UnsupportedError(
                f"This {type(module).__name__} has parameters of {parameter.dtype}, which DeepSpeed does not train "
                f"({name!r}): {'use strategy=' + repr('ddp') if parameter.is_complex() else instead}."
            )
    if stage == 0:
        return
    for name, parameter in trained:
        if extent(parameter)[0] == 0:
            raise UnsupportedError(
                f"Parameter {name!r} is empty, and strategy 'deepspeed' (stage {stage}) cannot shard it: freeze it "
                "with requires_grad_(False), make it a buffer, or use strategy='ddp'."
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):  # torch has no public way to read them (2.13)
            raise refused_hook(name, stage)
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad:
            raise UnsupportedError(
                f"{type(part).__name__} {name!r} has sparse=True, and strategy 'deepspeed' (stage {stage}) averages "
                "dense gradients alone: use sparse=False, or strategy='ddp'."
            )
    if stage == 3 and "_orig_mod" in dict(module.named_children()):
        raise UnsupportedError(
            "torch.compile(model) makes a module that strategy 'deepspeed' (stage 3) cannot run: compile the model in "
            "place with model.compile(), or use stage=2."
        )
    dtypes = {parameter.dtype for _, parameter in trained}
    if len(dtypes) > 1:
        raise UnsupportedError(
            f"This {type(module).__name__} trains parameters of {' and '.join(sorted(map(str, dtypes)))}, which "
            "strategy 'deepspeed' would put into one flat tensor: convert them to one dtype before lite.setup()."
        )


def check_optimizer(optimizer: Optimizer, stage: int, num_ranks: int) -> None:
    """Raise if DeepSpeed would not step the optimizer as one process does.

    Raises:
        UnsupportedError: with its class.
    """
    if stage == 0:
        return
    if isinstance(optimizer, Adagrad):
        raise UnsupportedError(
            "DeepSpeed makes an Adagrad of its own in place of the script's, which would lose its groups: use "
            "another optimizer, or stage=0."
        )
    check_elementwise(optimizer, num_parts=min(2, num_ranks), apart=stage == 3)
