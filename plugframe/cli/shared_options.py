"""``--disable-plugin``, for every command that reads what is installed; and how it reaches other processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

from plugframe.core.registry.entry_points import OWN_DISTRIBUTION, normalize
from plugframe.core.registry.policy import MARK, OPTION, Allowed, Policy, split
from plugframe.hooks.variables import ALLOW, DISABLE, FROM_COMMAND_LINE
from plugframe.utils.environment import environment

F = TypeVar("F", bound=Callable[..., Any])


def disabling(command: F) -> F:
    """Give a command the option, which holds while that command runs, for the processes it starts too."""
    return click.option(
        OPTION,
        metavar="NAMES",
        multiple=True,
        expose_value=False,
        callback=_disable,
        help="Never import these: name, package or package:name; repeatable or a,b.",
    )(command)


def disabled_variables(words: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that carry what was typed to the registry, here and in ranks, beside what is set already.

    Raises:
        SettingError: for a word that names no plugin.
    """
    typed = [word for each in words for word in split(each, OPTION)]
    if not typed:
        return {}
    before = split(environ.get(DISABLE, ""), DISABLE)
    marks = [part for part in environ.get(FROM_COMMAND_LINE, "").split(",") if part]
    return {
        DISABLE: ",".join(dict.fromkeys([*before, *typed])),
        FROM_COMMAND_LINE: ",".join(dict.fromkeys([*marks, *(MARK + word for word in typed)])),
    }


def policy_variables(policy: Policy) -> dict[str, str]:
    """Return the variables that enforce a policy in another process, independent of its folder."""
    texts = {DISABLE: ",".join(dict.fromkeys(each.word for each in policy.disabled))}
    if policy.allowed:
        texts[ALLOW] = ",".join([OWN_DISTRIBUTION, *_common(policy.allowed)])
    return {name: text for name, text in texts.items() if text}


def _common(lists: Sequence[Allowed]) -> list[str]:
    """Return the intersection of several lists of allowed plugins."""

    def allows(words: Iterable[str], word: str) -> bool:
        package, _, name = word.partition(":")
        pairs = [(normalize(other.partition(":")[0]), other.partition(":")[2]) for other in words]
        return (normalize(package), "") in pairs or (normalize(package), name) in pairs

    every = dict.fromkeys(word for each in lists for word in each.words)
    return [word for word in every if all(allows(each.words, word) for each in lists)]


def _disable(context: click.Context, _: click.Parameter, words: tuple[str, ...]) -> None:
    context.with_resource(environment(disabled_variables(words, os.environ)))
