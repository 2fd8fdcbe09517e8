"""Options of collectives over ``torch.distributed``."""

from __future__ import annotations

from plugframe import Option

OPTIONS = (
    Option("backend", str, None, "A torch.distributed backend, or one per device type: cpu:gloo,cuda:nccl."),
    Option("timeout_s", float, None, "Timeout of a collective in seconds; unset: --timeout, else 1800.", above=0),
)
