"""The accelerator contract: a device type and its properties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import provider

if TYPE_CHECKING:
    import torch

    from plugframe.hooks.context import Context


class AcceleratorSpec(Protocol):
    """Hooks of the kind ``accelerator``. The first four are called before the ranks are launched."""

    @provider
    def accelerator_is_available(self) -> bool:
        """Return whether this machine has a usable device of this type.

        Called while the plan is made, in any process, before launching. It must not initialise the device
        (a CUDA context in the parent would break forked ranks).

        Raises:
            Exception: anything raised counts as "not available"; under ``auto`` the reason is a warning.

        Example:
            ``return torch.cuda.is_available()``
        """
        ...

    @provider
    def accelerator_device_count(self) -> int:
        """Return the number of devices that ``devices="auto"`` and ``-1`` select on this machine, at least 1.

        Called while the plan is made, only if `accelerator_is_available`.

        Example:
            ``return torch.cuda.device_count()``
        """
        ...

    @provider
    def accelerator_parse_devices(self, devices: int | str | Sequence[int]) -> tuple[int, ...]:
        """Parse the ``devices`` setting into device indices, one for each rank of this node.

        Called while the plan is made. `devices` is a count (``2``, ``"2"``), ``-1`` or ``"auto"`` for all,
        a list of indices (``[0, 2]``) or such a list as a string (``"0,2"``, ``"1,"``).

        Returns:
            The index of local rank 0, 1, …: ``(0, 1)`` for ``2``.

        Raises:
            SettingError: for any other value; names the value and the allowed ones.

        Example:
            ``parse_devices(devices, count=torch.cuda.device_count(), name="cuda")`` from `plugframe.base`.
        """
        ...

    @provider
    def accelerator_device(self, index: int) -> torch.device:
        """Return the device with that index (an element of the result of `accelerator_parse_devices`).

        Called on every rank before `accelerator_setup`, and whenever ``lite.device`` is first read.

        Example:
            ``return torch.device("cuda", index)``
        """
        ...

    @provider
    def accelerator_setup(self, context: Context) -> None:
        """Make ``context.device`` this process's current device.

        Called once on every rank, before every other plugin's set-up.

        Example:
            ``torch.cuda.set_device(context.device)``
        """
        ...

    @provider
    def accelerator_teardown(self) -> None:
        """Undo `accelerator_setup`. Called once on every rank, after every other plugin's tear-down."""
        ...

    @provider
    def accelerator_autocast_type(self) -> str:
        """Return the device type that ``torch.autocast`` and ``torch.amp.GradScaler`` take.

        Called on every rank by precision plugins at set-up.

        Example:
            ``return "cuda"``
        """
        ...

    @provider
    def accelerator_collective_backend(self) -> str:
        """Return the ``torch.distributed`` backend for tensors on this device, with a CPU one for objects.

        Called on every rank by the collective plugin at set-up, before the process group exists.

        Example:
            ``return "cpu:gloo,cuda:nccl"``
        """
        ...

    @provider
    def accelerator_supports_dtype(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether this device computes in `dtype` natively rather than by slow emulation.

        Called on every rank by precision plugins at set-up; False refuses the precision.

        Example:
            ``return dtype is not torch.float64`` for a device without double precision.
        """
        ...

    @provider
    def accelerator_move_batch(self, batch: Any, device: torch.device) -> Any:
        """Return `batch` (any nesting of dict, list, tuple, dataclass, namedtuple) with its tensors on `device`.

        Called on every rank for every batch of a loader set up with ``move_to_device=True``: it is in the hot
        path. Return `batch` itself where nothing has to move. Copy without blocking from pinned memory.
        """
        ...

    @provider
    def accelerator_seed(self, seed: int) -> None:
        """Seed this device's generators. Called on every rank by ``seed_everything``, after torch's CPU, Python's and
        NumPy's generators were seeded."""
        ...

    @provider
    def accelerator_rng_state(self, device: torch.device) -> torch.Tensor | None:
        """Return the state of the device's default generator (a CPU uint8 tensor), None if it has none of its own.

        Called on every rank while saving.
        """
        ...

    @provider
    def accelerator_set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Restore the result of `accelerator_rng_state`. Called on every rank while loading."""
        ...

    @provider
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        """Return memory statistics in bytes, with at least ``allocated_bytes`` and ``peak_allocated_bytes``.

        Called on request of the user or an extension, on that rank only.
        """
        ...

    @provider
    def accelerator_synchronize(self, device: torch.device) -> None:
        """Wait until the device has finished all queued work. Called by extensions that measure time."""
        ...
