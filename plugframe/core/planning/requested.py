"""The first step of planning: collect the requested plugins and check them for contradictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plugframe.core.config.request import CODE, NAMES, Request, Setting, contradiction
from plugframe.core.planning.composition import COMPOSED, in_order
from plugframe.core.planning.installed import Installed, is_name
from plugframe.core.planning.plan import Choice
from plugframe.errors import PluginLoadError, SettingError, shown
from plugframe.hooks.kinds import KINDS, kind_of
from plugframe.hooks.spelling import is_composed, parts_of

#: Settings of the plugin objects in ``plugins=``, by kind; extensions are left out.
Objects = Mapping[str, list[Setting]]


@dataclass(frozen=True)
class Requested:
    """The requested plugins.

    Attributes:
        single: by kind, for kinds of one plugin; a kind that is ``"auto"`` is absent. Of composed strategies it is the
            one that divides the batch.
        composed: the other strategies, in the order in which they are applied.
        extensions: in the order asked for, those that another plugin implies at the end.
        loggers: in the order asked for.
    """

    single: Mapping[str, Choice]
    composed: tuple[Choice, ...]
    extensions: tuple[Choice, ...]
    loggers: tuple[Choice, ...]


def requested(request: Request, installed: Installed) -> Requested:
    """Return the plugins that the settings request.

    Raises:
        UsageError: if one is not installed, or was asked for twice in two ways.
        PluginLoadError: if one is broken.
    """
    objects = _objects(request.value("plugins", ()))
    implied, added = _implied(request, objects, installed)
    single = {kind: _single(kind, request, objects, implied, installed) for kind in NAMES if kind != COMPOSED}
    strategies = composed(COMPOSED, request, objects, implied, installed)
    single[COMPOSED] = strategies[-1] if strategies else None
    return Requested(
        single={kind: choice for kind, choice in single.items() if choice is not None},
        composed=tuple(strategies[:-1]),
        extensions=_listed("extension", request, [], added, installed),
        loggers=_listed("logger", request, objects.get("logger", []), [], installed),
    )


def _objects(plugins: Any) -> Objects:
    """Sort the objects in ``plugins=`` by kind."""
    found: dict[str, list[Setting]] = {}
    for plugin in plugins if isinstance(plugins, (list, tuple)) else (plugins,):
        kind = "extension" if isinstance(plugin, str) else kind_of(plugin)
        if kind != "extension":
            found.setdefault(kind, []).append(Setting(plugin, f"plugins= in {CODE}"))
    for kind, objects in found.items():
        if len(objects) > 1 and not KINDS[kind].many:
            raise SettingError(f"plugins= holds {len(objects)} objects of the kind {kind}: one can be in use.")
    return found


def _implied(request: Request, objects: Objects, installed: Installed) -> tuple[dict[str, Setting], list[Setting]]:
    """Return the settings of other kinds and the extensions that the requested plugins imply."""
    implied: dict[str, Setting] = {}
    added: list[Setting] = []
    for kind in NAMES:
        for setting in (request.get(kind), request.overridden.get(kind), *objects.get(kind, ())):
            if setting is None or (kind == COMPOSED and is_composed(setting.value)):
                continue
            asked, (origin, implies) = f"{kind}={shown(setting.value)}", _implications(kind, setting, installed)
            for other, value in implies.items():
                if other == "extension":
                    added.append(Setting(value, f"{asked}, which adds it"))
                    continue
                if other not in NAMES:
                    raise PluginLoadError(f"{origin} is broken: implies={{{other!r}: …}} names no kind of plugin.")
                new = Setting(value, f"{asked}, which stands for {other}={value!r}")
                rivals = [request.get(other), implied.get(other), *objects.get(other, ())]
                rival = next((each for each in rivals if each is not None), None)
                if rival is not None and not _same(installed.choose(other, rival), installed.choose(other, new)):
                    raise contradiction(other, rival, new)
                if other not in objects:
                    implied[other] = new
    return implied, added


def _implications(kind: str, setting: Setting, installed: Installed) -> tuple[str, Mapping[str, str]]:
    """Return a plugin's origin and what it implies; an alias counts by itself."""
    if not is_name(setting.value):
        choice = installed.choose(kind, setting)
        return choice.origin, choice.descriptor.implies
    entry = installed.catalogue.find(kind, str(setting.value))
    return entry.origin, installed.catalogue.describe(entry).implies


def _single(
    kind: str, request: Request, objects: Objects, implied: Mapping[str, Setting], installed: Installed
) -> Choice | None:
    """Return the requested setting of a singular kind, None for ``"auto"``."""
    setting, own = request.get(kind) or implied.get(kind), objects.get(kind)
    if own and setting:
        raise SettingError(
            f"{kind} is given twice: as {shown(setting.value)} in {setting.source}, and in plugins=. Keep one."
        )
    if own:
        return installed.choose(kind, own[0])
    if setting is None:
        return None
    choice, other = installed.choose(kind, setting), request.overridden.get(kind)
    if other is None:
        return choice
    rival = installed.choose(kind, other)
    # A name may stand for the best of several plugins, and another source may select one of them.
    if _same(choice, rival) or rival.descriptor.best_of in choice.descriptor.tags:
        return choice
    if choice.descriptor.best_of in rival.descriptor.tags:
        return rival
    raise contradiction(kind, setting, other)


def composed(
    kind: str, request: Request, objects: Objects, implied: Mapping[str, Setting], installed: Installed
) -> list[Choice]:
    """Return the strategies in the order in which they are applied: the one that divides the batch is the last."""
    setting, other = request.get(kind), request.overridden.get(kind)
    if not any(each is not None and is_composed(each.value) for each in (setting, other)):
        found = _single(kind, request, objects, implied, installed)
        if found is None or found.descriptor.works_alone:
            return [] if found is None else [found]
        return in_order([found], setting or Setting(found.name, "plugins="), installed)
    if objects.get(kind):
        raise SettingError(f"{kind} is given twice, the second time in plugins=. Put the object into the list {kind}=.")
    assert setting is not None
    choices = [installed.choose(kind, Setting(each, setting.source)) for each in parts_of(setting.value)]
    if other is not None:
        rivals = [installed.choose(kind, Setting(each, other.source)) for each in parts_of(other.value)]
        if sorted(each.qualified for each in choices) != sorted(each.qualified for each in rivals):
            raise contradiction(kind, setting, other)
    return in_order(choices, setting, installed)


def _listed(
    kind: str, request: Request, objects: list[Setting], added: list[Setting], installed: Installed
) -> tuple[Choice, ...]:
    """Return the choices of a plural kind."""
    field = KINDS[kind].setting
    setting, other = request.get(field), request.overridden.get(field)
    choices, rivals = _choices(kind, setting, installed), _choices(kind, other, installed)
    if setting and other and choices and [c.qualified for c in choices] != [c.qualified for c in rivals]:
        raise contradiction(field, setting, other)
    found = [*(choices or rivals), *(installed.choose(kind, each) for each in objects)]
    there = {choice.qualified for choice in found}
    more = {choice.qualified: choice for choice in (installed.choose(kind, each) for each in added)}
    return (*found, *(choice for name, choice in more.items() if name not in there))


def _choices(kind: str, setting: Setting | None, installed: Installed) -> list[Choice]:
    if setting is None:
        return []
    values: Any = setting.value if isinstance(setting.value, (list, tuple)) else (setting.value,)
    if kind == "extension":
        # `plugins` takes objects of any kind; those of other kinds are handled with their kind.
        values = [value for value in values if isinstance(value, str) or kind_of(value) == "extension"]
    choices = [installed.choose(kind, Setting(value, setting.source)) for value in values]
    named = [choice.qualified for choice in choices if choice.instance is None]
    for choice in choices:
        if choice.instance is None and named.count(choice.qualified) > 1:
            raise SettingError(f"{kind} {choice.name!r} is given twice in {setting.source}: keep one.")
    return choices


def _same(first: Choice, second: Choice) -> bool:
    return first.qualified == second.qualified
