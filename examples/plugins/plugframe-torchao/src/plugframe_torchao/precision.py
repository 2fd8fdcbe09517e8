"""The precisions: what torchao makes of linear layers, at set-up and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig

from plugframe.base import Precision
from plugframe.errors import UnsupportedError
from plugframe.hooks import hookimpl


class _Torchao(Precision):
    """Convert the linear layers whose sizes fit.

    Args:
        skip: words; a linear layer whose name contains one is left alone.
    """

    multiple = 1

    def __init__(self, *, skip: Sequence[str] = ()) -> None:
        self.skip = tuple(skip)

    def fits(self, module: nn.Module, name: str) -> bool:
        """Return whether a submodule is to be converted."""
        if type(module) is not nn.Linear or any(word in name for word in self.skip):
            return False
        return module.in_features % self.multiple == 0 and module.out_features % self.out_multiple == 0

    @property
    def out_multiple(self) -> int:
        """What the number of outputs must be a multiple of."""
        return self.multiple

    def convert(self, module: nn.Module) -> None:
        """Convert the layers for which `fits` is True, in place."""
        raise NotImplementedError

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        if not any(self.fits(part, name) for name, part in module.named_modules()):
            raise UnsupportedError(
                f"precision={self.context.names['precision']!r} finds no linear layer in {type(module).__name__} to "
                f"convert: sizes must be multiples of {self.multiple}, and skip={list(self.skip)} leaves out its names."
            )
        self.convert(module)
        return module


class Float8(_Torchao):
    """Linear layers in fp8 with a scale per tensor, forward and backward; parameters stay in their dtype."""

    multiple = 16  # of torch._scaled_mm

    def convert(self, module: nn.Module) -> None:
        emulate = not (self.context.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9))
        convert_to_float8_training(
            module, config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True), module_filter_fn=self.fits
        )


class Int8Mixed(_Torchao):
    """Linear layers multiply in int8 with a scale per row, forward and backward; weights stay in their dtype."""

    multiple = 16

    def convert(self, module: nn.Module) -> None:
        # Modules are swapped: torchao 0.18 also offers a subclass of Tensor, and multiplies it in float32.
        quantize_(module, Int8MixedPrecisionTrainingConfig(module_swap=True), filter_fn=self.fits)


class QuantizationAware(_Torchao):
    """Linear layers round weights and activations as their integer form will; `lite.finalize` returns that form.

    Args:
        bits: bits of the weights, 4 or 8.
        group_size: weights that share a scale.
        skip: words; a linear layer whose name contains one is left alone.
    """

    def __init__(self, *, bits: int = 8, group_size: int = 32, skip: Sequence[str] = ()) -> None:
        super().__init__(skip=skip)
        self.multiple = group_size
        dtype = {4: torch.int4, 8: torch.int8}[bits]
        self.config: Any = Int8DynamicActivationIntxWeightConfig(dtype, weight_granularity=PerGroup(group_size))

    @property
    def out_multiple(self) -> int:
        return 1  # groups divide the inputs

    def convert(self, module: nn.Module) -> None:
        quantize_(module, QATConfig(self.config, step="prepare"), filter_fn=self.fits)

    @hookimpl
    def precision_finalize(self, module: nn.Module) -> nn.Module:
        quantize_(module, QATConfig(self.config, step="convert"))
        return module
