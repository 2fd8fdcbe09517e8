"""``--disable-plugin``, for every command that reads what is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from plugframe.core.registry.policy import OPTION, handed
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


def _disable(context: click.Context, _: click.Parameter, words: tuple[str, ...]) -> None:
    variables = handed(words, os.environ)
    context.with_resource(environment(variables))
