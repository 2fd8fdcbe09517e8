"""Which words of ``plugframe run …`` are plugframe's, and which are the script's."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import click

from plugframe.errors import closest

MODULE = "-m"
HELP = ("-h", "--help")


@dataclass(frozen=True)
class Words:
    """The words of one command line.

    Attributes:
        own: plugframe's options, each as one word: ``--devices=8``.
        command: what Python is to run: the script, or ``-m`` and the module, and its arguments. Empty for help.
        late: names of those options of plugframe that stood after the script, such as ``--devices``.
    """

    own: tuple[str, ...]
    command: tuple[str, ...] = ()
    late: tuple[str, ...] = ()


def split(words: Iterable[str], options: Mapping[str, click.Option]) -> Words:
    """Tell plugframe's options from the script and its arguments.

    Before the script every option must be one of plugframe's. After it, long options that plugframe has are
    plugframe's, up to a bare ``--``; everything else is the script's, in its order.

    Args:
        words: what follows ``plugframe run``.
        options: plugframe's long options by spelling, with dashes.

    Raises:
        click.UsageError: for an unknown option before the script, an option without its value, one given twice
            with two values, or no script.
    """
    queue = deque(words)
    own: dict[str, str] = {}
    command = _script(queue, options, own)
    if not command:
        return Words(own=("--help",))
    late: list[str] = []
    while queue:
        word = queue.popleft()
        if word == "--":
            command += queue
            break
        if word.startswith("--") and _spelling(word) in options:
            late.append(_take(word, queue, options, own))
        else:
            command.append(word)
    return Words(own=tuple(own.values()), command=tuple(command), late=tuple(late))


def _script(queue: deque[str], options: Mapping[str, click.Option], own: dict[str, str]) -> list[str]:
    """Take everything up to and with the script; return the script, or nothing if help was asked for."""
    model = False
    while queue:
        word = queue.popleft()
        if word in HELP:
            return []
        if word == "--" and queue:
            return [queue.popleft()]
        if word.startswith(MODULE) and not word.startswith("--"):
            return [MODULE, word[len(MODULE) :] or _module(queue)]
        if word.startswith("-") and len(word) > 1:
            if _spelling(word) not in options:
                raise click.UsageError(_unknown(word, options))
            _take(word, queue, options, own)
        elif word == "model" and not model:
            model = True
        else:
            return [word]
    if model:
        return ["model"]  # nothing came after it: then it is the script
    raise click.UsageError("SCRIPT is missing: type 'plugframe run train.py', or 'plugframe run -m package.module'.")


def _module(queue: deque[str]) -> str:
    if not queue or queue[0].startswith("-"):
        raise click.UsageError("-m needs the name of a module: type 'plugframe run -m package.module'.")
    return queue.popleft()


def _spelling(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _unknown(word: str, options: Mapping[str, click.Option]) -> str:
    name = word.partition("=")[0]
    hint = closest(_spelling(word), options)
    return f"plugframe run has no option {name!r}.{hint} An option of the script goes after SCRIPT."


def _take(word: str, queue: deque[str], options: Mapping[str, click.Option], own: dict[str, str]) -> str:
    """Note one option of plugframe, with the next word if that is its value, and return its name."""
    name = _spelling(word)
    option = options[name]
    _, equals, value = word.partition("=")
    if not option.is_flag and not equals:
        if not queue or (queue[0].startswith("-") and not re.match(r"-\d", queue[0])):
            raise click.UsageError(f"{name} needs a value: type {name}={option.metavar or 'VALUE'}.")
        value = queue.popleft()
    if option.is_flag and equals:
        raise click.UsageError(f"{name} takes no value.")
    taken = name if option.is_flag else f"{name}={value}"
    key = f"{option.name} {len(own)}" if option.multiple else str(option.name)
    if own.get(key, taken).partition("=")[2] != taken.partition("=")[2]:
        raise click.UsageError(f"{name} is given twice, as {own[key]} and as {taken}: keep one.")
    own[key] = taken
    return name
