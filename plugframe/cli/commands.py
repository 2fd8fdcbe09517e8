"""The click group ``plugframe``: one module per command, imported on use."""

from __future__ import annotations

import click

from plugframe import __version__
from plugframe.cli.group import Commands

__all__ = ["cli"]


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="plugframe", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run a PyTorch script on any device and any number of processes, with plugins chosen by name.

    \b
    Examples:
      plugframe run train.py --devices=8 --precision=bf16
      plugframe run train.py --dry-run
      plugframe list-plugins
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
