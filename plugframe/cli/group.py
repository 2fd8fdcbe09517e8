"""The group of commands: finds them lazily, and turns every error into one line and an exit code."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from plugframe.errors import PlugframeError, RankFailedError, UsageError, closest
from plugframe.printable import printable

#: What a shell reports for a program ended by Ctrl-C: 128 + SIGINT.
INTERRUPTED = 130
COMMANDS = ("run", "list-plugins", "new-plugin", "doctor", "env", "checkpoint")


class Commands(click.Group):
    """A command ``some-name`` is the object ``command`` of the module ``plugframe.cli.some_name``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found = importlib.import_module(f"plugframe.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0].replace("_", "-")
        if name not in COMMANDS and not name.startswith("-"):
            hint = f" Type 'plugframe run {args[0]}'." if args[0].endswith(".py") else closest(name, COMMANDS)
            raise click.UsageError(f"{args[0]!r} is not a command.{hint} Commands: {', '.join(COMMANDS)}.")
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


def _one_line(message: str, exit_code: int) -> int:
    print(f"plugframe: {printable(' '.join(message.split()))}", file=sys.stderr)
    return exit_code
