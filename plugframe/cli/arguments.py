"""Split the command line of ``plugframe run`` into plugframe's options, the script and its arguments."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

import click

from plugframe.errors import SettingError, closest
from plugframe.hooks.kinds import KINDS, Kind
from plugframe.hooks.spelling import parts, typed

MODULE = "-m"
HELP = ("-h", "--help")
#: Only before the script: many scripts have one of their own.
VERBOSE = ("-v", "--verbose")
#: Similarity of a script's argument to an option of plugframe that causes a warning: about one letter differs.
_CLOSE = 0.88


@dataclass(frozen=True)
class Shorthand:
    """An option that is the name of a plugin.

    Attributes:
        word: what it stands for: ``--plugins=lockstep``.
        option: the option of the plugin that its value is for: ``--environment.ranks``; empty if it takes none.
    """

    word: str
    option: str = ""


@dataclass(frozen=True)
class Words:
    """The words of one command line.

    Attributes:
        own: plugframe's options, each as one word: ``--devices=8``.
        command: what Python is to run: the script, or ``-m`` and the module, and its arguments. Empty for help.
        late: names of those options of plugframe that stood after the script, such as ``--devices``.
        options: of plugins: ``--strategy.timeout-s`` and what was typed for it.
        valueless: the option of a plugin that stood right before the script, without a value.
        notes: of words that went to the script and look like plugframe's.
    """

    own: tuple[str, ...]
    command: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    valueless: str = ""
    notes: tuple[str, ...] = ()


def split(
    words: Iterable[str],
    options: Mapping[str, click.Option],
    shorthands: Callable[[], Mapping[str, Shorthand]] = dict,
    takes_value: Callable[[str], bool] = lambda _: False,
) -> Words:
    """Separate plugframe's options from the script and its arguments.

    Before the script every option must be one of plugframe's. After it, long options that plugframe has are
    plugframe's, up to a bare ``--``; everything else is the script's, in its order. Options of plugins are
    plugframe's too: ``--strategy.timeout-s=60``, or with a space in between where the option is no switch. Before the
    script the names of some plugins are options.

    Args:
        words: what follows ``plugframe run``.
        options: plugframe's long options by spelling, with dashes.
        shorthands: asked for the options that are names of plugins, with dashes.
        takes_value: asked whether the option of a plugin, as typed, is no switch.

    Raises:
        click.UsageError: for an unknown option before the script, an option without its value, one given twice
            with two values, or no script.
    """
    queue = deque(words)
    own: dict[str, str] = {}
    command = _script(queue, options, own, shorthands, takes_value)
    if not command:
        return Words(own=("--help",))
    late: list[str] = []
    left: list[str] = []
    last = next(reversed(own.items()), ("", ""))
    valueless = last[0] if "." in last[0] and last[1] == last[0] else ""
    while queue:
        word = queue.popleft()
        if word == "--":
            command += queue
            break
        if _is_of_plugin(word):
            late.append(_take_of_plugin(_with_value(word, queue, takes_value), own))
        elif word in VERBOSE:
            command.append(word)
        elif word.startswith("--") and _spelling(word) in options:
            late.append(_take(word, queue, options, own))
        else:
            left += [word.partition("=")[0]] if word.startswith("--") else []
            command.append(word)
    of_plugins = {name: word.partition("=")[2] or "true" for name, word in own.items() if name.startswith("--")}
    mine = tuple(word for name, word in own.items() if name not in of_plugins)
    notes = tuple(_notes(left, options, shorthands() if left else {}))
    return Words(mine, tuple(command), tuple(late), options=of_plugins, valueless=valueless, notes=notes)


def _notes(left: Iterable[str], options: Iterable[str], shorthands: Iterable[str]) -> Iterator[str]:
    """Return warnings about script arguments that resemble options of plugframe."""
    for word in dict.fromkeys(left):
        for meant in get_close_matches(_spelling(word).lower(), [*options, *shorthands], n=1, cutoff=_CLOSE):
            where = " before SCRIPT" if meant in shorthands else ""
            yield f"{word} goes to the script. For plugframe's type {meant}{where}; else write it after a bare --."


def _script(
    queue: deque[str],
    options: Mapping[str, click.Option],
    own: dict[str, str],
    shorthands: Callable[[], Mapping[str, Shorthand]],
    takes_value: Callable[[str], bool],
) -> list[str]:
    """Consume everything up to the script; return the script, or nothing if help was requested."""
    model = False
    while queue:
        word = queue.popleft()
        if word in HELP:
            return []
        if word in VERBOSE:
            own["verbose"] = VERBOSE[1]
            continue
        if word == "--" and queue:
            return [queue.popleft()]
        if word.startswith(MODULE) and not word.startswith("--"):
            return [MODULE, word[len(MODULE) :] or _module(queue)]
        if word.startswith("-") and len(word) > 1:
            if _is_of_plugin(word):
                _take_of_plugin(_with_value(word, queue, takes_value), own)
                continue
            if _spelling(word) not in options:
                word = _long(word, queue, own, shorthands(), options)
            _take(word, queue, options, own)
        elif word == "model" and not model:
            model = True
        else:
            return [word]
    if model:
        return ["model"]  # nothing follows: it is the script
    raise click.UsageError("SCRIPT is missing: type 'plugframe run train.py', or 'plugframe run -m package.module'.")


def _long(
    word: str,
    queue: deque[str],
    own: dict[str, str],
    shorthands: Mapping[str, Shorthand],
    options: Iterable[str],
) -> str:
    """Consume an option that is the name of a plugin; its value becomes the plugin's option."""
    name, equals, value = word.partition("=")
    short = shorthands.get(_spelling(word))
    if short is None or (equals and not short.option):
        raise click.UsageError(_unknown(word, [*options, *shorthands]))
    if short.option:
        if not equals and (not queue or queue[0].startswith("-")):
            wanted = short.option.rpartition(".")[2].upper()
            raise click.UsageError(f"{name} needs a value: type {name}={wanted}.")
        if equals and not value:
            raise click.UsageError(f"{name} needs a value after the '='.")
        _take_of_plugin(f"{short.option}={value if equals else queue.popleft()}", own)
    return short.word


def _module(queue: deque[str]) -> str:
    if not queue or queue[0].startswith("-"):
        raise click.UsageError("-m needs the name of a module: type 'plugframe run -m package.module'.")
    return queue.popleft()


def _spelling(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _unknown(word: str, options: Iterable[str]) -> str:
    name = word.partition("=")[0]
    hint = closest(_spelling(word), options)
    _, dot, rest = name.partition(".")
    if dot:
        hint = closest(name, (f"--{known}.{rest}" for known in KINDS))
    return f"plugframe run has no option {name!r}.{hint} An option of the script goes after SCRIPT."


def _is_of_plugin(word: str) -> bool:
    kind, dot, rest = word.partition("=")[0].removeprefix("--").partition(".")
    if not (word.startswith("--") and dot):
        return False
    meant = next((each.name for each in KINDS.values() if kind in _other_words(each)), "")
    if kind not in KINDS and meant:
        raise click.UsageError(f"plugframe run has no option {word.partition('=')[0]!r}: type --{meant}.{rest}.")
    return kind in KINDS


def _other_words(kind: Kind) -> tuple[str, ...]:
    """Return what may be typed for the name of a kind: ``plugins`` or ``plugin`` for ``extension``, ``loggers``."""
    return (kind.setting, kind.setting.removesuffix("s"), f"{kind.name}s")


def _with_value(word: str, queue: deque[str], takes_value: Callable[[str], bool]) -> str:
    """Return an option of a plugin with the next word as its value, if it is typed without one and is no switch."""
    alone = "=" in word or not queue or (queue[0].startswith("-") and not re.match(r"-\d", queue[0]))
    return word if alone or not takes_value(word) else f"{word}={queue.popleft()}"


def _take_of_plugin(word: str, own: dict[str, str]) -> str:
    """Note one option of a plugin, and return its name. Without a value it is a switch: true."""
    try:
        name = typed(*parts(word))
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    if word.endswith("="):
        raise click.UsageError(f"{name} needs a value after the '='.")
    taken = "=".join([name, *word.partition("=")[2:]]) if "=" in word else name
    if own.get(name, taken) != taken:
        raise click.UsageError(f"{name} is given twice, as {own[name]} and as {taken}: keep one.")
    own[name] = taken
    return name


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
    if not option.is_flag and not value:
        raise click.UsageError(f"{name} needs a value after the '='; without the option it is left open.")
    taken = name if option.is_flag else f"{name}={value}"
    key = f"{option.name} {len(own)}" if option.multiple else str(option.name)
    if own.get(key, taken).partition("=")[2] != taken.partition("=")[2]:
        raise click.UsageError(f"{name} is given twice, as {own[key]} and as {taken}: keep one.")
    own[key] = taken
    return name
