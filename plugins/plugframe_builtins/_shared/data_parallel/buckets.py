"""Gradient buckets: flat buffers that are all-reduced, and the assignment of parameters to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.errors import UnsupportedError
from plugframe_builtins._shared.data_parallel.settings_digest import SLOTS, SettingsDigest

MIB = 1 << 20
#: The first bucket is smaller, as torch's is, so that communication starts early.
_FIRST_BYTES = MIB
DEFAULT_MIB = 25

#: Number of elements above which a pass over a gradient costs more than a call.
_LARGE = 4096

#: All-reduces the flat buffer of its first argument, a bucket; returns a work handle.
Send = Callable[["Bucket"], Any]


class Bucket:
    """Gradients of parameters of one dtype and device, and a flag per parameter, in one flat buffer.

    Attributes:
        parameters: those with gradients in the bucket.
        flat: gradients in logical order, then a flag per parameter; None until the first use.
        waiting: parameters without a gradient yet in the running backward.
        work: handle of the all-reduce, None before it starts.
        early: whether to send as soon as all gradients are there, rather than at the end of the backward.
        settings_digest: writes and reads the slots at the end of the buffer, or None.
        values: view of the gradients.
        flags: view of the flags, 1 for a parameter with a gradient; after the all-reduce, the mean over the ranks.
        slots: view of the slots for `settings_digest`.
    """

    settings_digest: SettingsDigest | None = None
    values: Tensor
    flags: Tensor
    slots: Tensor

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], number: int) -> None:
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self.number = number
        self.last = False
        self.flat: Tensor | None = None
        self.waiting = len(parameters)
        self.work: Any = None
        self.early = False
        self._sizes = [_numel(parameter) for parameter in self.parameters]
        self.numel = sum(self._sizes)
        # Views are made once: slicing at every step costs more than using the slices.
        self._views: list[Tensor] = []
        self._shaped: list[Tensor] = []
        self._missing: list[int] = []
        self._one_pass = False

    def begin(self) -> None:
        """Reset for a backward."""
        self.waiting, self.work = len(self.parameters), None

    def fill(self, factor: float) -> Tensor:
        """Copy the gradients, multiplied by `factor`, into the buffer, with zeros for missing ones.

        Raises:
            UnsupportedError: for a sparse gradient of a parameter that is not an embedding's.
        """
        flat = self.buffer
        views, gradients, self._missing = [], [], []
        for index, (parameter, view) in enumerate(zip(self.parameters, self._shaped, strict=True)):
            gradient = parameter.grad
            if gradient is None:
                self._missing.append(index)
                view.zero_()
            elif gradient.layout is not torch.strided:
                raise UnsupportedError(
                    f"Parameter {self.names[index]!r} got a sparse gradient, which strategy 'ddp' averages "
                    "for nn.Embedding(sparse=True) and nn.EmbeddingBag(sparse=True) alone: use one, or sparse=False."
                )
            else:
                views.append(view)
                gradients.append(gradient)
        if self._one_pass:
            for view, gradient in zip(views, gradients, strict=True):
                torch.mul(gradient, factor, out=view)
        else:
            self._copy(views, gradients)
            self.values.mul_(factor)
        self.flags.fill_(factor)
        if self._missing:
            self.flags[self._missing] = 0
        if self.settings_digest is not None:
            self.settings_digest.put(self.slots)
        return flat

    @staticmethod
    def _copy(views: list[Tensor], gradients: list[Tensor]) -> None:
        pairs = [(v, g) for v, g in zip(views, gradients, strict=True) if v.data_ptr() != g.data_ptr()]
        if pairs:
            targets, sources = zip(*pairs, strict=True)
            # Undocumented, but torch's own optimizers and FSDP2 copy with it (torch 2.13).
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]

    def write_back(self, *, as_views: bool) -> None:
        """Set gradients from the buffer; a parameter without a gradient on any rank keeps None."""
        # Reading flags synchronises with the device, so only ranks with a missing gradient do.
        used = self.flags.tolist() if self._missing else ()
        missing = {index for index in self._missing if not used[index]}
        targets, sources = [], []
        for index, (parameter, value) in enumerate(zip(self.parameters, self._shaped, strict=True)):
            if index in missing:
                continue
            gradient = parameter.grad
            if gradient is None:
                parameter.grad = value.view_as(value) if as_views else value.clone()
            elif as_views and not gradient.requires_grad:
                parameter.grad = value.view_as(value)
            else:
                targets.append(gradient)
                sources.append(value)
        if targets:
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]

    def gradients(self) -> list[Tensor]:
        """Return views of the buffer in the parameters' shapes, with at least one dimension."""
        pairs = zip(self._views, self.parameters, strict=True)
        return [view.view(parameter.shape) if parameter.dim() else view for view, parameter in pairs]

    @property
    def buffer(self) -> Tensor:
        """The flat buffer: gradients, then flags."""
        if self.flat is None:
            first = _real(self.parameters[0].detach())
            tail = [len(self.parameters), 0 if self.settings_digest is None else SLOTS]
            self.flat = torch.zeros(self.numel + sum(tail), dtype=first.dtype, device=first.device)
            self.values = self.flat[: self.numel]
            # On a CPU a pass over memory costs more than a call per parameter, unless they are tiny.
            self._one_pass = first.device.type == "cpu" and self.numel >= _LARGE * len(self.parameters)
            self.flags, self.slots = torch.split(self.flat[self.numel :], tail)
            self._views = list(torch.split(self.values, self._sizes))
            self._shaped = [_like(view, p) for view, p in zip(self._views, self.parameters, strict=True)]
        return self.flat


def make_buckets(parameters: Sequence[tuple[str, nn.Parameter]], cap_bytes: float) -> list[Bucket]:
    """Assign parameters, given in model order, to buckets in reverse order, that of their gradients.

    Args:
        cap_bytes: size of a full bucket; the first is smaller.
    """
    buckets: list[Bucket] = []
    open_: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    sizes: dict[Any, int] = {}

    def close(kind: Any) -> None:
        buckets.append(Bucket(open_.pop(kind), len(buckets)))
        sizes.pop(kind)

    for name, parameter in reversed(parameters):
        kind = (parameter.dtype, parameter.device)
        open_.setdefault(kind, []).append((name, parameter))
        sizes[kind] = sizes.get(kind, 0) + parameter.numel() * parameter.element_size()
        if sizes[kind] >= (cap_bytes if buckets else min(cap_bytes, _FIRST_BYTES)):
            close(kind)
    for kind in list(open_):
        close(kind)
    if buckets:
        buckets[-1].last = True
    return buckets


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _numel(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _like(view: Tensor, parameter: Tensor) -> Tensor:
    """Return a piece of the buffer in the parameter's shape and layout."""
    if parameter.is_complex():
        return torch.view_as_complex(view.view(*parameter.shape, 2))
    return view.view(parameter.shape)
