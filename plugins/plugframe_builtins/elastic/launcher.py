"""Launch ranks by running the script again, or by multiprocessing."""

from __future__ import annotations

import functools
import os
import pickle
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import torch

from plugframe.base import Launcher
from plugframe.errors import UnsupportedError, UsageError
from plugframe.hooks import Job, hookimpl
from plugframe.launch import supervise

#: Variables that keep communication libraries on loopback, for ranks on one host.
_GLOO = "GLOO_SOCKET_IFNAME"
_INTERFACE_VARIABLES = (_GLOO, "NCCL_SOCKET_IFNAME")
#: Linux's ioctl request number for an interface's address (SIOCGIFADDR).
_SIOCGIFADDR = 0x8915
_LOOPBACK_NAMES = ("lo", "lo0")


class Elastic(Launcher):
    """Launch ranks with torch's elastic agent.

    Args:
        start_method: ``"spawn"`` starts ranks in fresh interpreters, ``"fork"`` as copies of this process. None spawns
            functions, and forks scripts from ``plugframe run`` on Linux if the accelerator allows it.
    """

    def __init__(self, *, start_method: Literal["spawn", "fork"] | None = None) -> None:
        if start_method not in (None, "spawn", "fork"):
            raise UsageError(f"start_method={start_method!r}: 'spawn' and 'fork' are possible.")
        self.start_method = start_method

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        start_method = self.start_method
        if job.function is not None:
            if start_method == "fork":
                check_forkable()
            else:
                check_sendable(job.function, job.args)
                start_method = "spawn"
        alone = job.num_nodes == 1 and job.min_nodes is None
        environ = on_loopback() if alone else on_interface(job.main_address or "", job.main_port or 0)
        job = replace(job, environ={**environ, **job.environ})
        return supervise(job, start_method=start_method)


def on_loopback() -> dict[str, str]:
    """Return the variables that keep the ranks' sockets on loopback, except those that are set already."""
    names = [name for _, name in socket.if_nameindex() if name in _LOOPBACK_NAMES]
    return {variable: names[0] for variable in _INTERFACE_VARIABLES if names and variable not in os.environ}


def on_interface(address: str, port: int) -> dict[str, str]:
    """Return the variable that keeps gloo's sockets on the interface that routes to the other nodes.

    By default gloo takes the interface of the host's name, which may be another, or none.
    """
    if _GLOO in os.environ:
        return {}
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing: the system only looks up the route
            mine = probe.getsockname()[0]
    except OSError:
        return {}  # the launcher reports unreachable addresses
    name = next((name for _, name in socket.if_nameindex() if mine == _address_of(name)), None)
    return {_GLOO: name} if name is not None else {}


def _address_of(interface: str) -> str | None:
    """Return the IPv4 address of an interface; None if it has none, or the system does not provide it."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def check_sendable(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise now, rather than on every rank, if a call cannot be pickled for fresh interpreters.

    Raises:
        UsageError: naming the object, and why.
    """
    things = [(f"the function {_name(function)}", function)]
    things += [(f"argument {number} ({type(arg).__name__})", arg) for number, arg in enumerate(args, 1)]
    for what, thing in things:
        sink = _Sink()
        try:
            ForkingPickler(sink).dump(thing)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(_refusal(what, str(error).splitlines()[0])) from None
        except RuntimeError:
            continue  # a lock or a queue: picklable, but only while processes start
        if sink.names_main and not _main_is_importable():
            raise UsageError(_refusal(what, "it was defined at a prompt or in a notebook"))


def check_forkable() -> None:
    """Raise if forked ranks could not use this process's state: a process group, or a device.

    Raises:
        UnsupportedError: naming it, and for a device the lines that may have used it first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UnsupportedError(
            "launcher='fork' cannot start ranks from a process that has a process group: tear down the Lite, or "
            "destroy the group, that it belongs to, or use launcher='spawn'."
        )
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return
    is_initialized = getattr(torch.get_device_module(accelerator), "is_initialized", None)
    if is_initialized is not None and is_initialized():
        from plugframe_builtins.elastic.first_use import first_uses

        found = first_uses(accelerator.type)
        where = f", by the look of the code in {', or in '.join(found)}" if found else ""
        raise UnsupportedError(
            f"launcher='fork' cannot start ranks after this process has used a {accelerator.type} device{where}: "
            "restart it and use the device only in the launched function, or use launcher='spawn'."
        )


class _Sink:
    """A file that only records whether ``__main__`` was named in it."""

    def __init__(self) -> None:
        self.names_main = False

    def write(self, data: Any) -> int:
        chunk = bytes(data) if len(data) < 1 << 20 else b""  # names are short, tensors are not
        self.names_main = self.names_main or b"__main__" in chunk
        return len(data)


def _main_is_importable() -> bool:
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is not None or os.path.exists(getattr(main, "__file__", None) or "")


def _refusal(what: str, why: str) -> str:
    return (
        f"launcher='spawn' cannot send {what} to the ranks ({why}): "
        "define it at the top level of a module, or use launcher='fork'."
    )


def _name(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__qualname__", type(inner).__name__))
