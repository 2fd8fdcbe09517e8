"""Planning that depends on this machine: detect the environment and the devices through plugin objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from plugframe.core.config.request import Request
from plugframe.core.planning.installed import Installed
from plugframe.core.planning.options import configured
from plugframe.core.planning.plan import Choice
from plugframe.errors import PlugframeError, PluginContractError, PluginError, SettingError, UnsupportedError
from plugframe.hooks.world import World


def find_environment(
    asked: Choice | None, request: Request, installed: Installed, environ: Mapping[str, str], *, launching: bool
) -> Choice:
    """Return the environment and its plugin object: the requested one, else the first that detects this process.

    Raises:
        UnsupportedError: if none does.
    """
    if asked is not None:
        return installed.make(configured(asked, request, installed))
    for candidate in installed.candidates("environment"):
        variables, by_hand = candidate.descriptor.variables, "by-hand" in candidate.descriptor.provides
        if (launching and by_hand) or not all(name in environ for name in variables):
            continue
        try:
            made = installed.make(candidate)
            detected = _ask(made, "environment_detect")
        except PluginError as error:
            installed.note(f"{error} It was skipped under environment='auto'.")
            continue
        if detected:
            reason = f"auto: {', '.join(variables)} set" if variables else "auto: detected"
            return _settled(replace(candidate, reason=reason), made, request, installed)
    raise UnsupportedError(
        f"No installed environment recognises how this process was started.{installed.refused('environment')}"
    )


def find_accelerator(asked: Choice | None, strategy: Choice | None, request: Request, installed: Installed) -> Choice:
    """Return the accelerator and its plugin object: the requested one, else the best that the strategy supports.

    Raises:
        UnsupportedError: if there is no such device here.
    """
    if asked is None or asked.descriptor.best_of:
        return _best_accelerator(asked, strategy, request, installed)
    made = installed.make(configured(asked, request, installed))
    problem, cause = "no such device.", None
    try:
        if _ask(made, "accelerator_is_available"):
            return made
    except PluginError as error:
        problem, cause = str(error), error
    usable = ", ".join(each.name for each in installed.candidates("accelerator") if _usable(each, installed))
    raise UnsupportedError(
        f"accelerator={asked.name!r} is not available on this machine: {problem} Available here: {usable or 'none'}."
    ) from cause


def _best_accelerator(asked: Choice | None, strategy: Choice | None, request: Request, installed: Installed) -> Choice:
    passed: list[str] = []
    for candidate in installed.candidates("accelerator"):
        if asked and asked.descriptor.best_of not in candidate.descriptor.tags:
            continue
        if strategy and not _overlap(strategy.descriptor.devices, candidate.descriptor.devices):
            passed.append(f"{candidate.name} (strategy {strategy.name!r} does not run on it)")
            continue
        try:
            made = installed.make(candidate)
            if _ask(made, "accelerator_is_available"):
                start = f"{asked.reason}: the best available" if asked else "auto: the best available"
                reason = "; ".join([start, *(f"skipped {why}" for why in passed)])
                return _settled(replace(candidate, reason=reason), made, request, installed)
        except PluginError as error:
            installed.note(f"{error} It was skipped under accelerator='auto'.")
            passed.append(f"{candidate.name} (broken)")
        else:
            passed.append(f"{candidate.name} (no such device)")
    value = asked.name if asked else "auto"
    tried = f": skipped {', '.join(passed)}" if passed else "; none is installed"
    raise UnsupportedError(
        f"accelerator={value!r} finds no device on this machine{tried}.{installed.refused('accelerator')}"
    )


def find_devices(
    accelerator: Choice, environment: Choice, strategy: Choice | None, world: World | None, request: Request
) -> tuple[tuple[int, ...], str]:
    """Return the device of each local rank, with the reason.

    Raises:
        UsageError: if the devices asked for do not exist, or do not fit the processes that were started.
    """
    parse, setting = accelerator.instance.accelerator_parse_devices, request.get("devices")
    if world is not None and "simulated" in environment.descriptor.provides:
        devices = tuple(parse(devices=1)) * world.local_world_size
        why = "the first of this machine stands for all"
    elif setting is not None:
        value = list(setting.value) if isinstance(setting.value, tuple) else setting.value
        devices, why = tuple(parse(devices=value)), f"asked for in {setting.source}"
        if world is not None and count_of(value) is None:
            check_world(environment, len(devices), request)
    elif world is not None:
        try:
            devices = tuple(parse(devices=world.local_world_size))
        except SettingError as error:
            raise UnsupportedError(
                f"{environment.name} started {world.local_world_size} processes on this node, which do not fit "
                f"its devices: {error} Start as many processes as there are devices, or choose another accelerator."
            ) from error
        why = f"one for each process that {environment.name} started"
    elif strategy and strategy.descriptor.ranks == "one":
        devices, why = tuple(parse(devices=1)), f"auto: strategy {strategy.name!r} works with one rank"
    else:
        devices, why = tuple(parse(devices="auto")), "auto: all of this machine"
    if not devices:
        raise PluginContractError(f"{accelerator.origin} returned no device: it must return one for each rank.")
    return devices, why


def check_world(environment: Choice, num_processes: int | None, request: Request) -> None:
    """Check the started processes against the requested numbers, through the environment."""
    num_nodes = request.value("num_nodes")
    environment.instance.environment_validate(num_processes=num_processes, num_nodes=num_nodes)


def count_of(devices: Any) -> int | None:
    """Return the number of processes for a value of ``devices``, None if it depends on the machine."""
    if isinstance(devices, str):
        text = devices.strip()
        if "," in text:
            return len([part for part in text.split(",") if part.strip()])
        return int(text) if text.isdigit() else None
    if isinstance(devices, int):
        return devices if devices > 0 else None
    return len(devices) if isinstance(devices, (list, tuple)) else None


def _settled(choice: Choice, tried: Choice, request: Request, installed: Installed) -> Choice:
    """Return the choice with its options and plugin object; without options, reuse the object in `tried`."""
    choice = configured(choice, request, installed)
    return installed.make(choice) if choice.options else replace(choice, instance=tried.instance)


def _usable(candidate: Choice, installed: Installed) -> bool:
    try:
        return _ask(installed.make(candidate), "accelerator_is_available")
    except PluginError:
        return False  # a broken plugin is no alternative to suggest; it raises if it is requested


def _ask(choice: Choice, question: str) -> bool:
    """Return the result of a boolean hook; any exception becomes a `PluginError`."""
    try:
        return bool(getattr(choice.instance, question)())
    except PlugframeError:
        raise
    except Exception as error:
        raise PluginError(
            f"{choice.kind} {choice.origin} failed in {question}: {type(error).__name__}: {error}."
        ) from error


def _overlap(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two lists of device types have one in common; an empty one means any."""
    return not first or not second or bool(set(first) & set(second))
