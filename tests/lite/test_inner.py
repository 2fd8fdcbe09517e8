"""A plugin that makes another one by name and wraps it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Context, Lite, Option, Plugin, SettingError, UnknownPluginError, UnsupportedError, hookimpl
from plugframe.base import Strategy
from plugframe_builtins.ddp.strategy import DDP


class Around(Strategy):
    """A strategy around another one: it counts the backwards."""

    plugin = Plugin(factory=f"{__name__}:Around", options=(Option("inner", str, "ddp"),))

    def __init__(self, kind: str = "strategy", inner: str = "ddp", **options: Any) -> None:
        self.kind, self.inner, self.options, self.count = kind, inner, options, 0

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        assert context.make is not None
        self.made, self.descriptor = context.make(self.kind, self.inner, **self.options)
        self.made.strategy_setup(context)

    @hookimpl
    def strategy_teardown(self) -> None:
        self.made.strategy_teardown()

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Any:
        return self.made.strategy_setup_module(module)

    @hookimpl
    def strategy_backward(self, loss: Any, module: Any, args: Any, kwargs: Any) -> None:
        self.count += 1
        self.made.strategy_backward(loss, module, args, kwargs)


def lite_with(strategy: Strategy) -> Lite:
    return Lite(accelerator="cpu", devices=1, strategy=strategy, collective="torch")


def test_a_strategy_around_another() -> None:
    """The inner one is made by name, with validated options and its capabilities, and does the work."""
    around = Around(bucket_cap_mb=5)
    with lite_with(around) as lite:
        model = lite.setup(nn.Linear(2, 1))
        lite.backward(model(torch.ones(1, 2)).sum())
        assert isinstance(around.made, DDP)
        assert around.made.bucket_cap_mb == 5
        assert "local-backward" in around.descriptor.provides
        assert around.count == 1
        assert model.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"inner": "dpp"}, UnknownPluginError, "Did you mean 'ddp'?"),
        ({"bucket": 5}, SettingError, "has no option 'bucket'. Did you mean 'bucket_cap_mb'? Its options: "),
        ({"bucket_cap_mb": "x"}, SettingError, "bucket_cap_mb='x' of strategy 'ddp': it is an integer"),
        ({"kind": "accelerator", "inner": "cpu", "x": 1}, SettingError, "has no option 'x'. It has none."),
        ({"kind": "accelerator", "inner": "mps"}, UnsupportedError, "'mps' works on mps, and the device is cpu"),
    ],
)
def test_what_cannot_be_made(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    """Each is refused as on the command line."""
    around = Around(**arguments)
    around.made = Strategy()
    with lite_with(around) as lite, pytest.raises(error, match=re.escape(said)):
        lite.setup(nn.Linear(2, 1))
