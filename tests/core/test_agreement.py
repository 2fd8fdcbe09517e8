"""All ranks run the same plugins of the same versions, or none runs: the error shows both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fake_distributions import publish
from plugframe import EnvironmentMismatchError, Lite, Plugin, hookimpl
from plugframe.base import Extension
from plugframe.core.planning.plan import Choice, Plan
from plugframe.core.registry.registry import Entry
from plugframe.diagnostics.consistency import differences, in_use
from plugframe.diagnostics.diagnostics import Diagnostics
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from ranks import run_ranks


class Own(Extension):
    """An object in the code, of no published class."""

    @hookimpl
    def on_launch(self, context: Any) -> None:
        """It has a hook, so that it is an extension."""


def _launched(**settings: Any) -> str:
    """Start a job on this rank and compute with it; return the error instead, if it is the one of this file."""
    try:
        with Lite(accelerator="cpu", devices=2, **settings) as lite:
            lite.launch()
            return f"sum {int(lite.all_reduce(lite.global_rank + 1, reduce_op='sum'))}"
    except EnvironmentMismatchError as error:
        return str(error)


def _on_a_rank(world: World, folder: str) -> dict[str, str]:
    """See the packages of one's own folder, as on a node with an installation of its own."""
    sys.path.insert(0, f"{folder}/{world.global_rank}")
    second = world.global_rank == 1
    return {
        "versions": _launched(plugins="acme-ext"),
        "the same again": _launched(plugins="same-ext"),
        "selection": _launched(loggers="csv" if second else None),
        "objects": _launched(plugins=[Own()] if second else []),
        "nothing": _launched(),
    }


def test_ranks_with_different_plugins_all_say_so(tmp_path: Path) -> None:
    """Another version, another selection or another object on one rank is the same error on both; then all is well."""
    for rank, version in enumerate(["1.2", "1.3"]):
        publish(tmp_path / str(rank), "acme-extension", version, "extension", "acme-ext")
        publish(tmp_path / str(rank), "same-extension", "2.0", "extension", "same-ext")
    first, second = run_ranks(2, _on_a_rank, str(tmp_path))
    assert first == second
    assert first["versions"].startswith(
        "Plugins or versions differ between ranks: extension acme-ext (acme-extension 1.2) on rank 0, "
        "acme-ext (acme-extension 1.3) on rank 1. Install the same packages on every node"
    )
    assert "logger none on rank 0, csv (plugframe " in first["selection"]
    assert "extension none on rank 0, test_agreement.Own (an object in the code) on rank 1." in first["objects"]
    assert first["the same again"] == first["nothing"] == "sum 3"


def _plan(*choices: Choice) -> Plan:
    return Plan(
        choices={choice.kind: choice for choice in choices},
        devices=(0,),
        devices_reason="a test",
        num_nodes=1,
        launched=True,
    )


def _choice(version: str) -> Choice:
    entry = Entry("strategy", "acme", "acme:plugin", "acme-ddp", version)
    return Choice(kind="strategy", name="acme", reason="", descriptor=Plugin(factory="a:B"), entry=entry)


def test_plugframe_and_torch_are_compared_too() -> None:
    """What every rank has to have in the same version, whatever was selected."""
    import torch

    import plugframe

    uses = dict(in_use(_plan(_choice("1.2"))))
    assert uses == {
        "plugframe": plugframe.__version__,
        "torch": torch.__version__,
        "strategy": "acme (acme-ddp 1.2)",
    }


def test_one_rank_compares_with_nobody() -> None:
    """Without other ranks no hook is called, so that a collective that has none need not answer."""
    context = Context(world=World(), device=None, hooks=None, names={}, timeout_s=None)
    Diagnostics(_plan(_choice("1.2"))).on_connect(context)


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ("aab", "strategy a on ranks 0 and 1, b on rank 2"),
        ("aaaba", "strategy a on ranks 0-2 and 4, b on rank 3"),
        ("abc", "strategy a on rank 0, b on rank 1, c on rank 2"),
        (
            16 * "ab",
            "strategy a on ranks 0, 2, 4, 6, 8, 10, 12, 14 and 8 more, b on ranks 1, 3, 5, 7, 9, 11, 13, 15 and 8 more",
        ),
    ],
)
def test_differences_are_told_by_ranks(versions: str, text: str) -> None:
    """Ranks in a row are one span, and of a thousand a few are enough."""
    assert differences([[("torch", "2.13"), ("strategy", version)] for version in versions]) == [text]


def test_several_of_a_kind_are_compared_as_a_whole() -> None:
    """Loggers and extensions are lists, whose order counts: the first wraps outermost."""
    a, b = ("extension", "a"), ("extension", "b")
    assert differences([[a, b], [a, b]]) == []
    assert differences([[a, b], [b, a]]) == ["extension a and b on rank 0, b and a on rank 1"]
    assert differences([[a], []]) == ["extension a on rank 0, none on rank 1"]
