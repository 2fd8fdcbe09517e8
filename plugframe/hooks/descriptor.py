"""The descriptor: what an entry point loads, light enough to load for a listing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: The version of the hook contract this release speaks; it accepts this one and the one before.
API = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Plugin:
    """Everything plugframe must know about a plugin before importing it.

    The object an entry point of the group ``plugframe.<kind>`` names. Its module must import nothing
    heavy: listing and resolving load descriptors, never implementations.

    Attributes:
        factory: ``"package.module:Name"`` of the class (or callable) that makes the implementation. It is
            imported only once the plugin has been selected. Empty for an alias.
        summary: one line for listings.
        devices: device types (``torch.device.type``) it works on; empty means any.
        precisions: names of the precisions it can honour; empty means any. For strategies.
        ranks: ``"one"`` works with a single rank only, ``"any"`` with any number.
        priority: how eagerly ``"auto"`` picks it, higher first; None means never.
        provides: capabilities other plugins can ask for, such as ``"process-group"``. Of a checkpoint, ``"sharded"``
            means that every rank writes its part; of a strategy, that every rank keeps only its part of a model.
        needs: for each kind, the capabilities the plugin of that kind must provide, such as
            ``{"collective": ("process-group",)}``.
        prefers: for each kind, the capabilities the plugin of that kind should provide if ``"auto"`` picks it:
            ``{"checkpoint": ("sharded",)}``.
        tags: groups it belongs to, such as ``"gpu"``; see `best_of`.
        requires: modules that must be importable before the factory is imported.
        extra: the requirement that installs what it needs: ``"plugframe[deepspeed]"``.
        variables: environment variables that must be set for an environment to be considered under ``"auto"``.
        alias_of: this name stands for another name of the same kind.
        best_of: this name stands for the best available plugin that carries this tag.
        implies: settings of other kinds that an alias stands for, such as ``{"launcher": "spawn"}``.
        retired: names users may still type, each with the sentence that says what to type instead.
        options: keyword arguments handed to the factory, for two names that share one factory.
        api: the version of the hook contract it was written for.
    """

    factory: str = ""
    summary: str = ""
    devices: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    ranks: Literal["one", "any"] = "any"
    priority: int | None = None
    provides: tuple[str, ...] = ()
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    extra: str = ""
    variables: tuple[str, ...] = ()
    alias_of: str = ""
    best_of: str = ""
    implies: Mapping[str, str] = field(default_factory=dict)
    retired: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    api: int = API

    def __post_init__(self) -> None:
        ways = [bool(self.factory), bool(self.alias_of), bool(self.best_of)]
        if sum(ways) != 1:
            raise ValueError(
                "Plugin() needs exactly one of factory=, alias_of= and best_of=, "
                f"got factory={self.factory!r}, alias_of={self.alias_of!r}, best_of={self.best_of!r}."
            )
        if self.factory and self.factory.count(":") != 1:
            raise ValueError(f"Plugin(factory={self.factory!r}): write 'package.module:Name'.")
