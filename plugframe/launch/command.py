"""How the current script was started, so that its ranks can be started alike."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from plugframe.errors import UsageError

#: Flags without a value, then perhaps one option that takes a value: all that a short option can be.
_SHORT = re.compile(r"-([^cmWX]*)(?:([cmWX])(.*))?", re.DOTALL)


def script_command() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the interpreter's options and the command (`Job.command`) that start this script again.

    The script is what ``__main__`` says it is, so that one run by a debugger or a coverage tool is found too.

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
            f"{_what_runs(typed)} has no file that more ranks could run: write a script, "
            "or call launch(function) with a function for every rank to run."
        )
    file = os.path.abspath(file)
    return options, (file, *_arguments(typed, (file,)))


def split_interpreter_options(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split what follows the executable into the interpreter's own options and the rest.

    ``("-Bm", "train", "-v")`` gives ``("-B",)`` and ``("-m", "train", "-v")``. ``-i`` is left out: a rank must
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
    """Return the script's arguments: those that were typed, even if it has changed ``sys.argv`` since."""
    head, tail = tuple(typed[: len(command)]), typed[len(command) :]
    # By name only: a relative path leads nowhere once the script has gone to another folder.
    if len(head) == len(command) and os.path.basename(head[-1]) == os.path.basename(command[-1]):
        return tail
    return sys.argv[1:]  # another program runs the script


def _what_runs(typed: Sequence[str]) -> str:
    if typed[:1] == ("-c",):
        return "Code given with `python -c`"
    if typed[:1] == ("-",) or not (typed or sys.stdin.isatty()):
        return "Code read from standard input"
    return "An interactive session"
