"""From what was asked and what is installed to a plan, with the reason of every choice.

`resolve` depends on its arguments alone: settings, a catalogue, and the environment variables. What it must know
of this machine it asks of the plugin objects the catalogue makes (is there such a device, who started me).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from plugframe.errors import (
    PluginError,
    PlugframeWarning,
    SettingError,
    UnsupportedError,
)
from plugframe.hooks.descriptor import Plugin
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.launcher import Job
from plugframe.plan import Choice, Plan
from plugframe.registry import Entry
from plugframe.request import NAMES, Request, Setting, contradiction
from plugframe.world import World

__all__ = ["Catalogue", "Job", "resolve", "resolve_launcher"]


class Catalogue(Protocol):
    """What `resolve` needs of `plugframe.registry.Registry`."""

    def entries(self, kind: str | None = None) -> list[Entry]: ...
    def names(self, kind: str) -> list[str]: ...
    def find(self, kind: str, name: str) -> Entry: ...
    def shadowed(self, entry: Entry) -> bool: ...
    def describe(self, entry: Entry) -> Plugin: ...
    def make(self, entry: Entry, options: Mapping[str, Any] | None = None) -> Any: ...


def resolve(request: Request, catalogue: Catalogue, environ: Mapping[str, str]) -> Plan:
    """Return the plan for `request`.

    Raises:
        UsageError: (and its subclasses) if it cannot be met; nothing asked for is ever replaced.
    """
    return _Resolver(request, catalogue, environ).plan()


def resolve_launcher(request: Request, catalogue: Catalogue, wants: str) -> Choice:
    """Return the launcher for a job that needs the capability `wants`: ``"script"``, ``"function"`` or
    ``"interactive"`` (a function that cannot be imported by name)."""
    resolver = _Resolver(request, catalogue, {})
    resolver.imply()
    asked = resolver.asked("launcher", {})
    if asked is None:
        fitting = [c for c in resolver.automatic("launcher") if wants in c.descriptor.provides]
        if not fitting:
            raise UnsupportedError(f"No installed launcher can start a {wants}: install one, or use `plugframe run`.")
        return fitting[0]
    if wants not in asked.descriptor.provides:
        able = [c.name for c in resolver.automatic("launcher") if wants in c.descriptor.provides]
        what = {"script": "start a script again: call launch(fn) with a function", "function": "run a function"}
        detail = what.get(wants, "run a function that is typed at a prompt")
        raise UnsupportedError(f"launcher={asked.name!r} cannot {detail}, or use launcher={' or '.join(map(repr, able))}.")
    return asked


class _Resolver:
    """One resolution: what was asked, what is known so far, what was passed over."""

    def __init__(self, request: Request, catalogue: Catalogue, environ: Mapping[str, str]) -> None:
        self.request = request
        self.catalogue = catalogue
        self.environ = environ
        self.notes: list[str] = []
        self.implied: dict[str, Setting] = {}
        self.instances = _instances_by_kind(request.value("plugins", ()))

    # ------------------------------------------------------------------ the order of decisions

    def plan(self) -> Plan:
        self.imply()
        environment = self.environment()
        launched = bool(environment.instance.environment_launched())
        world: World | None = environment.instance.environment_world() if launched else None
        self.validate(environment, world)
        strategy = self.asked("strategy", {})
        accelerator = self.accelerator(strategy)
        devices, why = self.devices(accelerator, environment, world)
        num_nodes = world.num_nodes if world else int(self.request.value("num_nodes", 1))
        world_size = world.world_size if world else len(devices) * num_nodes
        device_type = accelerator.instance.accelerator_device(devices[0]).type
        where = _Where(device_type, world_size)
        strategy = self.fit(strategy or self.auto("strategy", where), where)
        precision = self.precision(strategy, where)
        collective = self.needed("collective", strategy, where)
        checkpoint = self.needed("checkpoint", strategy, where)
        chosen = (accelerator, strategy, precision, collective, checkpoint, environment)
        return Plan(
            choices={c.kind: c for c in chosen},
            devices=devices,
            devices_reason=why,
            num_nodes=num_nodes,
            launched=launched,
            world=world,
            extensions=tuple(self.listed("extension", "plugins")),
            loggers=tuple(self.listed("logger", "loggers")),
            timeout_s=self.request.value("timeout_s"),
            notes=tuple(self.notes),
        )

    def imply(self) -> None:
        """Take note of what an alias says about other kinds (``ddp_spawn`` is ``ddp`` with a launcher)."""
        for kind in NAMES:
            setting = self.request.get(kind)
            if setting is None or not isinstance(setting.value, (str, int)):
                continue
            descriptor = self.catalogue.describe(self.catalogue.find(kind, str(setting.value)))
            for other, value in descriptor.implies.items():
                given = self.request.get(other)
                source = f"{kind}={setting.value!r}, which stands for {other}={value!r}"
                if given and str(given.value) != value:
                    raise contradiction(other, given, Setting(value, source))
                self.implied[other] = Setting(value, source)

    # ------------------------------------------------------------------ what was asked by name or as an object

    def asked(self, kind: str, options: Mapping[str, Any]) -> Choice | None:
        """Return what was asked for of this kind, None for ``"auto"``."""
        setting = self.request.get(kind) or self.implied.get(kind)
        own = self.instances.get(kind)
        if own and setting:
            raise SettingError(f"{kind} is given twice: as {setting.value!r} in {setting.source}, and in plugins=. Keep one.")
        if own:
            return self.given(kind, Setting(own[0], "plugins= in the code"))
        if setting is None:
            return None
        choice = self.given(kind, setting)
        other = self.request.overridden.get(kind)
        if other is not None and self.given(kind, other).name != choice.name:
            raise contradiction(kind, Setting(_label(setting.value, choice), setting.source), other)
        return choice

    def given(self, kind: str, setting: Setting) -> Choice:
        """Return the choice for one setting: a name or an object."""
        reason = f"asked for in {setting.source}"
        if not isinstance(setting.value, (str, int)):
            return self.object(kind, setting.value, reason)
        name = str(setting.value)
        entry = self.catalogue.find(kind, name)
        descriptor = self.catalogue.describe(entry)
        if descriptor.alias_of:
            reason = f"{name!r} stands for it, {reason}"
            entry = self.catalogue.find(kind, descriptor.alias_of)
            descriptor = self.catalogue.describe(entry)
        return Choice(kind=kind, name=entry.name, reason=reason, descriptor=descriptor, entry=entry)

    def object(self, kind: str, instance: Any, reason: str) -> Choice:
        """Return the choice for an instance, with the descriptor its class is published under, if it is."""
        if isinstance(instance, type) or not _is_kind(instance, kind):
            hint = f" Pass an instance: {instance.__name__}()." if isinstance(instance, type) else ""
            raise SettingError(f"{kind}={instance!r} is neither the name of a plugin nor a {kind} object.{hint}")
        cls = type(instance)
        factory = f"{cls.__module__}:{cls.__qualname__}"
        for entry in self.catalogue.entries(kind):
            try:
                descriptor = self.catalogue.describe(entry)
            except PluginError:
                continue  # somebody else's broken package
            if descriptor.factory == factory and not descriptor.options:
                return Choice(
                    kind=kind, name=entry.name, reason=reason, descriptor=descriptor, entry=entry, instance=instance
                )
        own = getattr(cls, "plugin", None)
        descriptor = own if isinstance(own, Plugin) else Plugin(factory=factory)
        return Choice(kind=kind, name=cls.__name__, reason=reason, descriptor=descriptor, instance=instance)

    # ------------------------------------------------------------------ what "auto" comes to

    def automatic(self, kind: str) -> list[Choice]:
        """Return what ``"auto"`` may pick, the most eager first. A broken plugin is a warning, not the end."""
        found: list[Choice] = []
        for entry in self.catalogue.entries(kind):
            if self.catalogue.shadowed(entry):
                continue
            try:
                descriptor = self.catalogue.describe(entry)
            except PluginError as error:
                self.pass_over(str(error))
                continue
            if descriptor.priority is not None and descriptor.factory:
                reason = f"auto: priority {descriptor.priority}"
                found.append(Choice(kind=kind, name=entry.name, reason=reason, descriptor=descriptor, entry=entry))
        return sorted(found, key=lambda c: -(c.descriptor.priority or 0))

    def auto(self, kind: str, where: _Where, *, needs: Iterable[str] = ()) -> Choice:
        """Return the most eager plugin of a kind that fits."""
        for choice in self.automatic(kind):
            if where.misfit(choice.descriptor) is None and set(needs) <= set(choice.descriptor.provides):
                return _because(choice, f"auto: the first that fits {where}")
        wanted = f" providing {', '.join(needs)}" if needs else ""
        raise UnsupportedError(f"No installed {kind}{wanted} fits {where}. Installed: {', '.join(self.catalogue.names(kind))}.")

    def pass_over(self, why: str) -> None:
        """Keep and tell why something installed was not considered."""
        if why not in self.notes:
            self.notes.append(why)
            warnings.warn(why, PlugframeWarning, stacklevel=2)

    # ------------------------------------------------------------------ kind by kind

    def environment(self) -> Choice:
        choice = self.asked("environment", {})
        if choice is not None:
            return self.made(choice)
        for candidate in self.automatic("environment"):
            variables = candidate.descriptor.variables
            if not all(v in self.environ for v in variables):
                continue
            try:
                made = self.made(candidate)
                detected = made.instance.environment_detect()
            except PluginError as error:
                self.pass_over(str(error))
                continue
            if detected:
                return _because(made, f"auto: {', '.join(variables)} set" if variables else "auto: detected")
        raise UnsupportedError("No installed environment recognises how this process was started.")

    def validate(self, environment: Choice, world: World | None) -> None:
        if world is None:
            return
        num_nodes = self.request.value("num_nodes")
        devices = self.request.get("devices")
        count = _count(devices.value) if devices else None
        environment.instance.environment_validate(
            num_processes=count, num_nodes=int(num_nodes) if num_nodes is not None else None
        )

    def accelerator(self, strategy: Choice | None) -> Choice:
        setting = self.request.get("accelerator")
        tag = self.tag(setting)
        if setting is None and "accelerator" not in self.instances or tag:
            return self.best_accelerator(strategy, setting, tag)
        choice = self.made(self.asked("accelerator", {}))
        problem = _unavailable(choice)
        if problem:
            usable = [c.name for c in self.automatic("accelerator") if self.usable(c)]
            raise UnsupportedError(
                f"accelerator={choice.name!r} is not available on this machine: {problem}. "
                f"Available here: {', '.join(usable) or 'none'}."
            )
        return choice

    def tag(self, setting: Setting | None) -> str:
        """Return the tag a name such as ``gpu`` stands for the best of."""
        if setting is None or not isinstance(setting.value, str):
            return ""
        return self.catalogue.describe(self.catalogue.find("accelerator", setting.value)).best_of

    def best_accelerator(self, strategy: Choice | None, setting: Setting | None, tag: str) -> Choice:
        passed: list[str] = []
        allowed = strategy.descriptor.devices if strategy else ()
        for candidate in self.automatic("accelerator"):
            if tag and tag not in candidate.descriptor.tags:
                continue
            types = candidate.descriptor.devices
            if allowed and types and not set(allowed) & set(types):
                passed.append(f"{candidate.name}: strategy {strategy.name!r} does not run on it" if strategy else "")
                continue
            try:
                made = self.made(candidate)
            except PluginError as error:
                self.pass_over(f"{error} It was passed over under accelerator='auto'.")
                passed.append(f"{candidate.name}: broken")
                continue
            problem = _unavailable(made)
            if problem is None:
                why = f"; passed over {', '.join(passed)}" if passed else ""
                start = f"{setting.value!r} stands for the best available" if tag and setting else "auto: the best available"
                return _because(made, start + why)
            passed.append(f"{candidate.name}: {problem}")
        asked = f"accelerator={setting.value!r}" if setting else "accelerator='auto'"
        raise UnsupportedError(f"{asked} finds no device on this machine ({'; '.join(passed) or 'none installed'}).")

    def usable(self, candidate: Choice) -> bool:
        try:
            return _unavailable(self.made(candidate)) is None
        except PluginError:
            return False

    def devices(self, accelerator: Choice, environment: Choice, world: World | None) -> tuple[tuple[int, ...], str]:
        setting = self.request.get("devices")
        parse = accelerator.instance.accelerator_parse_devices
        if setting is not None:
            return tuple(parse(devices=_devices(setting.value))), f"asked for in {setting.source}"
        if world is None:
            return tuple(parse(devices="auto")), "auto: all of this machine"
        try:
            devices = tuple(parse(devices=world.local_world_size))
        except SettingError as error:
            raise UnsupportedError(
                f"{environment.name} started {world.local_world_size} processes on this node, which do not fit "
                f"its devices: {error} Start as many processes as there are devices, or choose another accelerator."
            ) from error
        return devices, f"one for each process that {environment.name} started"

    def fit(self, strategy: Choice, where: _Where) -> Choice:
        problem = where.misfit(strategy.descriptor)
        if problem:
            able = [c.name for c in self.automatic("strategy") if where.misfit(c.descriptor) is None]
            use = f" use strategy={' or '.join(map(repr, able))}, or" if able else ""
            change = "devices=1" if "rank" in problem else "another accelerator"
            raise UnsupportedError(f"strategy={strategy.name!r} {problem}:{use} choose {change}.")
        return strategy

    def precision(self, strategy: Choice, where: _Where) -> Choice:
        choice = self.asked("precision", {})
        honoured = strategy.descriptor.precisions
        if choice is None:
            for candidate in self.automatic("precision"):
                if where.misfit(candidate.descriptor) is None and (not honoured or candidate.name in honoured):
                    return _because(candidate, "auto: the first that strategy and device honour")
            raise UnsupportedError(f"No installed precision fits strategy {strategy.name!r} and {where}.")
        if honoured and choice.name not in honoured:
            raise UnsupportedError(
                f"precision={choice.name!r} is not honoured by strategy {strategy.name!r}: "
                f"choose one of {', '.join(map(repr, honoured))}."
            )
        problem = where.misfit(choice.descriptor)
        if problem:
            raise UnsupportedError(f"precision={choice.name!r} {problem}: choose another precision or accelerator.")
        return choice

    def needed(self, kind: str, strategy: Choice, where: _Where) -> Choice:
        """Return the plugin of a kind the strategy relies on, with the capabilities it needs."""
        needs = strategy.descriptor.needs.get(kind, ())
        choice = self.asked(kind, {})
        if choice is None:
            found = self.auto(kind, where, needs=needs)
            return _because(found, f"{found.reason}, {strategy.name} needs {', '.join(needs)}") if needs else found
        lacking = sorted(set(needs) - set(choice.descriptor.provides))
        problem = where.misfit(choice.descriptor)
        if lacking or problem:
            why = f"does not provide {', '.join(lacking)}, which strategy {strategy.name!r} needs" if lacking else problem
            able = [
                c.name
                for c in self.automatic(kind)
                if set(needs) <= set(c.descriptor.provides) and where.misfit(c.descriptor) is None
            ]
            raise UnsupportedError(f"{kind}={choice.name!r} {why}: choose {' or '.join(map(repr, able)) or 'another'}.")
        return choice

    def listed(self, kind: str, field: str) -> list[Choice]:
        """Return the choices for a setting that takes any number of names and objects."""
        setting = self.request.get(field)
        if setting is None:
            return []
        values = setting.value if isinstance(setting.value, (list, tuple)) else (setting.value,)
        if kind == "extension":
            values = [v for v in values if isinstance(v, str) or _kind_of(v) == "extension"]
        choices = [self.given(kind, Setting(v, setting.source)) for v in values]
        names = [c.name for c in choices if c.instance is None]
        for name in names:
            if names.count(name) > 1:
                raise SettingError(f"{kind} {name!r} is given twice in {setting.source}: keep one.")
        return choices

    def made(self, choice: Choice | None) -> Choice:
        """Return the choice with its object made, to ask it about this machine."""
        assert choice is not None
        if choice.instance is not None:
            return choice
        assert choice.entry is not None
        return _with(choice, instance=self.catalogue.make(choice.entry))


class _Where:
    """Where plugins have to work: a device type and a number of ranks."""

    def __init__(self, device_type: str, world_size: int) -> None:
        self.device_type = device_type
        self.world_size = world_size

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} on {self.device_type}"

    def misfit(self, descriptor: Plugin) -> str | None:
        """Say why a plugin does not fit here, None if it does."""
        if descriptor.ranks == "one" and self.world_size > 1:
            return f"works with one rank, and there are {self.world_size}"
        if descriptor.devices and self.device_type not in descriptor.devices:
            return f"works on {', '.join(descriptor.devices)}, and the device is {self.device_type}"
        return None


def _with(choice: Choice, **changes: Any) -> Choice:
    fields = ("kind", "name", "reason", "descriptor", "entry", "instance")
    return Choice(**{f: changes.get(f, getattr(choice, f)) for f in fields})


def _because(choice: Choice, reason: str) -> Choice:
    return _with(choice, reason=reason)


def _label(value: Any, choice: Choice) -> Any:
    return value if isinstance(value, (str, int)) else choice.name


def _unavailable(choice: Choice) -> str | None:
    """Say why an accelerator is not there, None if it is. A plugin that fails to answer is not there."""
    try:
        if choice.instance.accelerator_is_available():
            return None
    except Exception as error:
        warnings.warn(
            f"{choice.entry.origin if choice.entry else choice.name} failed to say whether it is available: "
            f"{type(error).__name__}: {error}",
            PlugframeWarning,
            stacklevel=2,
        )
        return f"{type(error).__name__}: {error}"
    return "no such device"


def _devices(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else list(value) if isinstance(value, Sequence) else value


def _count(devices: Any) -> int | None:
    """Return how many processes a value of ``devices`` means, None if that depends on the machine."""
    if isinstance(devices, str):
        text = devices.strip()
        if "," in text:
            return len([part for part in text.split(",") if part.strip()])
        return int(text) if text.isdigit() else None
    if isinstance(devices, int):
        return devices if devices > 0 else None
    return len(devices) if isinstance(devices, (list, tuple)) else None


def _kind_of(instance: Any) -> str:
    """Return the kind of a plugin object, by the provider hooks its class has."""
    for kind in KINDS:
        if kind != "extension" and _is_kind(instance, kind):
            return kind
    return "extension"


def _is_kind(instance: Any, kind: str) -> bool:
    if kind == "extension":
        return True
    spec = KINDS[kind].spec
    methods = [getattr(type(instance), name, None) for name in vars(spec) if name.startswith(f"{kind}_")]
    # A wrapper has the hook's name too, but it is an extension's way in, not a provider.
    return any(m is not None and not (getattr(m, "plugframe_impl", None) or {}).get("wrapper") for m in methods)


def _instances_by_kind(plugins: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for plugin in plugins if isinstance(plugins, (list, tuple)) else (plugins,):
        if not isinstance(plugin, str):
            found.setdefault(_kind_of(plugin), []).append(plugin)
    found.pop("extension", None)
    for kind, instances in found.items():
        if len(instances) > 1 and not KINDS[kind].many:
            raise SettingError(f"plugins= holds {len(instances)} objects of the kind {kind}: one can be in use.")
    return found
