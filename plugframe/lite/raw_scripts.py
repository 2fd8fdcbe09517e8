"""What a script written for raw ``torch.distributed`` or ``torch.amp`` leaves behind: kept and told, or refused."""

from __future__ import annotations

import gc
import itertools
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import grad_scaler
from torch.utils.data import DataLoader, DistributedSampler

from plugframe.errors import EnvironmentMismatchError, OrderError, SettingError
from plugframe.hooks.context import Context
from plugframe.utils.logging import tell, warn_caller

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

#: Frames between a scaler's call of ``optimizer.step`` and the check: those of a scheduler and a profiler, at most.
_MAX_FRAMES = 6
#: Calls of torch that shard a module, by the class that they make it.
_SHARDING = {"FSDPModule": "fully_shard()", "FullyShardedDataParallel": "FullyShardedDataParallel()"}
#: Nodes of a graph through which a scaled loss is followed, and how many.
_ARITHMETIC = ("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0", "NegBackward0", "ToCopyBackward0")
_MAX_NODES = 16
_INSTEAD = "lite.backward() scales the loss, and optimizer.step() unscales the gradients"


def check_process_group(lite: Lite) -> None:
    """Raise if the script has connected ranks that a job of one rank knows nothing of: each would train by itself.

    A collective that uses process groups compares them itself. With an environment asked for by name a rank means to
    run a job of its own.

    Raises:
        EnvironmentMismatchError: saying how many there are.
    """
    found = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if lite.world_size == 1 and found > 1 and lite._request.value("environment", "auto") == "auto":
        raise EnvironmentMismatchError(
            f"The script has called init_process_group() for {found} ranks, and this job has one: leave "
            "init_process_group() and mp.spawn() out, and call lite.launch() or start the script with `plugframe run`."
        )


def check_current_device(context: Context) -> None:
    """Raise if the script has selected another device than this rank's: tensors would be made there.

    Raises:
        OrderError: naming both.
    """
    device = context.device
    if device.index is None or not torch.accelerator.is_available():
        return
    current = torch.accelerator.current_accelerator()
    if current is None or current.type != device.type:
        return
    index = torch.accelerator.current_device_index()
    if index != device.index:
        raise OrderError(
            f"The current device is {device.type}:{index}, and this rank's is {device}: leave torch.{device.type}."
            "set_device() out, lite selects the device of each rank."
        )


def tell_of_sampler(loader: DataLoader[object]) -> None:
    """Say what a ``DistributedSampler`` that divides a loader does differently. Called on rank 0."""
    if isinstance(loader.sampler, DistributedSampler):
        tell(
            "The DistributedSampler of a loader is kept: it repeats samples until all ranks have as many, so that an "
            "evaluation counts some twice. Without it, lite.setup_dataloaders() lets every sample be read once."
        )


def check_wrapped(module: nn.Module) -> None:
    """Raise for a module that torch's FSDP has sharded: a strategy does it.

    Raises:
        SettingError: naming the call to leave out.
    """
    for part in module.modules():
        # By their names: a script that shards nothing need not import them.
        names = {klass.__name__ for klass in type(part).__mro__ if klass.__module__.startswith("torch.distributed.")}
        call = next((call for name, call in _SHARDING.items() if name in names), None)
        if call is not None:
            raise SettingError(
                f"This {type(module).__name__} is sharded by {call} already: leave it out, and pass strategy='fsdp'."
            )


def check_scaled_twice(lite: Lite, loss: Tensor) -> None:
    """Check, at the first backward, that the script's own ``GradScaler`` has not scaled the loss before the precision.

    Gradients scaled twice overflow: the script's scaler would skip steps without end.

    Raises:
        OrderError: if the loss is what a scaler has returned.
    """
    precision = lite.plan.choices["precision"]
    if "loss-scaling" in precision.descriptor.provides and _is_scaled(loss):
        raise OrderError(
            f"The script's GradScaler has scaled the loss, and precision={precision.name!r} scales it as well: leave "
            f"the GradScaler out, {_INSTEAD}."
        )


def _is_scaled(loss: Tensor) -> bool:
    """Return whether a loss is computed, by arithmetic alone, from a product with the scale of some ``GradScaler``."""
    places: set[int] = set()
    nodes: list[Any] = [loss.grad_fn]
    # Breadth first: scaler.scale(loss) / steps, or a sum of two of those.
    for node in itertools.islice(nodes, _MAX_NODES):  # it grows while it is read
        factors = [getattr(node, name, None) for name in ("_saved_self", "_saved_other")]
        places.update(factor.data_ptr() for factor in factors if isinstance(factor, Tensor) and factor.numel() == 1)
        if node is not None and node.name() in _ARITHMETIC:
            nodes += [each for each, _ in node.next_functions]
    if not places:
        return False
    # Not from the variables of the running functions: reading those of a frame keeps their values alive.
    scalers = (each for each in gc.get_objects() if issubclass(type(each), grad_scaler.GradScaler))
    scales = (scaler._scale for scaler in scalers if scaler.is_enabled())
    return any(scale is not None and scale.data_ptr() in places for scale in scales)


def check_grad_scaler(lite: Lite) -> None:
    """Warn, at the first step of an optimizer, if the script's own ``GradScaler`` steps it."""
    if lite.is_global_zero and _is_stepped_by_scaler():
        precision = lite.plan.choices["precision"].name
        warn_caller(
            f"The script's GradScaler steps an optimizer under precision={precision!r}, where its scale is in no "
            f"checkpoint of lite.save(): leave it out, and pass precision='16-mixed': {_INSTEAD}."
        )


def _is_stepped_by_scaler() -> bool:
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return False
        if frame.f_globals is vars(grad_scaler):
            scaler = frame.f_locals.get("self")
            return isinstance(scaler, grad_scaler.GradScaler) and scaler.is_enabled()
        frame = frame.f_back
    return False


def check_autocast(lite: Lite, device_type: str) -> None:
    """Warn, at the first forward of a module, if the script's own ``torch.autocast`` is active and differs."""
    if not torch.is_autocast_enabled(device_type) or not lite.is_global_zero:
        return
    dtype = torch.get_autocast_dtype(device_type)
    precision = lite.plan.choices["precision"]
    own = _autocast_dtype(lite, device_type)
    if own == dtype:
        return
    name = str(dtype).removeprefix("torch.")
    what = "applies to its forward" if own is None else "does not apply to its forward, but to what is outside of it"
    warn_caller(
        f"A module is called under the script's torch.autocast({name}), which {what} (precision={precision.name!r}): "
        "leave torch.autocast out, and pass precision='16-mixed' for float16 or 'bf16-mixed' for bfloat16."
    )


def _autocast_dtype(lite: Lite, device_type: str) -> torch.dtype | None:
    """Return the dtype of the precision's autocast; None if it has none."""
    if "autocast" not in lite.plan.choices["precision"].descriptor.provides:
        return None
    with lite.autocast():
        return torch.get_autocast_dtype(device_type)
