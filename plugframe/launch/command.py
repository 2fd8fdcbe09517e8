"""Reconstruct the command line of the current script."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from plugframe.errors import UsageError

#: Short options: flags without a value, optionally followed by one option with a value.
_SHORT = re.compile(r"-([^cmWX]*)(?:([cmWX])(.*))?", re.DOTALL)


def script_command() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the interpreter options and the command (`Job.command`) that run this script again.

    The script is taken from ``__main__``, which is also correct under a debugger or a coverage tool.

    Raises:
        UsageError: for code without a file (``python -c``, standard input, a prompt, a notebook).
    """
    options, typed = split_interpreter_options(sys.orig_argv[1:])
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    file = getattr(main, "__file__", None)
    if spec is not None and spec.name != "__main__":
        module = spec.name.removesuffix(".__main__")
        return options, ("-m", module, *_arguments(typed, ("-m", module)))
    if file is not None and spec is not None:
        file = os.path.dirname(file)  # a folder or an archive that holds a __main__.py
    if file is None or not os.path.exists(file):
        raise UsageError(
            f"{_source_name(typed)} has no file that ranks could run: write a script, "
            "or call launch(function) with the function to run on every rank."
        )
    file = os.path.abspath(file)
    return options, (file, *_arguments(typed, (file,)))


def split_interpreter_options(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the arguments after the executable into interpreter options and the rest.

    ``("-Bm", "train", "-v")`` gives ``("-B",)`` and ``("-m", "train", "-v")``. ``-i`` is dropped: a rank must
    not end at a prompt.
    """
    options: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        argument = rest.pop(0)
        if argument.startswith("--"):
            options.append(argument)
            if argument == "--check-hash-based-pycs":
                options.append(rest.pop(0))
            continue
        match = _SHORT.fullmatch(argument)
        assert match is not None
        flags, letter, value = match[1].replace("i", ""), match[2], match[3]
        if flags:
            options.append(f"-{flags}")
        if letter is None:
            continue
        value = value or rest.pop(0)
        if letter in "cm":
            return tuple(options), (f"-{letter}", value, *rest)
        options += [f"-{letter}", value]
    return tuple(options), tuple(rest)


def _arguments(typed: Sequence[str], command: Sequence[str]) -> Sequence[str]:
    """Return the script's arguments as typed, even if the script has changed ``sys.argv`` since."""
    head, tail = tuple(typed[: len(command)]), typed[len(command) :]
    # Compare base names: a relative path is invalid once the script has changed its working directory.
    if len(head) == len(command) and os.path.basename(head[-1]) == os.path.basename(command[-1]):
        return tail
    return sys.argv[1:]  # another program runs the script


def _source_name(typed: Sequence[str]) -> str:
    if typed[:1] == ("-c",):
        return "Code given with `python -c`"
    if typed[:1] == ("-",) or not (typed or sys.stdin.isatty()):
        return "Code read from standard input"
    return "An interactive session"
