"""From what was asked and what is installed to a plan, with the reason of every choice.

`resolve` depends on its arguments alone: settings, a catalogue, and the environment variables. What it must know
of this machine it asks of the plugin objects the catalogue makes (is there such a device, who started me).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from plugframe.core.config.request import Request
from plugframe.core.planning.candidates import Candidates, Catalogue
from plugframe.core.planning.capabilities import check_needs, fitting, names_of, needed, pick
from plugframe.core.planning.place import Where
from plugframe.core.planning.plan import Choice, Plan
from plugframe.errors import (
    PlugframeError,
    PlugframeWarning,
    PluginContractError,
    PluginError,
    SettingError,
    UnsupportedError,
)
from plugframe.hooks.context import REPORT_AFTER_S
from plugframe.hooks.launcher import Job
from plugframe.hooks.world import World

__all__ = ["Catalogue", "Job", "resolve", "resolve_launcher"]


def resolve(request: Request, catalogue: Catalogue, environ: Mapping[str, str], *, launching: bool = False) -> Plan:
    """Return the plan for `request`. What was passed over is warned of, on rank 0.

    Args:
        launching: it was typed how ranks are to be started, so that this process is none, whatever variables are set
            by hand.

    Raises:
        UsageError: (and its subclasses) if it cannot be met; nothing asked for is ever replaced.
        PluginError: if a plugin that was asked for is broken.
    """
    resolver = _Resolver(request, catalogue, environ, launching)
    try:
        return resolver.plan()
    finally:
        if resolver.world is None or resolver.world.global_rank == 0:
            _tell(resolver.candidates.notes)


def resolve_launcher(request: Request, catalogue: Catalogue, wants: str) -> Choice:
    """Return the launcher for a job that needs the capability `wants`: ``"script"``, ``"function"`` or
    ``"interactive"`` (a function that cannot be imported by name)."""
    candidates = Candidates(request, catalogue)
    try:
        return _launcher(candidates, wants)
    finally:
        _tell(note for note in candidates.notes if note not in request.notes)


def _launcher(candidates: Candidates, wants: str) -> Choice:
    asked = candidates.asked("launcher")
    if asked is not None and wants in asked.descriptor.provides:
        return candidates.configured(asked)
    able = [c for c in candidates.automatic("launcher") if wants in c.descriptor.provides]
    if asked is None:
        if not able:
            raise UnsupportedError(
                f"No installed launcher can start a {wants}: install one, or use `plugframe run`."
                f"{candidates.refused('launcher')}"
            )
        return candidates.configured(replace(able[0], reason="auto: the first that can do it"))
    what = {"script": "start a script again: call launch(fn) with a function", "function": "run a function"}
    detail = what.get(wants, "run a function that is typed at a prompt")
    instead = f", or use launcher={names_of(able)}" if able else ""
    raise UnsupportedError(f"launcher={asked.name!r} cannot {detail}{instead}.")


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        warnings.warn(note, PlugframeWarning, stacklevel=3)


class _Resolver:
    """One resolution, in the order in which one thing decides the next."""

    def __init__(self, request: Request, catalogue: Catalogue, environ: Mapping[str, str], launching: bool) -> None:
        self.request = request
        self.launching = launching
        self.environ = environ
        self.candidates = Candidates(request, catalogue)
        self.world: World | None = None

    def plan(self) -> Plan:
        environment = self._environment()
        launched = bool(environment.instance.environment_launched())
        if launched:
            self._validate(environment, _count(self.request.value("devices")))
            self.world = environment.instance.environment_world()
        strategy = self.candidates.asked("strategy")
        accelerator = self._accelerator(strategy)
        devices, why = self._devices(accelerator, environment, strategy)
        num_nodes = self.world.num_nodes if self.world else int(self.request.value("num_nodes", 1))
        world_size = self.world.world_size if self.world else len(devices) * num_nodes
        where = Where(accelerator.instance.accelerator_device(devices[0]).type, world_size)
        strategy = self._strategy(strategy, where)
        precision = self._precision(strategy, where)
        extensions = self.candidates.listed("extension", "plugins")
        loggers = self.candidates.listed("logger", "loggers")
        users = [strategy, accelerator, precision, *extensions, *loggers]
        asked = [choice for choice in [self.candidates.asked("checkpoint")] if choice]
        collective = needed(self.candidates, "collective", where, [*users, *asked])
        checkpoint = needed(self.candidates, "checkpoint", where, [*users, collective])
        settled = map(self.candidates.configured, (strategy, precision, collective, checkpoint))
        chosen = (accelerator, *settled, environment)
        choices = {choice.kind: choice for choice in chosen}
        self.candidates.asked("launcher")  # is not in a plan, but a wrong one is told now
        extensions = self.candidates.configured_many(extensions, "extension")
        loggers = self.candidates.configured_many(loggers, "logger")
        check_needs(choices, [*chosen, *extensions, *loggers])
        return Plan(
            choices=choices,
            devices=devices,
            devices_reason=why,
            num_nodes=num_nodes,
            launched=launched,
            world=self.world,
            extensions=extensions,
            loggers=loggers,
            timeout_s=self.request.value("timeout_s"),
            report_after_s=self.request.value("report_after_s", REPORT_AFTER_S),
            diagnostics=self.request.value("diagnostics", True),
            notes=tuple(self.candidates.notes),
            settings_file=str(self.request.file) if self.request.file else None,
            callbacks=_callbacks(self.request),
        )

    # ------------------------------------------------------------------ who started this process

    def _environment(self) -> Choice:
        choice = self.candidates.asked("environment")
        if choice is not None:
            return self.candidates.made(self.candidates.configured(choice))
        for candidate in self.candidates.automatic("environment"):
            variables = candidate.descriptor.variables
            if not all(v in self.environ for v in variables):
                continue
            if self.launching and "by-hand" in candidate.descriptor.provides:
                continue
            try:
                made = self.candidates.made(candidate)
                detected = _ask(made, "environment_detect")
            except PluginError as error:
                self.candidates.pass_over(f"{error} It was passed over under environment='auto'.")
                continue
            if detected:
                reason = f"auto: {', '.join(variables)} set" if variables else "auto: detected"
                return self.candidates.settled(replace(candidate, reason=reason), made)
        raise UnsupportedError(
            f"No installed environment recognises how this process was started.{self.candidates.refused('environment')}"
        )

    def _validate(self, environment: Choice, num_processes: int | None) -> None:
        num_nodes = self.request.value("num_nodes")
        environment.instance.environment_validate(num_processes=num_processes, num_nodes=num_nodes)

    # ------------------------------------------------------------------ on which devices

    def _accelerator(self, strategy: Choice | None) -> Choice:
        asked = self.candidates.asked("accelerator")
        if asked is None or asked.descriptor.best_of:
            return self._best_accelerator(strategy, asked)
        made = self.candidates.made(self.candidates.configured(asked))
        problem, cause = "no such device.", None
        try:
            if _ask(made, "accelerator_is_available"):
                return made
        except PluginError as error:
            problem, cause = str(error), error
        usable = ", ".join(c.name for c in self.candidates.automatic("accelerator") if self._usable(c))
        raise UnsupportedError(
            f"accelerator={asked.name!r} is not available on this machine: {problem} "
            f"Available here: {usable or 'none'}."
        ) from cause

    def _best_accelerator(self, strategy: Choice | None, asked: Choice | None) -> Choice:
        passed: list[str] = []
        for candidate in self.candidates.automatic("accelerator"):
            if asked and asked.descriptor.best_of not in candidate.descriptor.tags:
                continue
            if strategy and not _overlap(strategy.descriptor.devices, candidate.descriptor.devices):
                passed.append(f"{candidate.name} (strategy {strategy.name!r} does not run on it)")
                continue
            try:
                made = self.candidates.made(candidate)
                if _ask(made, "accelerator_is_available"):
                    start = f"{asked.reason}: the best available" if asked else "auto: the best available"
                    reason = "; ".join([start, *(f"passed over {why}" for why in passed)])
                    return self.candidates.settled(replace(candidate, reason=reason), made)
            except PluginError as error:
                self.candidates.pass_over(f"{error} It was passed over under accelerator='auto'.")
                passed.append(f"{candidate.name} (broken)")
            else:
                passed.append(f"{candidate.name} (no such device)")
        value = asked.name if asked else "auto"
        tried = f": passed over {', '.join(passed)}" if passed else "; none is installed"
        refused = self.candidates.refused("accelerator")
        raise UnsupportedError(f"accelerator={value!r} finds no device on this machine{tried}.{refused}")

    def _usable(self, candidate: Choice) -> bool:
        try:
            return bool(_ask(self.candidates.made(candidate), "accelerator_is_available"))
        except PluginError:
            return False  # what is broken is no way out; it is reported where it is asked for

    def _devices(
        self, accelerator: Choice, environment: Choice, strategy: Choice | None
    ) -> tuple[tuple[int, ...], str]:
        """Return the device of each local rank, and why these."""
        parse, setting, world = accelerator.instance.accelerator_parse_devices, self.request.get("devices"), self.world
        if world is not None and "simulated" in environment.descriptor.provides:
            devices = tuple(parse(devices=1)) * world.local_world_size
            why = "the first of this machine stands for all"
        elif setting is not None:
            value = list(setting.value) if isinstance(setting.value, tuple) else setting.value
            devices, why = tuple(parse(devices=value)), f"asked for in {setting.source}"
            if world is not None and _count(value) is None:
                self._validate(environment, len(devices))
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
            raise PluginContractError(f"{accelerator.origin} gave no device at all, where one for each rank is due.")
        return devices, why

    # ------------------------------------------------------------------ what runs there

    def _strategy(self, asked: Choice | None, where: Where) -> Choice:
        if asked is None:
            return pick(self.candidates, "strategy", where)
        problem = where.misfit(asked.descriptor)
        if problem:
            able = names_of(fitting(self.candidates, "strategy", where))
            use = f" use strategy={able}, or" if able else ""
            change = "devices=1" if asked.descriptor.ranks == "one" and where.world_size > 1 else "another accelerator"
            raise UnsupportedError(f"strategy={asked.name!r} {problem}:{use} choose {change}.")
        return asked

    def _precision(self, strategy: Choice, where: Where) -> Choice:
        choice = self.candidates.asked("precision")
        honoured = strategy.descriptor.precisions
        if choice is None:
            for candidate in fitting(self.candidates, "precision", where):
                if not honoured or candidate.name in honoured:
                    return replace(candidate, reason="auto: the first that strategy and device honour")
            refused = self.candidates.refused("precision")
            raise UnsupportedError(f"No installed precision fits strategy {strategy.name!r} and {where}.{refused}")
        if honoured and choice.name not in honoured:
            raise UnsupportedError(
                f"precision={choice.name!r} is not honoured by strategy {strategy.name!r}: "
                f"choose one of {', '.join(map(repr, honoured))}."
            )
        problem = where.misfit(choice.descriptor)
        if problem:
            raise UnsupportedError(f"precision={choice.name!r} {problem}: choose another precision or accelerator.")
        return choice


def _callbacks(request: Request) -> tuple[tuple[str, str], ...]:
    """Return the callbacks that were asked for by name, which no code shows, and where."""
    setting = request.get("callbacks")
    values = setting.value if setting is not None and isinstance(setting.value, (list, tuple)) else ()
    return tuple((name, setting.source) for name in values if setting is not None and isinstance(name, str))


def _ask(choice: Choice, question: str) -> bool:
    """Return a plugin's answer to a yes-or-no hook; whatever it raises instead is the plugin's fault."""
    try:
        return bool(getattr(choice.instance, question)())
    except PlugframeError:
        raise
    except Exception as error:
        raise PluginError(
            f"{choice.kind} {choice.origin} failed in {question}: {type(error).__name__}: {error}."
        ) from error


def _overlap(first: Sequence[str], second: Sequence[str]) -> bool:
    """Say whether two lists of device types have one in common; an empty one means any."""
    return not first or not second or bool(set(first) & set(second))


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
