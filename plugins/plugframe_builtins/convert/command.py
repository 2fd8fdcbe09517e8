"""``plugframe convert``: rewrite a training script to use `Lite`."""

from __future__ import annotations

import difflib
import importlib.util
import os
import tempfile
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

import click

from plugframe.errors import MissingDependencyError, SettingError, UsageError, printable

if TYPE_CHECKING:
    from plugframe_builtins.convert.convert import Converted

_KINDS = {"raw": "plain PyTorch", "fabric": "Lightning Fabric", "lite": "LightningLite", "accelerate": "Accelerate"}


@click.command("convert", short_help="Rewrite a training script to use plugframe.")
@click.argument("script")
@click.option("--diff", is_flag=True, help="Print the difference in place of the script.")
@click.option("--write", is_flag=True, help="Write the script in its place.")
@click.option("-o", "--output", metavar="FILE", help="Write the converted script to FILE.")
def command(script: str, diff: bool, write: bool, output: str | None) -> int:
    """Rewrite a plain PyTorch, Fabric, LightningLite or Accelerate SCRIPT to use plugframe, and print it.

    What it is not sure of has a comment '# plugframe: ...' in the result, and is listed on stderr with its line.
    The exit code is 0 if the script is converted, 1 if a part is left to change by hand, 2 for a script that
    cannot be read.

    \b
    Examples:
      plugframe convert train.py --diff
      plugframe convert train.py -o train_lite.py
      plugframe convert train.py --write
    """
    if sum([diff, write, output is not None]) > 1:
        raise UsageError("Use one of --diff, --write and --output.")
    if importlib.util.find_spec("libcst") is None:
        raise MissingDependencyError("plugframe convert needs libcst: pip install 'plugframe[convert]'")
    path = Path(script)
    text, encoding = _read(path)
    converted = _convert(path, text)
    if write or output is not None:
        if converted.text != text or output is not None:
            _write(path if write else Path(str(output)), converted.text, encoding)
    elif diff:
        click.echo(_diff(text, converted.text, script), nl=False)
    else:
        click.echo(converted.text, nl=False)
    _report(converted, text, script, output or script)
    return int(any(mark.by_hand for mark in converted.marks))


def _read(path: Path) -> tuple[str, str]:
    """Return the source of a script, its newlines as they are, and its encoding."""
    if path.suffix == ".ipynb":
        raise SettingError(
            f"{path} is a notebook: export its code with 'jupyter nbconvert --to script {path}', and convert that."
        )
    try:
        with open(path, "rb") as file:
            encoding, _ = tokenize.detect_encoding(file.readline)
            file.seek(0)
            return file.read().decode(encoding), encoding
    except FileNotFoundError:
        raise SettingError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from None


def _convert(path: Path, text: str) -> Converted:
    import libcst

    from plugframe_builtins.convert.convert import convert

    try:
        return convert(text)
    except libcst.ParserSyntaxError as error:
        line = " ".join(text.splitlines()[error.raw_line - 1 : error.raw_line]).strip()
        raise SettingError(f"{path}:{error.raw_line} is not Python: {line!r}") from None


def _write(path: Path, text: str, encoding: str) -> None:
    """Write a file in one step, with the permissions of the one that is there."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode(encoding))
            os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
            os.replace(name, path.resolve())
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise SettingError(f"{path} cannot be written: {error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _diff(before: str, after: str, name: str) -> str:
    path = name.lstrip("/")
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{path}", f"b/{path}"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _report(converted: Converted, before: str, script: str, name: str) -> None:
    """Print on stderr what was done, and what to look at."""
    for mark in converted.marks:
        click.echo(f"{name}:{mark.line}: {printable(mark.text)}", err=True)
    hands = sum(mark.by_hand for mark in converted.marks)
    checks = len(converted.marks) - hands
    if converted.kind == "plugframe":
        told = f"{script} uses plugframe already: nothing changed."
    elif converted.text == before:
        told = f"{script} has no training loop that this command knows: nothing changed."
    else:
        told = f"{script}: converted from {_KINDS[converted.kind]}."
    rest = [f"{checks} to check" if checks else "", f"{hands} to change by hand" if hands else ""]
    listed = ", ".join(each for each in rest if each)
    click.echo(f"{told}{f' {listed}.' if listed else ''}", err=True)
