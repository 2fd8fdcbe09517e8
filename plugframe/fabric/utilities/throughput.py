"""Throughput over a moving window: batches, samples, tokens and floating-point operations per second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from plugframe.errors import SettingError

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite


class _Totals(NamedTuple):
    """Totals since the start, at one update."""

    time: float
    batches: int
    samples: int
    lengths: int | None
    flops: float | None


class Throughput:
    """Compute rates from totals that the loop reports; nothing is measured or exchanged between ranks.

    ::

        throughput = Throughput(world_size=lite.world_size)
        throughput.update(time=seconds, batches=i, samples=i * batch_size)  # totals since the start, of this rank
        lite.log_dict(throughput.compute())

    Args:
        available_flops: peak operations per second of one device, for the utilization ``mfu``.
        world_size: number of ranks; rates without ``device/`` are those of one rank times it.
        window_size: number of last updates that rates are computed over.
        separator: between ``device`` and a rate's name.

    Raises:
        SettingError: for a number of ranks below 1, or a window below 2.
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        for name, value, least in (("world_size", world_size, 1), ("window_size", window_size, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"Throughput({name}={value!r}): it is an integer from {least}.")
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._updates: deque[_Totals] = deque(maxlen=window_size)
        self._num_flops = 0.0

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: float | None = None
    ) -> None:
        """Record totals since the start, of this rank; none may fall.

        Args:
            time: seconds.
            batches: number of batches.
            samples: number of samples.
            lengths: number of tokens, or of other items in the samples.
            flops: operations since the last update, of this rank.

        Raises:
            SettingError: for a total that is lower than at the last update, or that was not given in all updates.
        """
        if flops is not None:
            self._num_flops += flops
        new = _Totals(time, batches, samples, lengths, None if flops is None else self._num_flops)
        if self._updates:
            _check_rises(self._updates[-1], new)
        self._updates.append(new)

    def compute(self) -> dict[str, float]:
        """Return the totals and, from the second update on, the rates: ``{"samples_per_sec": 812.3, …}``."""
        if not self._updates:
            return {}
        first, last = self._updates[0], self._updates[-1]
        found: dict[str, float] = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            found["lengths"] = last.lengths
        seconds = last.time - first.time
        if len(self._updates) < 2 or seconds <= 0:
            return found
        rates = {"batches": last.batches - first.batches, "samples": last.samples - first.samples}
        if last.lengths is not None and first.lengths is not None:
            rates["items"] = last.lengths - first.lengths
        for name, number in rates.items():
            self._add(found, f"{name}_per_sec", number / seconds)
        if last.flops is not None and first.flops is not None:
            per_second = (last.flops - first.flops) / seconds
            self._add(found, "flops_per_sec", per_second)
            if self.available_flops:
                found[f"device{self.separator}mfu"] = per_second / self.available_flops
        return found

    def reset(self) -> None:
        """Forget all updates."""
        self._updates.clear()
        self._num_flops = 0.0

    def _add(self, found: dict[str, float], name: str, rate: float) -> None:
        found[f"device{self.separator}{name}"] = rate
        found[name] = rate * self.world_size


class ThroughputMonitor(Throughput):
    """`Throughput` of a `Lite`: its number of ranks, and rates logged by its loggers.

    Args:
        fabric: the `Lite`.
        options: those of `Throughput`.
    """

    def __init__(self, fabric: Lite, **options: Any) -> None:
        super().__init__(**{"world_size": fabric.world_size, **options})
        self._lite = fabric
        self._num_logged = 0

    def compute_and_log(self, step: int | None = None, **options: Any) -> dict[str, float]:
        """Compute the rates, log them, and return them.

        Args:
            step: the training step; without one, calls are counted.
            options: those of `Throughput.compute`.
        """
        self._num_logged += step is None
        metrics = self.compute(**options)
        self._lite.log_dict(metrics, step=self._num_logged - 1 if step is None else step)
        return metrics


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None
) -> int:
    """Return the number of floating-point operations of a forward, and of a backward if there is a loss.

    Build the model on the meta device first to count without computing: ``with torch.device("meta"): ...``.

    Args:
        model: counted operations are those of anything that runs, this model's among them.
        forward_fn: runs the forward and returns the output.
        loss_fn: returns the loss of an output; None counts the forward alone.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def _check_rises(before: _Totals, new: _Totals) -> None:
    for name, old, value in zip(_Totals._fields, before, new, strict=True):
        if (old is None) != (value is None):
            raise SettingError(f"Throughput.update({name}=…): give it in all updates, or in none.")
        if old is not None and value is not None and value < old:
            raise SettingError(
                f"Throughput.update({name}={value!r}): it is a total since the start, and was {old!r} before."
            )
