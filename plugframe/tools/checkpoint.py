"""``plugframe checkpoint``: show, verify and convert checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from plugframe import __version__
from plugframe.cli.requirements import require_torch
from plugframe.cli.shared_options import disabling
from plugframe.core.registry.registry import Entry, Registry
from plugframe.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointURLError,
    PluginError,
    SettingError,
    UnsupportedError,
    closest,
    names_text,
    printable,
)

if TYPE_CHECKING:
    from plugframe.checkpoint import Contents

#: The key under which a checkpoint keeps what an exact resume needs besides the user's objects.
_RUN = "__plugframe__"
_SHOWN_CHARACTERS = 100


@click.group("checkpoint", short_help="Inspect, verify and convert checkpoints.", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Show, verify or convert a checkpoint.

    \b
    Examples:
      plugframe checkpoint inspect runs/last
      plugframe checkpoint verify runs/last
      plugframe checkpoint convert runs/last last.ckpt
      plugframe checkpoint convert runs/last model.safetensors --weights=model
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    elif not context.resilient_parsing:
        require_torch("plugframe checkpoint")


@command.command("inspect", short_help="Show the contents of a checkpoint.")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@disabling
def inspect(path: str, as_json: bool) -> None:
    """Show the checkpoint at PATH: its origin, tensors and plain values. No tensor is read."""
    contents = _inspect(_plugins(Registry.discover()), path)
    state = {key: value for key, value in contents.state.items() if key != _RUN}
    tensors = dict(_tensors(state, ()))
    values = dict(_values(state, ()))
    if as_json:
        import json

        about = {
            "path": path,
            "format": contents.format,
            "version": contents.version,
            "size_bytes": contents.size_bytes,
            "files": contents.num_files,
            "info": _plain(contents.info),
            "resumes_exactly": _RUN in contents.state,
            "tensors": [_row(name, tensor) for name, tensor in tensors.items()],
            "values": {name: _plain(value) for name, value in values.items()},
        }
        click.echo(json.dumps(about, indent=2))
        return
    _show(contents, tensors, values)


@command.command("verify", short_help="Verify that a checkpoint is intact.")
@click.argument("path")
@disabling
def verify(path: str) -> None:
    """Verify every byte of the checkpoint at PATH; exit code 1, naming the damaged entry, if one differs."""
    plugins = _plugins(Registry.discover())
    _load(plugins, path, trusted=False)
    try:
        verifiable = _inspect(plugins, path).verifiable
    except CheckpointError:
        verifiable = False
    if verifiable:
        click.echo(f"{path} is intact: every byte matches what was written.")
    else:
        click.echo(f"{path} can be read, but its format has no checksums: changed values cannot be detected.")


@command.command("convert", short_help="Write a checkpoint in another form.")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--to", "name", metavar="NAME", help="The checkpoint plugin that writes DST; by default the other form.")
@click.option(
    "--weights", "key", metavar="KEY", help="Write only the bare state_dict at KEY, a plain safetensors file."
)
@click.option("--force", is_flag=True, help="Replace what is at DST.")
@click.option("--trusted", is_flag=True, help="Let SRC, if somebody else's tool wrote it, run code.")
@disabling
def convert(source: str, target: str, name: str | None, key: str | None, force: bool, trusted: bool) -> None:
    """Write the checkpoint SRC at DST in another form: one file for a folder, and a folder for a file.

    Tensors are read one at a time. SRC is verified first, and stays.

    \b
    Examples:
      plugframe checkpoint convert runs/last last.ckpt
      plugframe checkpoint convert last.ckpt runs/last --to=dcp
      plugframe checkpoint convert runs/last model.safetensors --weights=model
    """
    if os.path.lexists(target):
        if os.path.realpath(target) == os.path.realpath(source):
            raise SettingError(f"SRC and DST are both {target}: give another DST.")
        if not force:
            raise SettingError(f"{target} is there already: give another DST, or add --force.")
    if name is not None and key is not None:
        raise SettingError(f"--to={name} and --weights={key} contradict each other: give one of them.")
    registry = Registry.discover()
    plugins = _plugins(registry)
    writer = None if key is not None else _writer(registry, name, plugins, sharded=not os.path.isdir(source))
    state = _load(plugins, source, trusted=trusted)
    if writer is None:
        assert key is not None
        _write_weights(plugins, state, key, target)
    else:
        try:
            info: Mapping[str, Any] = _inspect(plugins, source).info
        except CheckpointError:
            info = {}
        writer.checkpoint_save(path=target, state=state, info=info or {"plugframe": __version__}, wait=True)
        writer.checkpoint_teardown()
    click.echo(f"{target} is written.")


# ---------------------------------------------------------------------- the plugins


class Reader:
    """Reads what checkpoints of any installed format say of the run that saved them."""

    def __init__(self) -> None:
        self._plugins = _plugins(Registry.discover())

    def info(self, path: str) -> Mapping[str, Any]:
        """Return plain values about the run.

        Raises:
            CheckpointError: if no installed plugin reads the checkpoint.
        """
        return _inspect(self._plugins, path).info


def _plugins(registry: Registry) -> dict[Entry, Any]:
    """Return every usable checkpoint plugin, set up for one process, the preferred one first."""
    found: list[tuple[int, Entry, Any]] = []
    for entry in registry.entries("checkpoint"):
        try:
            descriptor = registry.describe(entry)
            if descriptor.factory and registry.absent(entry) is None:
                found.append((descriptor.priority or 0, entry, registry.make(entry)))
        except PluginError:
            continue  # broken; reported by `list-plugins --check`
    for _, _, plugin in found:
        plugin.checkpoint_setup(context=_alone())
    return {entry: plugin for _, entry, plugin in sorted(found, key=lambda each: -each[0])}


def _alone() -> Any:
    """Return a context for this process outside of a job."""
    import torch

    from plugframe.base import Collective
    from plugframe.hooks.context import Context
    from plugframe.hooks.world import World

    context = Context(world=World(), device=torch.device("cpu"), hooks=Collective(), names={})
    context.hooks.collective_setup(context=context)
    return context


def _inspect(plugins: Mapping[Entry, Any], path: str) -> Contents:
    problems: list[CheckpointError] = []
    for plugin in plugins.values():
        if not hasattr(plugin, "inspect"):
            continue
        try:
            contents: Contents = plugin.inspect(path)
        except UnsupportedError:
            continue
        except CheckpointError as error:
            problems.append(error)
        else:
            return contents
    raise _telling(problems, path) or CheckpointError(f"No installed checkpoint plugin can say what {path} holds.")


def _load(plugins: Mapping[Entry, Any], path: str, *, trusted: bool) -> dict[str, Any]:
    problems: list[CheckpointError] = []
    for plugin in plugins.values():
        try:
            state: dict[str, Any] = plugin.checkpoint_load(path=path, trusted=trusted, lazy=True)
        except CheckpointError as error:
            problems.append(error)
        else:
            return state
    raise _telling(problems, path) or CheckpointError(f"No installed checkpoint plugin can read {path}.")


def _telling(problems: list[CheckpointError], path: str) -> CheckpointError | None:
    """Return the error of the plugin that recognises the checkpoint's format, if any does."""
    damaged: list[CheckpointError] = [error for error in problems if isinstance(error, CheckpointCorruptError)]
    # The first plugin that keeps to paths has nothing to say of a URL.
    told = damaged or [error for error in problems if not isinstance(error, CheckpointURLError)] or problems
    return told[0] if told else None


def _writer(registry: Registry, name: str | None, plugins: Mapping[Entry, Any], *, sharded: bool) -> Any:
    if name is not None:
        entry = registry.find("checkpoint", name)
        if entry not in plugins:
            registry.make(entry)  # says what it lacks
        return plugins[entry]
    for entry, plugin in plugins.items():
        if ("sharded" in registry.describe(entry).provides) == sharded:
            return plugin
    form = "a folder" if sharded else "one file"
    raise UnsupportedError(f"No installed checkpoint plugin writes {form}: give --to=NAME.")


# ---------------------------------------------------------------------- weights


def _write_weights(plugins: Mapping[Entry, Any], state: Mapping[str, Any], key: str, target: str) -> None:
    from torch import Tensor

    from plugframe.checkpoint import StoredTensor

    weights = _at(state, key)
    if not isinstance(weights, Mapping):
        raise SettingError(f"--weights={key} names a {type(weights).__name__}, not a state_dict.")
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, (Tensor, StoredTensor))}
    others = [str(name) for name in weights if str(name) not in tensors]
    if not tensors:
        held = ", ".join(map(str, weights)) or "nothing"
        raise SettingError(f"--weights={key} names a dict without tensors: it holds {held[:_SHOWN_CHARACTERS]}.")
    if others:
        click.echo(f"left out, since the file holds tensors only: {names_text(others)}", err=True)
    for plugin in [each for each in plugins.values() if hasattr(each, "export")]:
        try:
            plugin.export(target, tensors)
        except UnsupportedError:
            continue
        return
    raise UnsupportedError("No installed checkpoint plugin writes weights for other tools.")


def _at(state: Mapping[str, Any], key: str) -> Any:
    value: Any = state
    for word in [key] if key in state else key.split("."):
        if not isinstance(value, Mapping) or word not in value:
            keys = [str(each) for each in state if each != _RUN]
            raise SettingError(
                f"--weights={key} is not in the checkpoint.{closest(key, keys)} It holds: {', '.join(keys)}."
            )
        value = value[word]
    return value


# ---------------------------------------------------------------------- what is shown


def _tensors(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Yield every tensor in a tree with its name."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        yield _spell(path), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(item, (*path, number))


def _values(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Yield every plain value in a tree with its name; a list without tensors is one."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _values(item, (*path, key))
    elif isinstance(value, (list, tuple)) and (any(_tensors(value, ())) or any(isinstance(v, Mapping) for v in value)):
        for number, item in enumerate(value):
            yield from _values(item, (*path, number))
    else:
        yield _spell(path), value


def _spell(path: tuple[Any, ...]) -> str:
    return printable(".".join(map(str, path)), one_line=True)


def _row(name: str, tensor: Any) -> dict[str, Any]:
    dtype = str(tensor.dtype).partition(".")[2]
    return {"name": name, "dtype": dtype, "shape": list(tensor.shape), "bytes": tensor.nbytes}


def _plain(value: Any) -> Any:
    """Return a JSON-serializable form of a value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, int) and value.bit_length() > 1024:
        return hex(value)  # Python writes no decimal text of that length
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if value is None or (isinstance(value, (bool, int, float, str)) and finite) else repr(value)


def _show(contents: Contents, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    from plugframe.cli.table import show

    info = dict(contents.info)
    plugins = info.pop("plugins", None)
    info.pop("modules", None)  # shown by --json only: a configuration has dozens of values
    facts = {
        "format": contents.format + (f", version {contents.version}" if contents.version else ""),
        "size": f"{_bytes(contents.size_bytes)} in {contents.num_files} file{'s' * (contents.num_files != 1)}",
        "ranks": info.pop("world_size", None),
        **{str(name): value for name, value in info.items()},
        "plugins": "; ".join(_short(each, bare=True) for each in plugins.values())
        if isinstance(plugins, Mapping)
        else plugins,
        "resumes": "exactly" if _RUN in contents.state else "with what it holds",
        "tensors": f"{len(tensors)}, {_bytes(sum(tensor.nbytes for tensor in tensors.values()))}",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value is not None:
            shown = printable(_short(value, bare=True), one_line=True)
            click.echo(f"{printable(name, one_line=True).ljust(width)}  {shown}")
    if tensors:
        click.echo()
        rows = [_row(name, tensor) for name, tensor in tensors.items()]
        show(
            ["tensor", "dtype", "shape", "bytes"],
            [[r["name"], r["dtype"], _shape(r["shape"]), str(r["bytes"])] for r in rows],
        )
    if values:
        click.echo()
        show(["value", "is"], [[name, _short(value)] for name, value in values.items()])


def _shape(shape: list[int]) -> str:
    return "×".join(map(str, shape)) or "()"


def _short(value: Any, *, bare: bool = False) -> str:
    """Return a value as text, not too long; a string as it is if `bare`."""
    if bare and isinstance(value, str):
        return value
    try:
        text = repr(value)
    except ValueError:  # Python writes no decimal text of so long an integer
        text = "an integer too long to print"
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _bytes(size: int) -> str:
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"
