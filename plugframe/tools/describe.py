"""``plugframe list-plugins NAME``: print a plugin's descriptor and options."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from plugframe.core.registry.registry import Entry, Registry
from plugframe.hooks.descriptor import Plugin
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.option import Option
from plugframe.hooks.spelling import typed


def show_plugins(registry: Registry, entries: list[Entry], *, as_json: bool) -> None:
    """Print the descriptors of these plugins, without importing the implementations."""
    with contextlib.redirect_stdout(sys.stderr):  # what a descriptor prints is no part of the answer
        found = [(entry, *_followed(registry, entry)) for entry in entries]
    if as_json:
        import json

        objects = [_as_object(registry, entry, own, real, descriptor) for entry, own, real, descriptor in found]
        click.echo(json.dumps(objects, indent=2, default=str))
        return
    for number, (entry, own, real, descriptor) in enumerate(found):
        click.echo("\n" * bool(number) + _headline(entry, own, real, descriptor))
        absent = registry.absent(real)
        if absent:
            click.echo(f"missing {absent}")
        _show_options(entry, real, descriptor)


def _followed(registry: Registry, entry: Entry) -> tuple[Plugin, Entry, Plugin]:
    """Return the descriptor of a name, and entry and descriptor of what it stands for: for most, itself."""
    own = registry.describe(entry)
    real = registry.find(entry.kind, own.alias_of) if own.alias_of else entry
    return own, real, registry.describe(real)


def _headline(entry: Entry, own: Plugin, real: Entry, descriptor: Plugin) -> str:
    lines = [f"{entry.kind} {entry.name} ({entry.distribution} {entry.version}): {own.summary}"]
    if real is not entry:
        implied = "".join(f", with {kind} {name}" for kind, name in own.implies.items())
        lines.append(f"stands for {real.name} ({real.distribution} {real.version}){implied}: {descriptor.summary}")
    fixed = ", ".join(f"{name}={value!r}" for name, value in descriptor.preset.items())
    return "\n".join([*lines, *([f"stands for {fixed}"] if fixed else [])])


def _show_options(entry: Entry, real: Entry, descriptor: Plugin) -> None:
    options = [option for option in descriptor.options if option.name not in descriptor.preset]
    if not options:
        click.echo("It has no options." if not descriptor.best_of else "The options are those of the one it comes to.")
        return
    from plugframe.cli.table import show

    rows = [
        [
            typed(entry.kind, real.name if KINDS[entry.kind].many else "", option.name),
            _default(option),
            option.allowed,
            option.help,
        ]
        for option in options
    ]
    show(("option", "default", "value", "help"), rows)
    section = f"{entry.kind}.{real.name}" if KINDS[entry.kind].many else entry.kind
    first = options[0].name
    click.echo(f"In a settings file: {first} = … in [tool.plugframe.{section}]; in code: {_called(descriptor, first)}.")


def _called(descriptor: Plugin, first: str) -> str:
    module, _, name = descriptor.factory.partition(":")
    return f"{name}({first}=…), from {module}"


def _default(option: Option) -> str:
    if isinstance(option.default, bool):
        return str(option.default).lower()
    return "" if option.default is None else str(option.default)


def _as_object(registry: Registry, entry: Entry, own: Plugin, real: Entry, descriptor: Plugin) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "package": entry.distribution,
        "version": entry.version,
        "summary": own.summary,
        "stands_for": real.name if real is not entry else own.best_of,
        "implies": dict(own.implies),
        "factory": descriptor.factory,
        "missing": registry.absent(real) or "",
        "api": own.api,
        "preset": dict(descriptor.preset),
        "options": [
            {
                "name": option.name,
                "typed": typed(entry.kind, real.name if KINDS[entry.kind].many else "", option.name),
                "type": _type_name(option),
                "default": option.default,
                "help": option.help,
                "choices": list(option.choices),
                "minimum": option.minimum,
                "maximum": option.maximum,
                "above": option.above,
            }
            for option in descriptor.options
        ],
    }


def _type_name(option: Option) -> str:
    """Return the type of an option as it is written in Python."""
    return str(option.type) if option.container else option.type.__name__
