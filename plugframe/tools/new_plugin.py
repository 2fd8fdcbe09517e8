"""``plugframe new-plugin``: write a complete, working plugin package as a starting point."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

import click

from plugframe import __version__
from plugframe.core.registry.entry_points import PREFIX
from plugframe.core.registry.registry import Registry
from plugframe.errors import SettingError, article, closest
from plugframe.hooks.kinds import KINDS

TEMPLATES = Path(__file__).parent / "templates"
#: Where each file of a package comes from; a template of the kind goes before the common one.
_FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    ".gitignore": "gitignore.txt",
    ".github/workflows/test.yml": "test.yml.txt",
    "train.py": "train.py.txt",
    "src/@package@/__init__.py": "init.py.txt",
    "src/@package@/@kind@.py": "@kind@.py.txt",
    "src/@package@/py.typed": "",
    "tests/test_contract.py": "test_contract.py.txt",
}


@click.command("new-plugin", short_help="Write the package of a new plugin.")
@click.argument("kind")
@click.argument("name")
@click.option("--folder", metavar="FOLDER", help="Where to write it; by default plugframe-NAME here.")
@click.option("--summary", metavar="TEXT", help="One line on what it is, for listings.")
def command(kind: str, name: str, folder: str | None, summary: str | None) -> None:
    """Write a package that publishes the plugin NAME of a KIND: it works at once, and its tests pass.

    \b
    Examples:
      plugframe new-plugin strategy acme
      cd plugframe-acme && pip install -e '.[test]' && pytest
      plugframe run train.py --strategy=acme
    """
    _check(kind, name)
    distribution = f"plugframe-{re.sub(r'[-_.]+', '-', name).lower()}"
    target = Path(folder or distribution)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingError(f"{target} is there already: give another with --folder=FOLDER.")
    values = _values(kind, name, distribution, summary or _template(kind, "summary.txt").strip())
    for path, template in _FILES.items():
        file = target / _filled(path, values)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_filled(_template(kind, _filled(template, values)), values), encoding="utf-8")
    click.echo(f"{target}: {article(kind)} named {name}. Type:")
    for line in (f"cd {target}", "pip install -e '.[test]'", "pytest", values["command"]):
        click.echo(f"  {line}")


def _check(kind: str, name: str) -> None:
    if kind not in KINDS:
        raise SettingError(f"{kind!r} is not a kind.{closest(kind, KINDS)} Kinds: {', '.join(KINDS)}.")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", name) or name == "auto":
        raise SettingError(f"{name!r} is no name for a plugin: use letters, digits, '-' and '_', such as 'acme'.")
    for entry in Registry.discover().entries(kind):
        if entry.name == name and entry.builtin:
            raise SettingError(
                f"{name!r} is the name of {article(f'built-in {kind}')}, which nobody else can take: choose another."
            )


def _values(kind: str, name: str, distribution: str, summary: str) -> dict[str, str]:
    identifier = re.sub(r"[-.]", "_", name).lower()
    title = "".join(part[:1].upper() + part[1:] for part in re.split(r"[-_.]", name))
    option = KINDS[kind].setting
    log = '        lite.log("loss", mean)\n' if kind == "logger" else ""
    return {
        "kind": kind,
        "name": name,
        "distribution": distribution,
        "package": f"plugframe_{identifier}",
        "Class": f"{title}Plugin" if keyword.iskeyword(title) else title,
        "Suite": f"{kind.title()}Contract",
        "VARIABLE": identifier.upper(),
        "summary": summary.replace('"', "'"),
        "plugframe": ".".join(__version__.split(".")[:2]),
        "entry": f"{PREFIX}{kind}",
        "keyword": f'{option}="{name}"',
        "command": _command(kind, f"--{option}={name}", identifier.upper()),
        "log": log,
    }


def _command(kind: str, option: str, variable: str) -> str:
    """Return a command that trains the example with the plugin."""
    if kind == "environment":
        # What the scheduler would set for the one rank of a job.
        place = {"RANK": 0, "SIZE": 1, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
        return " ".join([*(f"{variable}_{name}={value}" for name, value in place.items()), "python train.py"])
    ranks = " --devices=2" if kind in ("strategy", "collective") else ""
    return f"plugframe run train.py {option}{ranks}"


def _template(kind: str, name: str) -> str:
    if not name:
        return ""
    own = TEMPLATES / kind / name
    return (own if own.exists() else TEMPLATES / "common" / name).read_text(encoding="utf-8")


def _filled(text: str, values: dict[str, str]) -> str:
    """Put the values in the place of ``@name@``; an address like a@b.c stays."""
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], text)
