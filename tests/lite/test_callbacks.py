"""Callbacks: methods that plugframe calls by itself, and those that the script calls."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite, PlugframeWarning, SettingError, hookimpl


class Probe:
    """A callback with names of plugframe and Fabric, without marks."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_launch(self) -> None:
        self.heard.append("launch")

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        self.heard.append(("setup", type(module).__name__, type(fabric).__name__))

    def on_backward(self, loss: Any) -> None:
        self.heard.append(("backward", loss.item()))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.heard.append(("step", type(strategy).__name__, type(optimizer).__name__))

    def on_save(self, path: str, **rest: Any) -> None:
        self.heard.append(("save", Path(path).name, "state" in rest))

    def on_epoch_end(self, loss: float) -> None:
        self.heard.append(("epoch", loss))


def train(lite: Lite, path: Path) -> None:
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    lite.save(path / "a", {"model": model})
    lite.call("on_epoch_end", loss=0.5, epoch=3)


def test_methods_are_called_at_their_moments(tmp_path: Path) -> None:
    """Names of plugframe and Fabric need no mark; each method gets the arguments that it takes."""
    first, second = Probe(), Probe()
    with Lite(accelerator="cpu", devices=1, callbacks=[first, second]) as lite:
        train(lite, tmp_path)
    steps = ["launch", ("setup", "Linear", "Lite"), ("backward", 1.0), ("step", "SingleDevice", "SGD")]
    assert first.heard == second.heard
    assert first.heard[:3] == steps[:3]
    assert first.heard[3][::2] == ("step", "SGD")
    assert first.heard[4:] == [("save", "a", True), ("epoch", 0.5)]


def test_methods_that_nothing_calls_are_warned_of() -> None:
    """A job that ends without an error points out ``on_…`` methods that are never called; one that fails does not."""

    class Typo:
        def on_after_optimiser_step(self) -> None: ...

    def run(number: int) -> None:
        with Lite(accelerator="cpu", devices=1, callbacks=Typo()) as lite:
            lite.barrier()
            assert 1 / number

    with pytest.warns(PlugframeWarning, match="on_after_optimiser_step, which nothing has called"):
        run(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError):
            run(0)


def test_arguments_that_are_not_passed_are_refused() -> None:
    """A method that takes something else is an error before the job runs."""

    class Wrong:
        def on_after_setup(self, trainer: Any) -> None: ...

    with pytest.raises(SettingError, match="takes 'trainer', and plugframe calls it with module, lite, fabric"):
        Lite(accelerator="cpu", devices=1, callbacks=Wrong())


def test_a_second_call_by_the_script_is_warned_of() -> None:
    """A script that calls a method that plugframe calls too is warned once."""
    probe = Probe()
    probe.on_epoch_end = lambda: None  # type: ignore[method-assign,assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Lite(accelerator="cpu", devices=1, callbacks=probe) as lite:
            lite.barrier()
            for _ in range(2):
                lite.call("on_backward", loss=torch.ones(()))
    assert sum("by itself" in str(each.message) for each in caught) == 1


def test_marked_hooks_are_called_once() -> None:
    """A method marked as a hook is called by its mark alone."""
    heard = []

    class Marked:
        @hookimpl
        def on_backward(self, loss: Any) -> None:
            heard.append("backward")

        def on_after_setup(self, module: Any) -> None:
            heard.append("setup")

    with Lite(accelerator="cpu", devices=1, callbacks=Marked()) as lite:
        model = lite.setup(nn.Linear(1, 1))
        lite.backward(model(torch.ones(1, 1)).sum())
    assert heard == ["setup", "backward"]


def test_agree_on_one_rank_and_wrong_flags() -> None:
    """A flag is a bool, a number, or a tensor of one element."""
    with Lite(accelerator="cpu", devices=1) as lite:
        assert lite.agree(torch.tensor(2.0) > 1) is True
        assert lite.agree(0, "all") is False
        for wrong in ([], "stop", torch.ones(2)):
            with pytest.raises(SettingError, match="takes a bool"):
                lite.agree(wrong)
        with pytest.raises(SettingError, match="it is 'any', 'all' or 'rank_zero'"):
            lite.agree(True, "some")  # type: ignore[arg-type]
