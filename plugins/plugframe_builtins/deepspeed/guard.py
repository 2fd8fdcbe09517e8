"""Guard parameters whose gradients or values DeepSpeed keeps elsewhere: accesses take effect or raise.

While DeepSpeed runs, parameters are plain. Otherwise each has a generated subclass of its class, which
acts or raises where plain torch would return None, an empty tensor or a stale value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from plugframe.errors import UnsupportedError

#: Packages whose code sees the plain parameters.
_INSIDE = ("plugframe", "plugframe_builtins", "deepspeed")
#: Functions, and attributes with a ``.`` before the name, that work on a parameter without values.
_PLAIN_FUNCTIONS = ("requires_grad_", "element_size", "is_floating_point", "is_complex", "register_hook")
_PLAIN_ATTRIBUTES = ("requires_grad", "device", "dtype", "is_leaf", "_version", "grad_fn", "retains_grad", "layout")
_KINDS = ("is_sparse", "is_sparse_csr", "is_meta", "is_cuda", "is_xpu", "is_cpu", "is_mps", "is_quantized", "is_nested")
_OF_PYTHON = ("__dir__", "__format__", "__hash__", "._backward_hooks", "._post_accumulate_grad_hooks")
_PLAIN_ANSWERS = {*_PLAIN_FUNCTIONS, *_OF_PYTHON, *(f".{name}" for name in (*_PLAIN_ATTRIBUTES, *_KINDS, "itemsize"))}


class Guard:
    """Swap the classes of a module's parameters.

    Args:
        module: the user's module.
        stage: the ZeRO stage.

    Attributes:
        holds: whether there are gradients that the parameters do not show.
        forgotten: ids of parameters whose gradient the script has set to None since.
        seen: whether the script has read a gradient, or set it to None, since `holds` was last set.
    """

    def __init__(self, module: nn.Module, stage: int) -> None:
        self.stage = stage
        self.holds = self.seen = self.pending = False
        self.forgotten: set[int] = set()
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._classes: dict[type, type] = {}
        self._pairs: list[tuple[Any, type, type]] = []
        self._gathered: list[Any] = []
        self._locked = False
        for parameter in module.parameters():
            if parameter.requires_grad or hasattr(parameter, "ds_id"):
                self._take(parameter)
        self._parts = list(module.modules()) if stage == 3 else []
        for part in self._parts:
            vars(part).update(__deepcopy__=_refusing(part, "deepcopy"), __reduce_ex__=_refusing(part, "pickle"))

    def _take(self, parameter: Any) -> None:
        plain = type(parameter)
        if plain not in self._classes:
            self._classes[plain] = self._subclass(plain)
        self._pairs.append((parameter, plain, self._classes[plain]))
        instance = vars(parameter)
        # On the instance: pickle and deepcopy look there, and the subclass is not always set.
        instance["__reduce_ex__"] = lambda protocol: self._reduce(parameter)
        if self.stage:
            instance["register_post_accumulate_grad_hook"] = lambda hook: self._hook(parameter, hook, sys._getframe(1))
        if hasattr(parameter, "ds_id"):
            instance["__deepcopy__"] = lambda memo: self._deepcopy(parameter, memo)

    # ------------------------------------------------------------------ lock and unlock

    def lock(self) -> None:
        """Set the subclasses, if there is anything to guard."""
        if not self._locked and (self.holds or self.stage == 3):
            self._locked = True
            for parameter, _, guarded in self._pairs:
                parameter.__class__ = guarded

    def unlock(self) -> None:
        """Restore the plain classes, for DeepSpeed."""
        if self._locked:
            self._locked = False
            for parameter, plain, _ in self._pairs:
                parameter.__class__ = plain

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Restore the plain classes for a block."""
        was = self._locked
        self.unlock()
        try:
            yield
        finally:
            if was:
                self.lock()

    def close(self) -> None:
        """Restore every parameter's class permanently."""
        self.unlock()
        for parameter, _, _ in self._pairs:
            for name in ("__reduce_ex__", "__deepcopy__", "register_post_accumulate_grad_hook"):
                vars(parameter).pop(name, None)
        for part in self._parts:
            for name in ("__reduce_ex__", "__deepcopy__"):
                vars(part).pop(name, None)

    # ------------------------------------------------------------------ gradients

    def _read_grad(self, parameter: Tensor, get: Any, frame: FrameType) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # the documented way to the plain attribute, as in torch's docs
            gradient = get(parameter)
        if _inside(frame) or not self.holds:
            return gradient
        self.seen = True
        if frame.f_code.co_name == "zero_grad":
            self.forgotten.add(id(parameter))
        elif self.pending:
            raise UnsupportedError(
                f"{self.name(parameter)}.grad is read, but {self._words} keeps gradients in shards of its own: clip "
                "with lite.clip_gradients(model, optimizer, max_norm=...), read full ones on every rank with "
                "lite.strategy.gradients(model), or use strategy='ddp'."
            )
        return gradient

    def _write_grad(self, parameter: Tensor, put: Any, value: Any, frame: FrameType) -> None:
        if self.holds and not _inside(frame):
            self.seen = True
            if value is None:
                self.forgotten.add(id(parameter))
            elif self.pending:
                raise UnsupportedError(
                    f"{self.name(parameter)}.grad is set by hand after lite.backward(), and {self._words} steps with "
                    "shards of its own: change the loss instead, or use strategy='ddp'."
                )
        with torch._C.DisableTorchFunctionSubclass():
            put(parameter, value)

    def settled(self, trained: Iterable[Tensor]) -> bool:
        """Return whether the script has set every gradient to None.

        Raises:
            UnsupportedError: if it has done so for some only.
        """
        if not self.forgotten:
            return False
        kept = [parameter for parameter in trained if id(parameter) not in self.forgotten]
        if not kept:
            return True
        one = next(iter(self.forgotten))
        raise UnsupportedError(
            f"The gradient of {self._names.get(one, 'a parameter')!r} was set to None, that of "
            f"{self.name(kept[0])} was not, and {self._words} steps with all it has: freeze it before lite.setup(), "
            "or use strategy='ddp'."
        )

    # ------------------------------------------------------------------ values

    def _call(self, func: Callable[..., Any], args: Any, kwargs: Any, frame: FrameType) -> Any:
        name = str(getattr(func, "__name__", func))
        if name in ("__get__", "__set__", "__delete__"):
            name = ("." if name == "__get__" else f"{name} ") + str(getattr(func, "__self__", func).__name__)
        first: Any = args[0] if args else None
        if frame.f_code.co_name == "_load_from_state_dict" and self._first(args) is not None:
            self._refuse(first, "load_state_dict")  # torch would catch it where it copies
        if hasattr(first, "ds_shape"):
            shape: torch.Size = first.ds_shape
            if name in (".shape", "size"):
                return shape[args[1]] if len(args) > 1 else shape
            if name in ("numel", "nelement"):
                return int(first.ds_numel)
            if name in (".ndim", "dim", "ndimension"):
                return len(shape)
            if name == "__len__" and shape:
                return shape[0]
        if name == "__repr__":
            return f"<parameter of shape {tuple(getattr(first, 'ds_shape', ()))} in shards>"
        if name not in _PLAIN_ANSWERS and not _inside(frame):
            used = "state_dict" if frame.f_code.co_name == "_save_to_state_dict" else f"Tensor.{_shown(name)}"
            found = self._first((args, kwargs))
            if found is not None:
                self._refuse(found, used)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def _first(self, arguments: Any) -> Any:
        """Return the first parameter in the arguments without values, None if there is none."""
        if isinstance(arguments, Tensor):
            known = id(arguments) in self._names and not _is_running(arguments)
            return arguments if known else None
        if isinstance(arguments, Mapping):
            arguments = arguments.values()
        elif not isinstance(arguments, (list, tuple)):
            return None
        return next((found for found in map(self._first, arguments) if found is not None), None)

    def _refuse(self, parameter: Any, what: str) -> NoReturn:
        raise UnsupportedError(
            f"{self.name(parameter)} is used outside of forward ({what}), where strategy 'deepspeed' (stage 3) holds a "
            "shard of it: read full values with lite.state_dict(model), change them within `with "
            "lite.strategy.gathered(model, write=True):` on every rank, or use stage=2."
        )

    def _deepcopy(self, parameter: Any, memo: dict[int, Any]) -> Any:
        if self._locked:
            self._refuse(parameter, "deepcopy")
        copied = nn.Parameter(parameter.data.clone(memory_format=torch.preserve_format), parameter.requires_grad)
        memo[id(parameter)] = copied
        return copied

    def _reduce(self, parameter: Any) -> Any:
        if self._locked and hasattr(parameter, "ds_id"):
            self._refuse(parameter, "pickle")
        # Without DeepSpeed's attributes: process groups cannot be pickled.
        return nn.Parameter(parameter.data.clone(), parameter.requires_grad).__reduce_ex__(2)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------ classes

    def _subclass(self, plain: Any) -> type:
        get, put = plain.grad.__get__, plain.grad.__set__
        guard = self

        def read(parameter: Any) -> Any:
            return guard._read_grad(parameter, get, sys._getframe(1))

        def write(parameter: Any, value: Any) -> None:
            guard._write_grad(parameter, put, value, sys._getframe(1))

        def call(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return guard._call(func, args, kwargs or {}, sys._getframe(1))

        namespace: dict[str, Any] = {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "grad": property(read, write, lambda parameter: write(parameter, None)),
        }
        if self.stage == 3:
            namespace["__torch_function__"] = classmethod(call)
        return type(plain)(plain.__name__, (plain,), namespace)  # type: ignore[no-any-return]

    def _hook(self, parameter: Tensor, hook: Any, frame: FrameType) -> Any:
        if not _inside(frame):
            raise refused_hook(self._names[id(parameter)], self.stage)
        return type(parameter).register_post_accumulate_grad_hook(parameter, hook)  # type: ignore[no-untyped-call]

    def name(self, parameter: Tensor) -> str:
        """Return a parameter's name for messages."""
        return f"Parameter {self._names.get(id(parameter), '?')!r}"

    @property
    def _words(self) -> str:
        return f"strategy 'deepspeed' (stage {self.stage})"


def is_guarded(parameter: Tensor) -> bool:
    """Return whether a parameter belongs to a model that was set up."""
    return "__reduce_ex__" in vars(parameter)


def refused_hook(name: str, stage: int) -> UnsupportedError:
    """Return the error for a post-accumulate hook."""
    return UnsupportedError(
        f"Parameter {name!r} has a hook of register_post_accumulate_grad_hook(), which would see gradients before they "
        f"are averaged, or none: strategy 'deepspeed' (stage {stage}) takes them away. Use register_hook(), or "
        "strategy='ddp'."
    )


def _refusing(part: nn.Module, what: str) -> Callable[..., NoReturn]:
    name = type(part).__name__

    def refuse(*args: Any) -> NoReturn:
        raise UnsupportedError(
            f"{what} of a {name} under strategy 'deepspeed' (stage 3) would hold empty tensors: ranks have shards. "
            "Use lite.state_dict(model) on every rank, or lite.save(); make copies before lite.setup()."
        )

    return refuse


def _shown(name: str) -> str:
    """Return a function or attribute as a script writes it."""
    return name.lstrip(".").replace("__set__ ", "")


def _is_running(parameter: Any) -> bool:
    """Return whether DeepSpeed has gathered the parameter for a running module, or for a block of the script."""
    # The second is DeepSpeed's own count of deepspeed.zero.GatheredParameters (0.19); older ones have none.
    depth = getattr(parameter, "_ds_z3_gathered_param_context_depth", 0)
    return bool(getattr(parameter, "ds_active_sub_modules", None)) or depth > 0


def _inside(frame: FrameType) -> bool:
    """Return whether a frame belongs to code that sees plain parameters."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE
