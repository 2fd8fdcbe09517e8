"""``plugframe list-plugins``: what is installed, from metadata alone; with ``--check``, whether it works."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

import click

from plugframe.cli.listing import Checked, Statuses, entries_of, row_of, show_rows
from plugframe.cli.requirements import require_torch
from plugframe.cli.shared_options import disabling
from plugframe.core.registry.registry import Entry, Registry
from plugframe.errors import (
    PluginContractError,
    PluginError,
    RefusedPluginError,
    UnknownPluginError,
    UsageError,
    closest,
)
from plugframe.hooks.descriptor import Plugin


@click.command("list-plugins", short_help="List the installed plugins, or show one.")
@click.argument("name", required=False)
@click.option("--kind", metavar="KIND", help="Only this kind: accelerator, strategy, precision, …")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
@click.option(
    "--check", is_flag=True, help="Load every descriptor and class and say what is broken; exit code 1 if any is."
)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    help="How long one descriptor may take to load, with --check; 10.",
)
@disabling
def command(name: str | None, kind: str | None, as_json: bool, check: bool, timeout_s: float) -> int:
    """List the installed plugins: the names that `plugframe run` and `Lite` take.

    With NAME, show what that plugin is and which options it has.

    \b
    Examples:
      plugframe list-plugins
      plugframe list-plugins --kind strategy
      plugframe list-plugins --kind strategy ddp
      plugframe list-plugins --check --json
    """
    if check:
        require_torch("plugframe list-plugins --check")
    registry = Registry.discover()
    for note in registry.notes():
        click.echo(f"plugframe: warning: {note}", err=True)
    entries = _named(registry, kind, name) if name else entries_of(registry, kind)
    if name and not check:
        from plugframe.tools.describe import show_plugins

        show_plugins(registry, entries, as_json=as_json)
        return 0
    checked = _check_all(registry, entries, timeout_s) if check else {}
    statuses = Statuses(registry)
    rows = [row_of(registry, entry, checked.get(entry), statuses) for entry in entries]
    if as_json:
        import json

        hidden = () if check else ("summary",)
        objects = [{key: value for key, value in row._asdict().items() if key not in hidden} for row in rows]
        click.echo(json.dumps(objects, indent=2))
    elif not rows:
        click.echo(f"No plugin of the kind {kind} is installed." if kind else "No plugin is installed.")
    else:
        show_rows(rows, check=check)
    return int(check and any(row.broken for row in rows))


def _named(registry: Registry, kind: str | None, name: str) -> list[Entry]:
    """Return the plugins of that name, one of each kind that has one.

    Raises:
        UnknownPluginError: with the closest match, if there is none.
    """
    published = entries_of(registry, kind)
    kinds = dict.fromkeys(entry.kind for entry in published if name in (entry.name, entry.qualified))
    if kinds or kind:
        return [registry.find(each, name) for each in kinds or [str(kind)]]
    known = sorted({entry.name for entry in published})
    raise UnknownPluginError(
        f"No plugin {name!r} is installed.{closest(name, known)} `plugframe list-plugins` shows all of them."
    )


def _check_all(registry: Registry, entries: Iterable[Entry], timeout_s: float) -> dict[Entry, Checked]:
    """Load descriptors in a subprocess, so that one that hangs or exits is reported like any other error."""
    from plugframe.cli.isolated import NoAnswer, each_apart

    refused = registry.refused()
    modules: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry not in refused:
            # What hangs in one module hangs for every name in it.
            modules.setdefault(entry.value.partition(":")[0], []).append(entry)
    found: dict[Entry, Checked] = {}
    groups = list(modules.values())
    for group, answer in each_apart(lambda group: [_checked(registry, e) for e in group], groups, timeout_s=timeout_s):
        for number, entry in enumerate(group):
            if isinstance(answer, NoAnswer):
                module = entry.value.partition(":")[0]
                found[entry] = f"broken: importing {module} {answer}. Fix or uninstall {entry.distribution}.", ""
            else:
                status, summary = answer[number]
                found[entry] = status, summary
    return found


def _checked(registry: Registry, entry: Entry) -> Checked:
    summary: list[str] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever it prints must not end up in the listing
            status = _loaded(registry, entry, summary)
    except PluginContractError as error:
        status = f"broken: {' '.join(str(error).removeprefix(f'{entry.origin} ').split())}"
    except PluginError as error:
        words = str(error).removeprefix(f"{entry.origin} ")
        broken = words.removeprefix("is broken: ")
        status = f"{'incompatible' if broken == words else 'broken'}: {' '.join(broken.split())}"
    except RefusedPluginError as error:
        status = f"stands for another plugin: {error}"
    except UsageError as error:
        status = f"broken: it stands for another plugin, and {error}"
    except Exception as error:  # noqa: BLE001  fields of a descriptor may hold anything, and that is to be told
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        status = f"broken: its descriptor {entry.value} is wrong ({cause}). Fix or uninstall {entry.distribution}."
    return status, "".join(summary)


def _loaded(registry: Registry, entry: Entry, summary: list[str]) -> str | None:
    """Return what is wrong with a plugin, None if nothing is; its summary is put into a list as soon as it is known."""
    descriptor = registry.describe(entry)
    if descriptor.alias_of:
        registry.find(entry.kind, descriptor.alias_of, look_inside=False)
    for kind, name in descriptor.implies.items():
        registry.find(kind, name, look_inside=False)
    summary.append(_summary(descriptor))
    absent = registry.absent(entry)
    if not absent and descriptor.factory:
        _check_class(registry, entry, descriptor)
    return f"missing {absent}" if absent else None


def _check_class(registry: Registry, entry: Entry, descriptor: Plugin) -> None:
    """Check the hooks of a plugin's class: one that was removed, misspelt or left out is found before it is used.

    No plugin is made: what a constructor asks of the machine is `plugframe doctor`'s to find.
    """
    from plugframe.core.planning.plan import Choice
    from plugframe.utils.hook_check import check_hooks

    cls = registry.factory(entry)
    if isinstance(cls, type):
        choice = Choice(kind=entry.kind, name=entry.name, reason="", descriptor=descriptor, entry=entry)
        check_hooks(choice, object.__new__(cls))


def _summary(descriptor: Plugin) -> str:
    stands_for = descriptor.alias_of or (f"the best {descriptor.best_of} here" if descriptor.best_of else "")
    if not stands_for:
        return descriptor.summary
    implied = " and ".join(f"{kind} {name}" for kind, name in descriptor.implies.items())
    alias = f"= {stands_for} with {implied}" if implied else f"= {stands_for}"
    return f"{alias}: {descriptor.summary}" if descriptor.summary else alias
