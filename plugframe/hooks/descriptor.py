"""The descriptor that an entry point loads; importing it is cheap."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from plugframe.hooks.mesh import ORDER, Axis, Divides
from plugframe.hooks.option import Option, validate_options

#: The version of the hook contract of this release, which supports this version and the previous one.
API = 2

#: Capabilities that combined strategies have only if each of them has it.
_GUARANTEES = ("local-backward",)

#: What `Plugin.ranks` may be besides a word: from options and a number of ranks to a problem, or None.
RanksRule = Callable[[Mapping[str, Any], int], str | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plugin:
    """Metadata of a plugin, read without importing the implementation.

    The object that an entry point of the group ``plugframe.<kind>`` refers to. Its module must be cheap to import:
    listing and resolving load descriptors, never implementations.

    Attributes:
        factory: ``"package.module:Name"`` of the class (or callable) that creates the implementation. It is
            imported only once the plugin is selected. Empty for an alias.
        summary: one line for listings.
        devices: device types (``torch.device.type``) it works on; empty means any.
        precisions: deprecated since version 2 of the contract: names of the supported precisions. A strategy says what
            it cannot take with `conflicts`, so that precisions of other packages work with it.
        ranks: ``"one"`` works with a single rank only, ``"any"`` with any number. A function
            ``f(options, num_ranks)`` returns None or the problem: ``"needs a multiple of stages=4 ranks"``.
        priority: rank among the candidates under ``"auto"``, higher first; None means never chosen.
        provides: capabilities other plugins can require, such as ``"process-group"``. Of an accelerator, ``"fork"`` if
            it works in processes forked from one that has imported torch. Of a checkpoint, ``"sharded"``
            means that every rank writes its shards; of a strategy, that every rank holds only its shards of a model.
            ``"simulated"`` of an environment and a collective: the other ranks do not exist; nothing is saved, and the
            first device of this machine stands for those of the job.
            ``"by-hand"`` of an environment: the user has set its variables, perhaps per node rather than per process,
            so it is ignored when ``plugframe run`` gets a node rank.
            ``"averages-axes"`` of a strategy that divides the batch: it averages gradients over ``context.averaged``.
            ``"local-backward"`` of a strategy: under ``strategy_no_sync`` neither forward nor backward communicates,
            and a later backward averages the accumulated gradients.
            Of a precision: ``"autocast"`` runs forwards under ``torch.autocast``; ``"loss-scaling"`` scales losses;
            ``"float16-parameters"``, ``"bfloat16-parameters"``, ``"float64-parameters"`` convert parameters to that
            dtype; ``"replaces-modules"`` replaces submodules by others; ``"tensor-subclasses"`` makes parameters
            subclasses of ``Tensor``.
        needs: for each kind, the capabilities the plugin of that kind must provide, such as
            ``{"collective": ("process-group",)}``.
        prefers: for each kind, the capabilities the plugin of that kind should provide if ``"auto"`` picks it:
            ``{"checkpoint": ("sharded",)}``.
        conflicts: for each kind, the capabilities the plugin of that kind must not provide:
            ``{"precision": ("tensor-subclasses",)}``. What a precision converts a module to is checked against it too,
            listed or not.
        for_options: a function from the options, defaults included, to the fields that differ for them:
            ``lambda options: {"provides": ("sharded",)} if options["stage"] == 3 else {}``.
        divides: what a strategy divides over the ranks: ``"batch"``, or a part of the model, in the order in which
            composed strategies are applied: ``"stages"``, ``"tensors"``, ``"experts"``, ``"sequence"``, ``"blocks"``.
        axes: the axes of the device mesh that a strategy uses. One without axes cannot be composed.
        tags: groups it belongs to, such as ``"gpu"``; see `best_of`.
        requires: modules that must be importable before the factory is imported.
        extra: the requirement that installs its dependencies: ``"plugframe[deepspeed]"``.
        variables: environment variables that must be set for an environment to be considered under ``"auto"``.
        own_variables: environment variables that hold a rank's position, with ``*`` for any characters. A program
            that the rank starts ignores them. Empty means `variables`.
        alias_of: another name of the same kind that this name stands for.
        best_of: a tag: this name stands for the available plugin with that tag and the highest priority.
        implies: settings of other kinds that come with this name, such as ``{"launcher": "spawn"}``; an
            ``"extension"`` is added to the requested ones.
        retired: old names, each with a sentence that names the replacement.
        options: the keyword arguments of the factory that users can set.
        preset: keyword arguments always passed to the factory, for two names that share one.
        api: the version of the hook contract it was written for.
    """

    factory: str = ""
    summary: str = ""
    devices: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    ranks: Literal["one", "any"] | RanksRule = "any"
    priority: int | None = None
    provides: tuple[str, ...] = ()
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conflicts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    for_options: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    divides: Divides = "batch"
    axes: tuple[Axis, ...] = ()
    tags: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    extra: str = ""
    variables: tuple[str, ...] = ()
    own_variables: tuple[str, ...] = ()
    alias_of: str = ""
    best_of: str = ""
    implies: Mapping[str, str] = field(default_factory=dict)
    retired: Mapping[str, str] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)
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
        if not isinstance(self.api, int) or isinstance(self.api, bool):
            raise ValueError(f"Plugin(api={self.api!r}): write the number of the contract it was written for, {API}.")
        self._check_types()
        self._check_options()

    def _check_types(self) -> None:
        """Raise here, where the error names the author, rather than later when a wrong type is compared."""
        for name in ("devices", "precisions", "provides", "tags", "requires", "variables", "own_variables"):
            words = getattr(self, name)
            if not isinstance(words, (tuple, list)) or not all(isinstance(word, str) for word in words):
                raise ValueError(f"Plugin({name}={words!r}): write a tuple of strings, such as ('a',).")
        for name in ("needs", "prefers", "conflicts", "implies", "retired", "preset"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"Plugin({name}={getattr(self, name)!r}): write a dict.")
        if not isinstance(self.priority, (int, float, type(None))):
            raise ValueError(f"Plugin(priority={self.priority!r}): write a number, or None for never under 'auto'.")
        if self.ranks not in ("one", "any") and not callable(self.ranks):
            raise ValueError(f"Plugin(ranks={self.ranks!r}): write 'one', 'any', or a function of options and ranks.")
        if self.divides not in ORDER:
            raise ValueError(f"Plugin(divides={self.divides!r}): write one of {', '.join(map(repr, ORDER))}.")
        if not isinstance(self.axes, tuple) or not all(isinstance(axis, Axis) for axis in self.axes):
            raise ValueError(f"Plugin(axes={self.axes!r}): write a tuple of Axis(…).")
        if self.for_options is not None and not callable(self.for_options):
            raise ValueError(f"Plugin(for_options={self.for_options!r}): write a function from options to fields.")

    def _check_options(self) -> None:
        if not isinstance(self.options, tuple) or not all(isinstance(option, Option) for option in self.options):
            raise ValueError(
                "Plugin(options=…): write a tuple of Option(…); use preset= for fixed arguments of the factory."
            )
        if self.options and not self.factory:
            raise ValueError("Plugin(options=…): an alias has the options of the plugin it stands for.")
        names = [option.name for option in self.options]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Plugin(options=…): {name!r} is declared twice.")

    def validate(self, owner: object, /, **values: Any) -> None:
        """Validate constructor arguments against the declared options, as on the command line.

        Args:
            owner: the object under construction, named in the message.
            values: values by option name. None passes where it is the default.

        Raises:
            SettingError: for the first value that has the wrong type or is not allowed; describes the allowed values.
        """
        validate_options(owner, self.options, **values)

    def with_options(self, given: Mapping[str, Any]) -> Plugin:
        """Return the descriptor for given options, which may change its fields; see `for_options`.

        Args:
            given: by name; defaults and `preset` are added.

        Raises:
            ValueError: if `for_options` returns something else than fields.
        """
        if self.for_options is None and not callable(self.ranks):
            return self
        options = {option.name: option.default for option in self.options} | dict(self.preset) | dict(given)
        fields = self.for_options(options) if self.for_options is not None else {}
        if not isinstance(fields, Mapping) or not all(hasattr(self, name) for name in fields):
            raise ValueError(f"for_options() returned {fields!r}: return a dict of fields of Plugin.")
        found = replace(self, **fields, for_options=None)
        if callable(found.ranks):
            found = replace(found, ranks=functools.partial(_bound, found.ranks, options))
        return found

    def beside(self, other: Plugin) -> Plugin:
        """Return the descriptor of this strategy combined with another one: what either needs, does and cannot take.

        Raises:
            ValueError: if there is no device for both.
        """
        devices = tuple(device for device in self.devices if not other.devices or device in other.devices)
        if self.devices and other.devices and not devices:
            raise ValueError(f"one works on {', '.join(self.devices)}, the other on {', '.join(other.devices)}.")
        either, both = (*self.provides, *other.provides), {*self.provides} & {*other.provides}
        return replace(
            self,
            devices=devices or other.devices,
            provides=tuple(name for name in dict.fromkeys(either) if name not in _GUARANTEES or name in both),
            needs=_merged(self.needs, other.needs),
            prefers=_merged(self.prefers, other.prefers),
            conflicts=_merged(self.conflicts, other.conflicts),
        )

    @property
    def works_alone(self) -> bool:
        """Whether a strategy can be the only one of a job: it divides the batch, or has an axis of samples."""
        return self.divides == ORDER[-1] or any(axis.samples for axis in self.axes)

    def made(self, plugin: Any) -> bool:
        """Return whether the factory is the class of an object, without importing anything."""
        cls = type(plugin)
        module, _, name = self.factory.partition(":")
        same = self.factory == f"{cls.__module__}:{cls.__qualname__}"
        return same or getattr(sys.modules.get(module), name, None) is cls


def check_composable(strategies: Sequence[tuple[str, Plugin]], others: Iterable[Any]) -> None:
    """Check that strategies can be combined: each once, and exactly one divides the batch and averages where needed.

    Args:
        strategies: names with descriptors.
        others: choices of strategies that can be combined, read for the message.

    Raises:
        ValueError: naming them, with what to do.
    """
    names = [name for name, _ in strategies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice: keep one.")
    batch = [name for name, descriptor in strategies if descriptor.divides == ORDER[-1]]
    if len(names) > 1 and len(batch) > 1:
        raise ValueError(f"{batch[0]!r} and {batch[1]!r} both divide the batch: keep one of them.")
    # One that divides something else can be alone if it has an axis of samples as well.
    if not batch and (len(names) > 1 or not strategies[0][1].works_alone):
        able = [repr(other.name) for other in others if other.descriptor.divides == ORDER[-1]]
        raise ValueError(f"none of them divides the batch: add {' or '.join(able) or 'one that does'}.")
    averages = any("averages-axes" in each.provides for _, each in strategies if each.divides == ORDER[-1])
    for name, descriptor in strategies:
        parted = [axis.name for axis in descriptor.axes if axis.averages]
        if batch and parted and not averages:
            able = [repr(other.name) for other in others if "averages-axes" in other.descriptor.provides]
            raise ValueError(
                f"{batch[0]!r} does not average gradients over the axis {parted[0]!r} of {name!r}: use "
                f"{' or '.join(able) or 'another strategy'} in its place."
            )


def _merged(
    first: Mapping[str, tuple[str, ...]], second: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    kinds = dict.fromkeys((*first, *second))
    return {kind: tuple(dict.fromkeys((*first.get(kind, ()), *second.get(kind, ())))) for kind in kinds}


def _bound(rule: RanksRule, options: Mapping[str, Any], _: Mapping[str, Any], num_ranks: int) -> str | None:
    return rule(options, num_ranks)
