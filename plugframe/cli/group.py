"""The command group: load commands lazily, and map errors to one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from plugframe.core.registry.entry_points import COMMAND, Entry, published
from plugframe.core.registry.policy import read_policy
from plugframe.errors import (
    PlugframeError,
    PluginContractError,
    PluginError,
    PluginLoadError,
    RankFailedError,
    SettingError,
    UsageError,
    closest,
    printable,
)

#: What a shell reports for a program ended by Ctrl-C: 128 + SIGINT.
INTERRUPTED = 130


class Commands(click.Group):
    """Commands by name, from the entry-point group ``plugframe.command``, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_commands(ctx))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _commands(ctx).get(cmd_name)
        return None if entry is None else _load(entry)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List every command with its summary, or with its load error."""
        rows = []
        for name, entry in _commands(ctx).items():
            try:
                rows.append((name, _load(entry).get_short_help_str(80)))
            except PluginError as error:
                rows.append((name, printable(str(error))))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0].replace("_", "-")
        commands = _commands(ctx)
        if name not in commands and not name.startswith("-"):
            hint = f" Type 'plugframe run {args[0]}'." if args[0].endswith(".py") else closest(name, commands)
            raise click.UsageError(f"{args[0]!r} is not a command.{hint} Commands: {', '.join(commands)}.")
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and exit: 0, 1 (a broken plugin), 2 (wrong usage), 130 (Ctrl-C), or a rank's code."""
        kwargs["standalone_mode"] = False
        sys.exit(self._run(*args, **kwargs))

    def _run(self, *args: Any, **kwargs: Any) -> int:
        try:
            code = super().main(*args, **kwargs)
        except click.ClickException as error:
            return _one_line(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            return INTERRUPTED
        except RankFailedError as error:
            print(error.report, file=sys.stderr)
            return error.exit_code
        except UsageError as error:
            return _one_line(str(error), 2)
        except PlugframeError as error:
            return _one_line(str(error), 1)
        return code if isinstance(code, int) else 0


def _commands(ctx: click.Context) -> Mapping[str, Entry]:
    """Return the commands of one invocation, looked up once."""
    key = f"{__name__}.commands"
    if key not in ctx.meta:
        ctx.meta[key] = _installed_commands()
    found: Mapping[str, Entry] = ctx.meta[key]
    return found


def _installed_commands() -> Mapping[str, Entry]:
    """Return the installed commands that may be used, built-ins first; a built-in's name is its own."""
    entries = [entry for entry in published().entries if entry.kind == COMMAND]
    try:
        policy = read_policy(os.environ)
        entries = [entry for entry in entries if not policy.refusal(entry)]
    except SettingError:  # the command itself reports it; help is there all the same
        entries = [entry for entry in entries if entry.builtin]
    found: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: not entry.builtin):
        found.setdefault(entry.name, entry)
    return found


def _load(entry: Entry) -> click.Command:
    module, _, attribute = entry.value.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        if entry.builtin:
            raise
        raise PluginLoadError(f"{entry.origin} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, click.Command):
        raise PluginContractError(f"{entry.origin} is {entry.value}, which is not a click.Command.")
    return found


def _one_line(message: str, exit_code: int) -> int:
    print(f"plugframe: {printable(' '.join(message.split()))}", file=sys.stderr)
    return exit_code
