"""What a plugin author writes must satisfy strict type checkers; this file is checked, never run."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

from plugframe import Plugin, hookimpl
from plugframe.base import Extension, Strategy
from plugframe.hooks import StrategySpec

plugin = Plugin(factory="acme.strategy:Acme", summary="An example.", devices=("cpu",), priority=None)


class Acme(Strategy):
    """Overrides one hook of the base."""

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().strategy_backward(loss=loss * 2, module=module, args=args, kwargs=kwargs)


class Watch(Extension):
    """Wraps one hook."""

    @hookimpl(wrapper=True)
    def strategy_backward(self) -> Generator[None, Any, Any]:
        result = yield
        return result


spec: StrategySpec = Acme()
