"""``plugframe env``: print versions, devices and variables for bug reports."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from typing import Any

import click

from plugframe import __version__, _compat
from plugframe.cli.shared_options import disabling
from plugframe.core.registry.registry import Registry
from plugframe.errors import PluginError


@click.command("env", short_help="Show versions, devices and plugins.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@disabling
def command(as_json: bool) -> None:
    """Show versions, devices, plugins and variables, for a bug report.

    \b
    Examples:
      plugframe env
      plugframe env --json
    """
    registry = Registry.discover()
    sections = {
        "system": _system(),
        "devices": _devices(registry),
        "packages": _packages(registry),
        "plugins": _plugins(registry),
        "variables": _variables(registry),
    }
    if as_json:
        import json

        click.echo(json.dumps(sections, indent=2))
        return
    for title, facts in sections.items():
        click.echo(f"{title}:")
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            click.echo(f"  {name.ljust(width)}  {value}")
        if not facts:
            click.echo("  none")


def _system() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "plugframe": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "executable": sys.executable,
        "os": platform.platform(),
        "cpus": f"{os.cpu_count()}, {usable} usable",
        "memory": f"{pages / 2**30:.1f} GiB",
        **_torch(),
    }


def _torch() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001  a broken torch is what the bug report may be about
        return {"pytorch": f"does not import: {type(error).__name__}: {error}"}
    # What it is built for: versions of vendors' toolkits, each under its own name, None where it is not.
    build = {name: value for name, value in vars(torch.version).items() if isinstance(value, str)}
    known = ("__name__", "__doc__", "__package__", "__file__", "__cached__", "__version__")
    return {
        "pytorch": torch.__version__,
        **{f"pytorch {name}": value for name, value in build.items() if name not in known},
    }


def _devices(registry: Registry) -> dict[str, str]:
    return {entry.name: found for entry in registry.entries("accelerator") if (found := _found(registry, entry))}


def _found(registry: Registry, entry: Any) -> str:
    """Return how many devices an accelerator finds, or why it cannot tell; nothing for an alias."""
    try:
        if not registry.describe(entry).factory:
            return ""
        accelerator = registry.make(entry)
        if not accelerator.accelerator_is_available():
            return "not available"
        return str(accelerator.accelerator_device_count())
    except PluginError as error:
        return _line(error)
    except Exception as error:  # noqa: BLE001  a plugin may raise anything, and that is worth reporting
        return f"{type(error).__name__}: {_line(error)}"


def _packages(registry: Registry) -> dict[str, str]:
    """Return the versions of what plugframe and the plugins build on."""
    names = ["numpy"]
    for distribution in dict.fromkeys(["plugframe", *(e.distribution for e in registry.entries())]):
        names += _requirements(distribution)
    for entry in registry.entries():
        names += registry.needs(entry)
    return {name: _version(name) for name in sorted(dict.fromkeys(names), key=str.lower)}


def _requirements(distribution: str) -> list[str]:
    try:
        requirements = _compat.metadata.requires(distribution) or []
    except _compat.metadata.PackageNotFoundError:
        return []
    always = (r for r in requirements if ";" not in r)
    return [match.group(0) for r in always if (match := re.match(r"[A-Za-z0-9._-]+", r))]


def _version(distribution: str) -> str:
    try:
        return _compat.metadata.version(distribution)
    except _compat.metadata.PackageNotFoundError:
        return "not installed"


def _plugins(registry: Registry) -> dict[str, str]:
    """Return every package that publishes plugins, with its version and, of the others', their names."""
    published: dict[str, list[str]] = {}
    for entry in registry.entries():
        names = published.setdefault(f"{entry.distribution} {entry.version}", [])
        names.append("the built-in ones" if entry.builtin else f"{entry.kind} {entry.name}")
    return {package: ", ".join(dict.fromkeys(names)) for package, names in published.items()}


def _variables(registry: Registry) -> dict[str, str]:
    """Return what is set of plugframe's variables, PyTorch's, and those the installed environments go by."""
    families = {"PLUGFRAME_", "TORCH_", *_families(registry)}
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "OMP_NUM_THREADS")
    return {
        name: _open(name, value)
        for name, value in sorted(os.environ.items())
        if name in names or name.endswith("_VISIBLE_DEVICES") or name.startswith(tuple(families))
    }


def _families(registry: Registry) -> Iterable[str]:
    for entry in registry.entries("environment"):
        try:
            descriptor = registry.describe(entry)
        except PluginError:
            continue  # broken; reported by `list-plugins --check`
        yield from (name.partition("_")[0] + "_" for name in descriptor.variables if "_" in name)


#: Names of variables whose values are secret.
_SECRET_NAMES = re.compile(
    r"TOKEN|SECRET|PASS|PWD|AUTH|JWT|CREDENTIAL|KEY|COOKIE|SESSION|PRIVATE|SIGNATURE", re.IGNORECASE
)
#: Values that are secret under any name: keys and tokens of known services, JSON web tokens, private keys.
_SECRET_VALUES = re.compile(
    r"(?:^|[^A-Za-z0-9])(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|sk_|pk_|rk_|xox[a-z]-|npm_|pypi-|dop_v1_|ya29\.|AIza)[\w.-]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\beyJ[\w-]{8,}\.[\w-]+|-----BEGIN |\b(?:Bearer|Basic)\s+\S{8,}",
)
#: User and password in a URL.
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
#: Random words: 32 hexadecimal digits or more, or as many letters of both cases with digits.
_RANDOM = re.compile(
    r"(?<![\w/.-])(?:[0-9a-fA-F]{32,}|(?=[\w+/=-]*\d)(?=[\w+/=-]*[a-z])(?=[\w+/=-]*[A-Z])[A-Za-z0-9+_=-]{32,})(?![\w/.])"
)
_HIDDEN = "(set, not shown)"


def _open(name: str, value: str) -> str:
    """Return what may be shown of a variable: nothing that looks like a secret, by its name or by its value."""
    if _SECRET_NAMES.search(name) or _SECRET_VALUES.search(value) or _RANDOM.search(value):
        return _HIDDEN
    return _LOGIN.sub("…@", value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
