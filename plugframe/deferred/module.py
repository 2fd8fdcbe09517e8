"""Building a module of any size without its values, which each tensor gets on its own, later.

::

    with deferring(device):
        model = Model()                       # ordinary code; big parameters come out on the meta device
    materialize_module(model, device)         # bit for bit what an eager build with the same seed gives

Inside, an operation on a big tensor is noted instead of done, with the state of the generator it would draw from;
the generator moves on as in an eager build. Afterwards the values of one tensor can be had without those of others.
A value that the code looks at (``.item()``, ``if (w > 0).any():``) is computed there and then.
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
from plugframe.errors import UnsupportedError

__all__ = [
    "check_values",
    "deferring",
    "is_deferred",
    "materialize",
    "materialize_module",
    "record_of",
    "records",
    "resuming",
]


@contextmanager
def deferring(device: torch.device, *, min_numel: int = 4096) -> Iterator[None]:
    """Build on `device`, as ``with device:`` does, and defer the values of tensors of `min_numel` elements or more.

    A context inside another joins it: only the device is its own. Tensors that are asked for on the meta device
    stay what they are, without values.
    """
    if _active() is not None:
        with device:
            yield
        return
    recorder = Recorder(min_numel)
    registrations = _Registrations()
    try:
        # The device comes last: what it adds to a call must pass the others.
        with recorder, _Pretence(recorder), device, registrations.watching():
            yield
    finally:
        registrations.witness()
        for record in recorder.touched:
            record.refresh()


def resuming(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which `module` can be converted and moved: with its deferred tensors, if it has any."""
    tensors = [tensor for part in module.modules() for tensor in own_tensors(part).values()]
    return deferring(device) if any(map(is_deferred, tensors)) else nullcontext()


def check_values(module: nn.Module) -> None:
    """Refuse tensors on the meta device that nothing says the values of.

    Raises:
        UnsupportedError: naming the first.
    """
    for path, part in module.named_modules():
        for name, tensor in own_tensors(part).items():
            if tensor.is_meta and not is_deferred(tensor):
                raise UnsupportedError(
                    f"{'.'.join(filter(None, (path, name)))!r} is on the meta device and nothing says what its values "
                    "are: build, copy and convert the module under lite.init_module(empty_init=True), or call "
                    "module.to_empty(device=lite.device) and load it."
                )


def is_deferred(tensor: Tensor) -> bool:
    """Say whether `tensor` was built under `deferring` and has no values yet."""
    return record_of(tensor) is not None


def materialize(tensor: Tensor) -> Tensor:
    """Return the whole real tensor, on the device it was built for; `tensor` itself stays deferred.

    The generators are left as they are. A tensor with values is returned as it is.

    Raises:
        UnsupportedError: if it is on the meta device for another reason, or was changed where nothing was noted.
    """
    record = record_of(tensor)
    if record is not None:
        return _value(record, Geometry.of(tensor))
    if tensor.is_meta:
        raise UnsupportedError(
            f"A tensor of shape {tuple(tensor.shape)} is on the meta device and nothing says what its values are: "
            "build (and copy) the module under lite.init_module(empty_init=True)."
        )
    return tensor


def records(module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return, by name, what gives the whole tensor for every deferred parameter and buffer of `module`.

    They go on working when the tensors in the module are replaced, as sharding does. Shared tensors come under
    each of their names.

    Raises:
        UnsupportedError: if a tensor was changed where nothing was noted.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(part).items():
            record = record_of(tensor)
            if record is not None:
                record.check()
                found[f"{path}.{name}" if path else name] = _later(record, Geometry.of(tensor))
    return found


def materialize_module(module: nn.Module, device: torch.device) -> None:
    """Give every deferred parameter, buffer and tensor attribute of `module` its value, in place, on `device`.

    They stay the same objects: an optimizer that holds them goes on holding them, and what was shared is shared.

    Raises:
        UnsupportedError: if a tensor was changed where nothing was noted, or cannot be changed in place.
    """
    filling = _Filling(module, exact(device))
    for part in module.modules():
        for tensor in own_tensors(part).values():
            record = record_of(tensor)
            if record is not None:
                # All of them first: a half filled module is of no use.
                record.check()
    registered = {id(tensor) for part in module.modules() for tensor in own_tensors(part).values()}
    # Attributes first: one that was computed from a parameter holds a graph over it, and so a reference.
    for part in module.modules():
        for leaf in flatten(vars(part)):
            if isinstance(leaf, Tensor) and id(leaf) not in registered:
                filling.fill(leaf)
    for part in module.modules():
        if any(is_deferred(tensor) for tensor in own_tensors(part).values()):
            with filling:
                # It is public, goes through the module's own handling of its tensors (recurrent layers keep weak
                # references, which would stand in the way), and `filling` decides what comes of each tensor.
                part.to_empty(device=device, recurse=False)


class _Registrations:
    """The modules that were given a parameter or a buffer, by weak reference."""

    def __init__(self) -> None:
        self._modules: dict[int, weakref.ref[nn.Module]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(register_module_parameter_registration_hook(self._add).remove)
            stack.callback(register_module_buffer_registration_hook(self._add).remove)
            yield

    def _add(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        self._modules[id(module)] = weakref.ref(module)

    def witness(self) -> None:
        """Note the version of every tensor that is still registered: a later change in place would be lost."""
        for module in filter(None, (reference() for reference in self._modules.values())):
            for name, tensor in own_tensors(module).items():
                record = record_of(tensor)
                if record is not None:
                    record.witness(module, name, tensor)


def _active() -> Recorder | None:
    """Return the recorder of this thread. It is asked for as a function that modes may answer, from inside out."""
    # An argument of any kind: without one, modes are not looked at.
    if has_torch_function((None,)):
        answer: Recorder | None = handle_torch_function(_active, ())
        return answer
    return None


def _value(record: Record, geometry: Geometry) -> Tensor:
    active = _active()
    with nullcontext() if active is None else active.pause():
        return geometry.on(replay([record])[record])


def _later(record: Record, geometry: Geometry) -> Callable[[], Tensor]:
    return lambda: _value(record, geometry)


class _Pretence(TorchFunctionMode):
    """Lets code that asks a deferred tensor about itself hear what a real one would say."""

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
        record = record_of(args[0]) if args and isinstance(args[0], Tensor) and func in _ASKED else None
        if record is None:
            return func(*args, **kwargs)
        if func == _DEVICE:
            return record.device
        if func == _IS_META:
            return False
        if func == Tensor.to:
            # On the device it says it is on, it would stay there.
            there = {"device": _stays(record, kwargs["device"])} if "device" in kwargs else {}
            return func(args[0], *(_stays(record, arg) for arg in args[1:]), **{**kwargs, **there})
        with self._recorder.pause():
            result = func(_value(record, Geometry.of(args[0])), *args[1:], **kwargs)
        if func == Tensor.numpy:
            # Writing into it would write into the tensor, if that had values.
            result.flags.writeable = False
        return result


_DEVICE: Any = Tensor.device.__get__
_IS_META: Any = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_ASKED = frozenset({_DEVICE, _IS_META, Tensor.to, Tensor.tolist, Tensor.numpy, Tensor.__array__})


def _stays(record: Record, value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and exact(value) == record.device:
        return torch.device("meta")
    return value


class _Filling(TorchFunctionMode):
    """Answers ``torch.empty_like`` with the tensor itself, which it gives its values if it is deferred."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._device = device
        seen: set[int] = set()
        on: dict[Record, int] = {}
        for part in module.modules():
            for tensor in flatten(vars(part)):
                record = record_of(tensor) if isinstance(tensor, Tensor) and id(tensor) not in seen else None
                if record is not None:
                    seen.add(id(tensor))
                    on[record] = on.get(record, 0) + 1
        #: The real storages of those that several tensors lie in.
        self._shared: dict[Record, torch.UntypedStorage | None] = {r: None for r, count in on.items() if count > 1}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.empty_like:
            return func(*args, **(kwargs or {}))
        self.fill(args[0])
        return args[0]

    def fill(self, tensor: Tensor) -> None:
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
                f"A tensor of shape {tuple(tensor.shape)} cannot get its values in place, something else refers to "
                f"it ({error}): keep no weak references to it, and no graph over it, before lite.setup()."
            ) from error
