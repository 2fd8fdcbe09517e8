"""Resolve a request and the installed plugins to a plan, with a reason for every choice.

`resolve` depends on its arguments alone: settings, a catalogue, and the environment variables. It is a pipeline:

1. `requested`: the plugins that the settings name.
2. `find_environment`, `find_accelerator`, `find_devices`: what this machine has, asked of plugin objects.
3. For each kind left to ``"auto"``: `Installed.candidates` → `compatible` → `ranked` → the first.
4. `configured`: the options of each; `check_needs`: that everything fits together. Then the `Plan`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

from plugframe.core.config.request import Request
from plugframe.core.planning.compatibility import (
    Target,
    asked_or_best,
    best,
    check_needs,
    compatible,
    misfit,
    names_of,
    wanted,
)
from plugframe.core.planning.composition import combined, mesh_layout
from plugframe.core.planning.installed import Installed
from plugframe.core.planning.machine import check_world, count_of, find_accelerator, find_devices, find_environment
from plugframe.core.planning.options import all_configured, configured, configured_together
from plugframe.core.planning.plan import Choice, Plan
from plugframe.core.planning.requested import Requested, requested
from plugframe.core.registry.catalogue import Catalogue
from plugframe.errors import PlugframeWarning, UnsupportedError
from plugframe.hooks.context import REPORT_AFTER_S
from plugframe.hooks.world import World

#: Kinds that are selected and configured here; the others are where this machine is asked about them.
_SELECTED = ("strategy", "precision", "collective", "checkpoint")


def resolve(request: Request, catalogue: Catalogue, environ: Mapping[str, str], *, launching: bool = False) -> Plan:
    """Return the plan for `request`; warn on rank 0 of skipped plugins.

    Args:
        launching: it was typed how ranks are to be started, so that this process is none, whatever variables are set
            by hand.

    Raises:
        UsageError: (and its subclasses) if it cannot be met; nothing asked for is ever replaced.
        PluginError: if a plugin that was asked for is broken.
    """
    notes = dict.fromkeys(request.notes)
    installed = Installed(catalogue, notes.setdefault)
    world = None
    try:
        asked = requested(request, installed)
        environment = find_environment(
            asked.single.get("environment"), request, installed, environ, launching=launching
        )
        if environment.instance.environment_launched():
            check_world(environment, count_of(request.value("devices")), request)
            world = environment.instance.environment_world()
        plan = _plan(request, asked, installed, environment, world)
        return replace(plan, notes=tuple(notes))
    finally:
        if world is None or world.global_rank == 0:
            warn_of(notes)


def warn_of(notes: Iterable[str]) -> None:
    """Warn of skipped plugins, attributed to the caller of the planning function."""
    for note in notes:
        warnings.warn(note, PlugframeWarning, stacklevel=3)


def _plan(request: Request, asked: Requested, installed: Installed, environment: Choice, world: World | None) -> Plan:
    single = dict(asked.single)
    composed = list(asked.composed)
    if composed:
        *composed, single["strategy"] = configured_together([*composed, single["strategy"]], request, installed)
        single["strategy"] = combined(single["strategy"], composed)
    for kind in _SELECTED[bool(composed) :]:
        if kind in single:
            single[kind] = configured(single[kind], request, installed)
    strategy = single.get("strategy")
    accelerator = find_accelerator(single.get("accelerator"), strategy, request, installed)
    devices, why = find_devices(accelerator, environment, strategy, world, request)
    num_nodes = world.num_nodes if world else int(request.value("num_nodes", 1))
    world_size = world.world_size if world else len(devices) * num_nodes
    target = Target(accelerator.instance.accelerator_device(devices[0]).type, world_size)
    asked = replace(asked, single=single)
    selected = [
        each if each.kind in single else configured(each, request, installed)
        for each in _selected(asked, accelerator, target, installed)
    ]
    choices = {choice.kind: choice for choice in (accelerator, *selected, environment)}
    extensions = all_configured("extension", asked.extensions, request, installed)
    loggers = all_configured("logger", asked.loggers, request, installed)
    check_needs(choices, [*choices.values(), *extensions, *loggers])
    mesh = mesh_layout([*composed, choices["strategy"]], request.get("mesh"), world_size)
    return Plan(
        choices=choices,
        devices=devices,
        devices_reason=why,
        num_nodes=num_nodes,
        launched=world is not None,
        world=world,
        composed=tuple(composed),
        mesh=mesh,
        extensions=extensions,
        loggers=loggers,
        timeout_s=request.value("timeout_s"),
        report_after_s=request.value("report_after_s", REPORT_AFTER_S),
        diagnostics=request.value("diagnostics", True),
    )


def _selected(
    asked: Requested, accelerator: Choice, target: Target, installed: Installed
) -> tuple[Choice, Choice, Choice, Choice]:
    """Return strategy, precision, collective and checkpoint: each as requested, or compatible with those before."""
    strategy = _strategy(asked.single.get("strategy"), target, installed)
    precision = _precision(asked.single.get("precision"), strategy, target, installed)
    users = [strategy, accelerator, precision, *asked.extensions, *asked.loggers]
    collective, checkpoint = asked.single.get("collective"), asked.single.get("checkpoint")
    collective = asked_or_best("collective", collective, target, [*users, *filter(None, [checkpoint])], installed)
    checkpoint = asked_or_best("checkpoint", checkpoint, target, [*users, collective], installed)
    return strategy, precision, collective, checkpoint


def _strategy(asked: Choice | None, target: Target, installed: Installed) -> Choice:
    if asked is None:
        return best("strategy", target, (), installed)
    problem = target.incompatibility(asked.descriptor)
    if problem:
        able = names_of(compatible(installed.candidates("strategy"), target))
        use = f" use strategy={able}, or" if able else ""
        change = "devices=1" if asked.descriptor.ranks == "one" and target.world_size > 1 else "another accelerator"
        raise UnsupportedError(f"strategy={asked.name!r} {problem}:{use} choose {change}.")
    return asked


def _precision(asked: Choice | None, strategy: Choice, target: Target, installed: Installed) -> Choice:
    conflicts = wanted("precision", [strategy], "conflicts")
    listed = strategy.descriptor.precisions
    if listed:
        installed.note(
            f"strategy {strategy.origin} lists the names of precisions, which is deprecated since version 2 of the "
            "plugin contract: replace precisions= of its descriptor by conflicts={'precision': (…)}."
        )

    def able(*, by_name: bool) -> list[Choice]:
        found = compatible(installed.candidates("precision", by_name=by_name), target, (), conflicts)
        return [choice for choice in found if not listed or choice.name in listed]

    if asked is None:
        for choice in able(by_name=False):
            return replace(choice, reason="auto: the first that strategy and device support")
        refused = installed.refused("precision")
        raise UnsupportedError(f"No installed precision fits strategy {strategy.name!r} and {target}.{refused}")
    problem = misfit(asked, {}, conflicts)
    if listed and asked.name not in listed:
        problem = f"is not supported by strategy {strategy.name!r}"
    if problem:
        use = names_of(able(by_name=True)) or "another strategy"
        raise UnsupportedError(f"precision={asked.name!r} {problem}: choose {use}.")
    problem = target.incompatibility(asked.descriptor)
    if problem:
        raise UnsupportedError(f"precision={asked.name!r} {problem}: choose another precision or accelerator.")
    return asked
