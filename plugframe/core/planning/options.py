"""Assign options to the selected plugins and validate them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from plugframe.core.config.request import Request, Setting
from plugframe.core.planning.installed import Installed
from plugframe.core.planning.plan import Choice, OptionValue
from plugframe.errors import PluginLoadError, SettingError, UsageError, closest
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.spelling import Given, plain, read

Note = Callable[[str], object]


def configured(choice: Choice, request: Request, installed: Installed) -> Choice:
    """Return the choice of a singular kind with its options.

    Raises:
        SettingError: for an option the plugin does not have, a wrong value, or options of an object in the code.
    """
    given = [each for each in request.options if each.kind == choice.kind]
    for each in given:
        if KINDS[choice.kind].composes and each.by != "file" and each.plugin and not _is_for(each, choice):
            raise SettingError(_not_in_use(each, [choice]))

    def of_another(each: Given) -> bool:
        """Return whether a settings file sets the option for another plugin, which that file selects."""
        if each.by != "file" or not each.plugin:
            return False
        try:
            return installed.choose(choice.kind, Setting(each.plugin, "")).qualified != choice.qualified
        except UsageError:
            return True  # not installed, but overridden by a stronger source

    elsewhere = [each for each in given if of_another(each)]
    if elsewhere:
        installed.note(_of_another(elsewhere, choice))
    return _settled(_configured(choice, [each for each in given if each not in elsewhere], installed.note))


def all_configured(kind: str, choices: Sequence[Choice], request: Request, installed: Installed) -> tuple[Choice, ...]:
    """Return the choices of a plural kind, each with the options for its name.

    Raises:
        SettingError: as `configured`, and for options of a plugin that is not in use.
    """
    given = [each for each in request.options if each.kind == kind]
    found = []
    for choice in choices:
        mine = [each for each in given if _is_for(each, choice)]
        named = any(other.instance is None and other.qualified == choice.qualified for other in choices)
        # Beside a named one, an object of the same class has options of its own.
        found.append(
            _settled(choice if choice.instance is not None and named else _configured(choice, mine, installed.note))
        )
    for each in given:
        if not any(_is_for(each, choice) for choice in choices):
            # A file may hold options of plugins that are not in use.
            _refuse(_not_in_use(each, choices), installed.note if each.by != "command" else None)
    return tuple(found)


def configured_together(choices: Sequence[Choice], request: Request, installed: Installed) -> list[Choice]:
    """Return composed plugins with their options: those of one are typed with its name, or are no other's.

    Raises:
        SettingError: as `configured`, for an option that several have, and for options of a plugin that is not in use.
    """
    given = [each for each in request.options if each.kind == choices[0].kind]
    mine: dict[str, list[Given]] = {choice.qualified: [] for choice in choices}
    for each in given:
        named = [choice for choice in choices if _is_for(each, choice)]
        having = [choice for choice in choices if any(option.name == each.name for option in choice.descriptor.options)]
        owners = named if each.plugin else having
        if not owners and each.plugin:
            _refuse(_not_in_use(each, choices), installed.note if each.by == "file" else None)
            continue
        if len(owners) > 1:
            words = " or ".join(replace(each, plugin=choice.name).spelled(each.name) for choice in owners)
            raise SettingError(f"{each.shown}: {' and '.join(c.name for c in owners)} have this option: write {words}.")
        mine[(owners or choices)[-1].qualified].append(each)
    return [_settled(_configured(choice, mine[choice.qualified], installed.note)) for choice in choices]


def _configured(choice: Choice, given: Sequence[Given], note: Note) -> Choice:
    if not given:
        return choice
    strongest = {each.name: each for each in sorted(given, key=lambda each: each.by != "file")}
    if choice.instance is not None:
        for each in strongest.values():
            if each.by != "file":
                raise SettingError(_made_already(each, choice))
        note(_of_another(list(strongest.values()), choice))
        return choice
    declared = {option.name: option for option in choice.descriptor.options}
    found = []
    for each in strongest.values():
        if each.name not in declared:
            # A variable may be meant for another program, as may one that names no setting.
            _refuse(_unknown(each, choice), note if each.by == "variable" else None)
            continue
        value = read(declared[each.name], each)
        preset = choice.descriptor.preset
        if each.name in preset and preset[each.name] != value:
            raise SettingError(
                f"{each.shown}: {choice.kind} {choice.name!r} stands for {each.name}={preset[each.name]!r}. Leave the "
                f"option out, or choose another {choice.kind}."
            )
        found.append(OptionValue(each.name, value, each.key, each.source))
    return replace(choice, options=tuple(found))


def _settled(choice: Choice) -> Choice:
    """Return the choice with the descriptor for its options; those of an object are its attributes."""
    given = choice.arguments
    if choice.instance is not None:
        names = [option.name for option in choice.descriptor.options if hasattr(choice.instance, option.name)]
        given = {name: getattr(choice.instance, name) for name in names}
    try:
        return replace(choice, descriptor=choice.descriptor.with_options(given))
    except Exception as error:
        raise PluginLoadError(f"{choice.kind} {choice.origin} is broken: {error}") from error


def _refuse(message: str, note: Note | None) -> None:
    if note is None:
        raise SettingError(message)
    note(f"{message} This has no effect.")


def _unknown(given: Given, choice: Choice) -> str:
    names = [option.name for option in choice.descriptor.options]
    hint = closest(given.spelled(given.name), map(given.spelled, names))
    has = f"Its options: {', '.join(names)}." if names else "It has no options at all."
    return f"{given.shown}: {choice.kind} {choice.origin} has no such option.{hint} {has}{_select(given, choice)}"


def _select(given: Given, choice: Choice) -> str:
    """Return a hint how to select the plugin of an option, if none was requested."""
    if not choice.reason.startswith("auto") or given.by == "variable":
        return ""
    how = f"name = 'NAME' to [{given.kind}]" if given.by == "file" else f"--{given.kind}=NAME"
    return f" Nobody asked for {choice.name!r}: for another {given.kind}, add {how}."


def _made_already(given: Given, choice: Choice) -> str:
    cls = type(choice.instance).__name__
    named = f"or {choice.kind}={choice.name!r} to Lite, " if choice.entry else ""
    return (
        f"{given.shown}, but {choice.kind}={cls} in the code is an object, which has its options: pass "
        f"{given.name}= to {cls}(...), {named}or leave the option out."
    )


def _not_in_use(given: Given, choices: Sequence[Choice]) -> str:
    used = ", ".join(choice.name for choice in choices) or "none"
    hint = closest(given.plugin, [choice.name for choice in choices])
    return (
        f"{given.shown}: {given.kind} {given.plugin!r} is not in use.{hint} In use: {used}; "
        f"{'--' if given.by == 'command' else ''}{KINDS[given.kind].setting}={given.plugin} adds it."
    )


def _of_another(given: Sequence[Given], choice: Choice) -> str:
    keys = ", ".join(each.key for each in given)
    has = "has" if len(given) == 1 else "have"
    name = type(choice.instance).__name__ if choice.instance is not None else repr(choice.name)
    return f"{keys} in {given[0].source} {has} no effect: {choice.kind}={name} was {choice.reason}."


def _is_for(given: Given, choice: Choice) -> bool:
    # Variables spell a name differently, and the command line's options reach the ranks as variables.
    return plain(given.plugin) in (plain(choice.name), plain(choice.qualified))
