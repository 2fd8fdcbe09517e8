"""Options of collectives over ``torch.distributed``."""

from __future__ import annotations

from plugframe import Option

OPTIONS = (
    Option("backend", str, None, "A backend of torch.distributed, or one by device: cpu:gloo,cuda:nccl."),
    Option("timeout_s", float, None, "Seconds an exchange may take; unset: --timeout, else 1800.", above=0),
)
