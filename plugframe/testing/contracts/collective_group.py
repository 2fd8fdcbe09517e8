"""A collective that is set up on one rank, for the checks of the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plugframe.core.registry.registry import Registry
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe.testing.contracts.placed import context_of
from plugframe.testing.ranks import rank_store


@dataclass
class Settings:
    """The plugin under test, sent to the ranks.

    Attributes:
        spec: the name.
        options: constructor arguments.
        accelerator: name of an accelerator whose devices it supports.
        provides: capabilities of its descriptor.
        dtypes: those that it supports.
    """

    spec: str
    options: dict[str, Any]
    accelerator: str
    provides: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    device: int = 0
    names: dict[str, str] = field(default_factory=dict)


class Group:
    """A collective on one rank, with its hooks called as the core calls them."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        registry = Registry.discover()
        self.accelerator = registry.make(registry.find("accelerator", settings.accelerator))
        indices = self.accelerator.accelerator_parse_devices(devices=world.local_world_size)
        self.device: torch.device = self.accelerator.accelerator_device(index=indices[world.local_rank])
        self.entry = registry.find("collective", settings.spec)
        self.registry = registry
        self.plugin = self.make()

    def make(self) -> Any:
        """Return a new plugin object."""
        return self.registry.make(self.entry, self.settings.options)

    def context(self, *plugins: Any, timeout_s: float = 20.0) -> Context:
        """Return the context of the job."""
        context = context_of(
            self.accelerator,
            *plugins,
            device=self.device,
            world=self.world,
            names={"collective": self.entry.name},
            environment_store=lambda context, timeout_s: rank_store(timeout_s),
        )
        object.__setattr__(context, "timeout_s", timeout_s)
        return context

    @property
    def rank(self) -> int:
        return self.world.global_rank

    @property
    def size(self) -> int:
        return self.world.world_size

    def tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """Make a tensor on this rank's device."""
        return torch.tensor(*args, **kwargs).to(self.device)

    def gather(self, tensor: Tensor, *, group: Any = None, sync_grads: bool = False) -> Tensor:
        found: Tensor = self.plugin.collective_all_gather(tensor=tensor, group=group, sync_grads=sync_grads)
        return found

    def reduce(self, tensor: Tensor, op: str, *, group: Any = None) -> Tensor:
        found: Tensor = self.plugin.collective_all_reduce(tensor=tensor, op=op, group=group)
        return found

    def scatter(self, tensor: Tensor, op: str, *, group: Any = None) -> Tensor:
        found: Tensor = self.plugin.collective_reduce_scatter(tensor=tensor, op=op, group=group)
        return found

    def broadcast(self, tensor: Tensor, src: int = 0, *, group: Any = None) -> Tensor:
        found: Tensor = self.plugin.collective_broadcast(tensor=tensor, src=src, group=group)
        return found

    def objects(self, obj: Any, *, group: Any = None) -> list[Any]:
        found: list[Any] = self.plugin.collective_all_gather_object(obj=obj, group=group)
        return found

    def send(self, tensor: Tensor, dst: int, tag: int = 0, *, group: Any = None) -> None:
        self.plugin.collective_send(tensor=tensor, dst=dst, tag=tag, group=group)

    def recv(self, like: Tensor, src: int, tag: int = 0, *, group: Any = None) -> Tensor:
        found: Tensor = self.plugin.collective_recv(tensor=like, src=src, tag=tag, group=group)
        return found

    def all_to_all(
        self,
        tensor: Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
        *,
        group: Any = None,
        sync_grads: bool = False,
    ) -> Tensor:
        found: Tensor = self.plugin.collective_all_to_all(
            tensor=tensor, output_sizes=output_sizes, input_sizes=input_sizes, group=group, sync_grads=sync_grads
        )
        return found

    def row(self, tensor: Tensor, src: int, *, group: Any = None) -> Tensor:
        """Call `collective_scatter`; `scatter` is the reduce-scatter."""
        found: Tensor = self.plugin.collective_scatter(tensor=tensor, src=src, group=group)
        return found

    def gathered(self, obj: Any, dst: int, *, group: Any = None) -> list[Any] | None:
        found: list[Any] | None = self.plugin.collective_gather_object(obj=obj, dst=dst, group=group)
        return found

    @contextmanager
    def set_up(self, plugin: Any, **settings: Any) -> Iterator[Any]:
        """Set a plugin up, and tear it down."""
        plugin.collective_setup(context=self.context(plugin, **settings))
        try:
            yield plugin
        finally:
            plugin.collective_teardown()


@contextmanager
def connected(world: World, settings: Settings) -> Iterator[Group]:
    """Yield a group whose collective is set up."""
    group = Group(world, settings)
    group.accelerator.accelerator_setup(context=group.context())
    try:
        with group.set_up(group.plugin):
            yield group
    finally:
        group.accelerator.accelerator_teardown()


@contextmanager
def apart(world: World, settings: Settings) -> Iterator[Group]:
    """Yield a group whose collective the checks set up and tear down."""
    group = Group(world, settings)
    group.accelerator.accelerator_setup(context=group.context())
    try:
        yield group
    finally:
        group.accelerator.accelerator_teardown()
