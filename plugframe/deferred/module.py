"""Build a module of any size without values, and materialize its tensors one by one later.

::

    with deferring(device):
        model = Model()                       # ordinary code; big parameters are created on the meta device
    materialize_module(model, device)         # bitwise equal to an eager build with the same seed

Inside the context, operations on big tensors are recorded instead of executed, with the state of the generator they
would draw from; the generator advances as in an eager build. Each tensor can be materialized independently later.
Values that the code reads (``.item()``, ``if (w > 0).any():``) are computed immediately.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from plugframe.deferred.calls import exact
from plugframe.deferred.history import Geometry, Record, flatten, own_tensors, record_of
from plugframe.deferred.recording import Recorder
from plugframe.deferred.replay import replay
from plugframe.deferred.source import Region, digest_of, read_part
from plugframe.errors import UnsupportedError

__all__ = [
    "Deferred",
    "check_values",
    "deferring",
    "is_deferred",
    "materialize",
    "materialize_module",
    "record_of",
    "recording",
    "records",
    "resuming",
]


@contextmanager
def deferring(device: torch.device, *, min_numel: int = 4096) -> Iterator[None]:
    """Build on `device`, like ``with device:``, and defer the values of tensors of `min_numel` or more elements.

    A nested context shares the outer one's recorder and only sets its own device. Tensors explicitly created on the
    meta device stay without values.
    """
    if _active() is not None:
        with device:
            yield
        return
    recorder = Recorder(min_numel)
    registrations = _Registrations()
    try:
        # The device is entered last, so that the device argument it adds passes through the other modes.
        with recorder, _EagerAttributesMode(recorder), device, registrations.tracking():
            yield
    finally:
        registrations.register()
        for record in recorder.touched:
            record.refresh()


def resuming(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Return a context for converting and moving `module`: `deferring` if it has deferred tensors, else a null one."""
    tensors = [tensor for submodule in module.modules() for tensor in own_tensors(submodule).values()]
    return deferring(device) if any(map(is_deferred, tensors)) else nullcontext()


def check_values(module: nn.Module) -> None:
    """Raise if a tensor on the meta device has no recorded values.

    Raises:
        UnsupportedError: with the name of the first such tensor.
    """
    for path, submodule in module.named_modules():
        for name, tensor in own_tensors(submodule).items():
            if tensor.is_meta and not is_deferred(tensor):
                raise UnsupportedError(
                    f"{'.'.join(filter(None, (path, name)))!r} is on the meta device and has no recorded values: "
                    "build, copy and convert the module under lite.init_module(empty_init=True), or call "
                    "module.to_empty(device=lite.device) and load it."
                )


def recording() -> bool:
    """Return whether this thread is within `deferring`."""
    return _active() is not None


def is_deferred(tensor: Tensor) -> bool:
    """Return whether `tensor` was built under `deferring` and has no values yet."""
    return record_of(tensor) is not None


def materialize(tensor: Tensor) -> Tensor:
    """Return the full real tensor on the device it was built for; `tensor` itself stays deferred.

    Generators are not advanced. A tensor with values is returned unchanged.

    Raises:
        UnsupportedError: if it is on the meta device but not deferred, or was changed while nothing was recorded.
    """
    record = record_of(tensor)
    if record is not None:
        return _value(record, Geometry.of(tensor))
    if tensor.is_meta:
        raise UnsupportedError(
            f"A tensor of shape {tuple(tensor.shape)} is on the meta device and has no recorded values: "
            "build and copy the module under lite.init_module(empty_init=True)."
        )
    return tensor


class Deferred:
    """Returns a deferred tensor's values when called, also after the tensor in the module was replaced."""

    def __init__(self, record: Record, geometry: Geometry) -> None:
        self._record, self._geometry = record, geometry

    def __call__(self) -> Tensor:
        return _value(self._record, self._geometry)

    def part(self, region: Region) -> Tensor | None:
        """Return a region of a tensor that is read from a file, without reading the others; None for any other."""
        return read_part(self._record, self._geometry, region)

    def digest(self) -> str | None:
        """Return a digest that differs where the files of such a tensor do, None for any other."""
        return digest_of(self._record)


def records(module: nn.Module) -> dict[str, Deferred]:
    """Return, by name, a function for each deferred parameter and buffer of `module` that returns the full tensor.

    The functions keep working when the tensors in the module are replaced, as sharding does. Shared tensors appear
    under each of their names.

    Raises:
        UnsupportedError: if a tensor was changed while nothing was recorded.
    """
    found: dict[str, Deferred] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(submodule).items():
            record = record_of(tensor)
            if record is not None:
                record.check()
                found[f"{path}.{name}" if path else name] = Deferred(record, Geometry.of(tensor))
    return found


def materialize_module(module: nn.Module, device: torch.device) -> None:
    """Materialize every deferred parameter, buffer and tensor attribute of `module` in place, on `device`.

    The tensor objects stay the same, so optimizers keep their references, and shared tensors stay shared.

    Raises:
        UnsupportedError: if a tensor was changed while nothing was recorded, or cannot be changed in place.
    """
    materializing = _MaterializeMode(module, exact(device))
    for submodule in module.modules():
        for tensor in own_tensors(submodule).values():
            record = record_of(tensor)
            if record is not None:
                # Check all tensors first, so that a failure leaves none materialized.
                record.check()
    registered = {id(tensor) for submodule in module.modules() for tensor in own_tensors(submodule).values()}
    # Attributes first: one computed from a parameter holds a graph, and so a reference to the parameter.
    for submodule in module.modules():
        for leaf in flatten(vars(submodule)):
            if isinstance(leaf, Tensor) and id(leaf) not in registered:
                materializing.materialize_in_place(leaf)
    for submodule in module.modules():
        if any(is_deferred(tensor) for tensor in own_tensors(submodule).values()):
            with materializing:
                # A public method that uses the module's own handling of its tensors (recurrent layers keep weak
                # references, which would block a swap); `materializing` replaces the empty tensors it creates.
                submodule.to_empty(device=device, recurse=False)


class _Registrations:
    """Weak references to the modules that have registered a parameter or a buffer."""

    def __init__(self) -> None:
        self._modules: dict[int, weakref.ref[nn.Module]] = {}

    @contextmanager
    def tracking(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(register_module_parameter_registration_hook(self._add).remove)
            stack.callback(register_module_buffer_registration_hook(self._add).remove)
            yield

    def _add(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        self._modules[id(module)] = weakref.ref(module)

    def register(self) -> None:
        """Record the version of every tensor that is still registered, to detect later in-place changes."""
        for module in filter(None, (reference() for reference in self._modules.values())):
            for name, tensor in own_tensors(module).items():
                record = record_of(tensor)
                if record is not None:
                    record.register(module, name, tensor)


def _active() -> Recorder | None:
    """Return the recorder of this thread, through the stack of torch function modes."""
    # Any argument will do: without one, modes are not consulted.
    if has_torch_function((None,)):
        answer: Recorder | None = handle_torch_function(_active, ())
        return answer
    return None


def _value(record: Record, geometry: Geometry) -> Tensor:
    active = _active()
    with nullcontext() if active is None else active.pause():
        return geometry.on(replay([record])[record])


class _EagerAttributesMode(TorchFunctionMode):
    """Function mode that gives deferred tensors the attributes of real ones."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _active:
            return self._recorder
        if isinstance(kwargs.get("out"), Tensor) and is_deferred(kwargs["out"]) and "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        record = record_of(args[0]) if args and isinstance(args[0], Tensor) and func in _INTERCEPTED else None
        if record is None:
            return func(*args, **kwargs)
        if func == _DEVICE:
            return record.device
        if func == _IS_META:
            return False
        if func == Tensor.to:
            # A deferred tensor reports its eager device, so `to` that device keeps it on the meta device.
            device = {"device": _stays(record, kwargs["device"])} if "device" in kwargs else {}
            return func(args[0], *(_stays(record, arg) for arg in args[1:]), **{**kwargs, **device})
        with self._recorder.pause():
            result = func(_value(record, Geometry.of(args[0])), *args[1:], **kwargs)
        if func == Tensor.numpy:
            # With values, writing to the array would write to the tensor.
            result.flags.writeable = False
        return result


_DEVICE: Any = Tensor.device.__get__
_IS_META: Any = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_INTERCEPTED = frozenset({_DEVICE, _IS_META, Tensor.to, Tensor.tolist, Tensor.numpy, Tensor.__array__})


def _stays(record: Record, value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and exact(value) == record.device:
        return torch.device("meta")
    return value


class _MaterializeMode(TorchFunctionMode):
    """Function mode in which ``torch.empty_like`` materializes a deferred tensor in place and returns it."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._device = device
        seen: set[int] = set()
        on: dict[Record, int] = {}
        for submodule in module.modules():
            for tensor in flatten(vars(submodule)):
                record = record_of(tensor) if isinstance(tensor, Tensor) and id(tensor) not in seen else None
                if record is not None:
                    seen.add(id(tensor))
                    on[record] = on.get(record, 0) + 1
        #: Real storage by record, for storages shared by several tensors.
        self._shared: dict[Record, torch.UntypedStorage | None] = {r: None for r, count in on.items() if count > 1}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.empty_like:
            return func(*args, **(kwargs or {}))
        self.materialize_in_place(args[0])
        return args[0]

    def materialize_in_place(self, tensor: Tensor) -> None:
        record = record_of(tensor)
        if record is None:
            return
        storage = self._shared.get(record)
        geometry = Geometry.of(tensor)
        value = _value(record, geometry) if storage is None else geometry.on(storage)
        if value.device != self._device:
            value = value.to(self._device)
        if record in self._shared:
            self._shared[record] = value.untyped_storage()
        value.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        value.__class__ = type(tensor)
        vars(value).update(vars(tensor))
        try:
            torch.utils.swap_tensors(tensor, value)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise UnsupportedError(
                f"A tensor of shape {tuple(tensor.shape)} cannot be materialized in place because it is referenced "
                f"elsewhere ({error}): hold no weak references to it and no graph over it before lite.setup()."
            ) from error
