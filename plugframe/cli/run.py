"""``plugframe run``: resolve the settings, then start the script on every rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from plugframe.cli.arguments import Shorthand, Words, split
from plugframe.cli.requirements import require_torch
from plugframe.cli.script_check import check, check_callback
from plugframe.cli.shared_options import disabled_variables
from plugframe.errors import PlugframeWarning, SettingError, UsageError
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.variables import FROM_COMMAND_LINE, VERBOSE

if TYPE_CHECKING:
    from plugframe.cli.start import Start
    from plugframe.core.config.request import Request
    from plugframe.core.planning.plan import Choice, Plan
    from plugframe.core.registry.registry import Registry


Command = TypeVar("Command", bound=Callable[..., Any])


class RunCommand(click.Command):
    """A command whose options may also stand after the script."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = Words(own=()) if ctx.resilient_parsing else split(args, self._long_options(), _shorthands, _takes_value)
        rest = super().parse_args(ctx, list(words.own))
        ctx.params["words"] = words
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[model]", "[OPTIONS]", "SCRIPT | -m MODULE", "[ARGS]..."]

    def _long_options(self) -> dict[str, click.Option]:
        options = [p for p in self.params if isinstance(p, click.Option)]
        return {name: option for option in options for name in option.opts if name.startswith("--")}


def _shorthands() -> dict[str, Shorthand]:
    """Return what the names of extensions stand for, and of environments that have an option for how much of it."""
    from plugframe.core.registry.registry import Registry
    from plugframe.errors import PluginError

    registry = Registry.discover()
    found = {}
    for entry in registry.entries("environment"):
        with suppress(PluginError):  # a broken one cannot be typed
            for option in registry.describe(entry).options[:1]:
                typed = f"--environment.{option.name.replace('_', '-')}"
                found[_dashed(entry.name)] = Shorthand(f"--environment={entry.name}", typed)
    return found | {_dashed(name): Shorthand(f"--plugins={name}") for name in registry.names("extension")}


def _takes_value(word: str) -> bool:
    """Return whether every installed plugin that has an option, as typed, takes a value for it: it is no switch."""
    from plugframe.core.registry.registry import Registry
    from plugframe.errors import PluginError
    from plugframe.hooks.spelling import parts

    try:
        kind, _, name = parts(word)
    except SettingError:
        return False  # it is no option at all
    registry, found = Registry.discover(), []
    for entry in registry.entries(kind):
        with suppress(PluginError):  # a broken one has no options
            found += [option.type for option in registry.describe(entry).options if option.name == name]
    return bool(found) and bool not in found


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _options_of_kinds(command: Command) -> Command:
    """Give a command an option for every kind of plugin: of many also in the singular, ``--logger``."""
    for kind in reversed(KINDS.values()):
        words = dict.fromkeys([f"--{kind.setting}", f"--{kind.setting.removesuffix('s')}" if kind.many else ""])
        option = click.option(
            *filter(None, words),
            metavar="NAMES" if kind.many else "NAME",
            multiple=kind.many,
            help=kind.help,
        )
        command = option(command)
    return command


#: Options about nodes and supervision, which are not settings of `Lite`.
_OF_NODES = (
    *("node_rank", "main_address", "main_port", "max_restarts", "rdzv_endpoint", "rdzv_timeout_s", "grace_s"),
    *("log_dir", "tee", "numa_binding", "debug_rank"),
)


@click.command("run", cls=RunCommand, short_help="Run a script on every rank.")
@click.option("--devices", metavar="N|LIST", help="Devices on each node: 8, -1 or auto for all, 0,2 for these two.")
@_options_of_kinds
@click.option("--mesh", metavar="AXIS=N,…", help="Ranks along each axis: data=2,tensor=4; -1 for those left.")
@click.option("--callbacks", "--callback", metavar="CLASSES", multiple=True, help="As package.module:Class.")
@click.option("--timeout", "timeout_s", metavar="SECONDS", help="How long one collective may take.")
@click.option(
    "--report-after", "report_after_s", metavar="SECONDS", help="When to say which rank is waited for; 30, 0 for never."
)
@click.option(
    "--diagnostics/--no-diagnostics",
    default=None,
    help="Record collective calls, to report ranks that do not come, and compare the ranks; on.",
)
@click.option(
    "--num-nodes",
    metavar="N|MIN:MAX",
    help="Machines of the job; run the command on each of them. MIN:MAX if they may come and go.",
)
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where nodes that come and go meet: at one that stays.")
@click.option("--node-rank", metavar="K", type=click.IntRange(min=0), help="Which of the nodes this is: 0, 1, …")
@click.option("--main-address", metavar="HOST", help="Address of node 0, for several nodes.")
@click.option(
    "--main-port",
    metavar="PORT",
    type=click.IntRange(1, 65535),
    help="Port of node 0, for several nodes; 29500.",
)
@click.option(
    "--rdzv-timeout", "rdzv_timeout_s", metavar="SECONDS", type=float, help="How long nodes wait for each other; 300."
)
@click.option(
    "--grace-period",
    "grace_s",
    metavar="SECONDS",
    type=float,
    help="How long ranks may go on after SIGTERM, to save; 30.",
)
@click.option("--max-restarts", metavar="N", type=click.IntRange(min=0), help="Start failed ranks again this often.")
@click.option("--log-dir", metavar="DIR", help="Write the output of each rank: DIR/attempt-0/rank-0.stdout.log, …")
@click.option(
    "--tee",
    metavar="0|1|2|3",
    help="Show of each rank, line by line: 1 stdout, 2 stderr, 3 both; 0:3,1:2 for some ranks. With --log-dir 3.",
)
@click.option(
    "--numa-binding",
    metavar="MODE",
    type=click.Choice(("node", "socket", "exclusive", "core-complex")),
    help="Bind ranks to CPUs near their GPU: node, socket, exclusive or core-complex, as torchrun does.",
)
@click.option(
    "--debug-rank", metavar="RANK", type=click.IntRange(min=0), help="Run one rank under pdb; the others wait for it."
)
@click.option(
    "--disable-plugin",
    "disabled",
    metavar="NAMES",
    multiple=True,
    help="Never import these: name, package or package:name; repeatable or a,b.",
)
@click.option("--config", metavar="FILE", help="A settings file, instead of the one found from here upward.")
@click.option("--dry-run", is_flag=True, help="Show what would run and why, and start nothing.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Show package and version of each plugin at the start; before SCRIPT."
)
def command(
    words: Words, dry_run: bool, verbose: bool, config: str | None, disabled: tuple[str, ...], **settings: Any
) -> None:
    """Run SCRIPT on every rank, with the plugins asked for by name.

    Options may stand before or after SCRIPT. After it, those that are not listed here go to the script, and
    everything after a bare -- does. `plugframe list-plugins` shows the names that are installed; before SCRIPT the
    name of an extension adds it: --lockstep is --plugins=lockstep. --simulate=64 runs one rank of 64, alone.
    Options of a plugin are typed with its kind, and those of loggers and extensions with their names too;
    `plugframe list-plugins NAME` shows them.

    \b
    Examples:
      plugframe run train.py --devices=8 --strategy=ddp --precision=bf16
      plugframe run --devices=auto train.py --epochs 3
      plugframe run train.py --strategy=ddp --strategy.timeout-s=60 --loggers=csv --logger.csv.folder=out
      plugframe run -m package.train --dry-run
      plugframe run train.py --devices=2 -- --devices is for the script
    """
    from plugframe.launch.inheritance import discard_parent_rank

    require_torch("plugframe run")
    discard_parent_rank()
    _check(words)
    for callback in filter(None, ",".join(settings["callbacks"]).split(",")):
        check_callback(callback, words.command)
    settings["num_nodes"], min_nodes = _bounds(settings["num_nodes"])
    about_nodes = {name: settings.pop(name) for name in _OF_NODES}
    variables = _variables(settings, config, words.options)
    if verbose:
        variables[VERBOSE] = "1"
    variables |= disabled_variables(disabled, {**os.environ, **variables})
    environ = {**os.environ, **variables}
    # Check script and options first: resolving has to import plugins.
    from plugframe.cli.start import Nodes, decide
    from plugframe.core.config.request import gather, variable
    from plugframe.core.planning.resolve import resolve
    from plugframe.core.registry.registry import Registry

    nodes = Nodes(min_nodes=min_nodes, **about_nodes)
    if min_nodes is not None:
        variables = {**variables, variable("num_nodes"): "auto"}  # the ranks get the number that joined
    with _told(words, config) as told:
        registry = Registry.discover(environ=environ)
        request = gather({}, environ=environ)
        request = replace(request, notes=(*request.notes, *registry.notes()))
        plan = resolve(request, registry, environ, launching=nodes.says_where)
        registry.require(choice.entry for choice in plan.all_choices() if choice.entry is not None)
        start = decide(plan, request, registry, command=words.command, variables=variables, nodes=nodes)
        _try(registry, [*plan.all_choices(), *([start.launcher] if start.launcher else [])])
    if dry_run:
        _show(plan, start, request, registry, told)
    else:
        start.go(registry)


def _show(plan: Plan, start: Start, request: Request, registry: Registry, told: Sequence[str]) -> None:
    """Print the plan and its reasons."""
    from plugframe.cli.plan_table import option_rows, plan_rows
    from plugframe.cli.table import show

    launcher = [start.launcher] if start.launcher is not None else []
    show(("what", "value", "why"), plan_rows(plan, request) + option_rows(launcher))
    strategies = [*plan.composed, plan.choices["strategy"]]
    described = [line for choice in strategies for line in choice.make(registry).strategy_describe()]
    for line in [
        *(f"note: {note}" for note in plan.notes if note not in told),
        *(f"strategy: {line}" for line in described),
        *start.lines(),
    ]:
        click.echo(line)
    click.echo("not seen here: what the script itself passes to Lite(...)")


def _bounds(num_nodes: str | None) -> tuple[str | None, int | None]:
    """Return the most nodes, and the fewest if their number may change: ``2:4``."""
    least, separator, most = (num_nodes or "").partition(":")
    if not separator:
        return num_nodes, None
    if not (least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)):
        raise SettingError(f"--num-nodes={num_nodes} is neither a number nor MIN:MAX, such as 2:4.")
    return most, int(least)


def _check(words: Words) -> None:
    try:
        check(words.command)
    except UsageError as error:
        if not words.valueless:
            raise
        value = f"{words.valueless}={words.command[0]}"
        raise SettingError(f"{error} For the value of the option before it, type {value}.") from error


def _try(registry: Registry, choices: Iterable[Choice]) -> None:
    """Create the plugins with options, so that an invalid option is reported once, not by every rank."""
    for choice in choices:
        if choice.options and choice.entry is not None and choice.instance is None:
            registry.make(choice.entry, choice.arguments)


def _variables(settings: Mapping[str, Any], config: str | None, options: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that pass the command line's settings, and only those, to the ranks."""
    from plugframe.core.config.request import LISTS, variable
    from plugframe.hooks.spelling import variable_of

    typed = {field: value for field, value in settings.items() if value not in (None, ())}
    texts = {field: ",".join(value) if field in LISTS else str(value) for field, value in typed.items()}
    variables = {variable(field): text for field, text in texts.items()}
    variables |= {variable_of(name): text for name, text in options.items()}
    variables[FROM_COMMAND_LINE] = ",".join([*texts, *options])
    if config is not None:
        variables["PLUGFRAME_CONFIG"] = str(Path(config).resolve())
    return variables


@contextmanager
def _told(words: Words, config: str | None) -> Iterator[list[str]]:
    """Print warnings as lines, and add to an error how to pass an option after the script to the script."""
    told: list[str] = []
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, PlugframeWarning):
                others(message, category, *where, **more)
            elif str(message) not in told:
                told.append(str(message))
                click.echo(f"plugframe: warning: {' '.join(str(message).split())}", err=True)

        warnings.showwarning = show
        warnings.simplefilter("always", PlugframeWarning)
        for note in words.notes:
            warnings.warn(PlugframeWarning(note), stacklevel=1)
        try:
            yield told
        except UsageError as error:
            hint = _for_the_script(str(error), words.late, config)
            if not hint:
                raise
            raise SettingError(f"{error} {hint}") from error


def _for_the_script(message: str, late: Sequence[str], config: str | None) -> str:
    for option in sorted(late, key=len, reverse=True):
        field = option.removeprefix("--").replace("-", "_")
        of_file = field == "config" and config is not None and Path(config).name in message
        if f"{field}=" in message or option in message or of_file:
            return f"If {option} is meant for the script, write it after a bare --."
    return ""
