"""Several strategies in one job, planned without devices: their order, the axes, and who owns each."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugframe import Axis, Option, Plugin, SettingError
from plugframe.core.config.request import gather
from plugframe.core.planning.resolve import resolve
from plugframe.hooks.mesh import MeshLayout
from plugframe.hooks.spelling import Given
from test_resolve import SHELF, Starter, ask, plan, plugin

COUNT, ROWS = Option("count", int, 1), Axis("rows", samples=True)
MIXED = (
    SHELF.put("environment", "shell", plugin(priority=0), Starter())
    .put(
        "strategy",
        "rows",
        plugin(axes=(Axis("copy", samples=True, size=1), Axis("rows", samples=True)), options=(COUNT,)),
    )
    .put(
        "strategy", "whole", plugin(axes=(Axis("rows", samples=True, aliases=("all",)),), provides=("local-backward",))
    )
    .put(
        "strategy",
        "cuts",
        plugin(
            divides="tensors",
            axes=(replace(ROWS, optional=True), Axis("cuts")),
            options=(COUNT, Option("depth", int, 1)),
            provides=("sharded",),
            needs={"collective": ("group",)},
        ),
    )
    .put("strategy", "acme:steps", plugin(divides="stages", axes=(Axis("steps"),)))
    .put("strategy", "other", plugin(divides="blocks", axes=(Axis("cuts"),)))
)


def mixed(strategy: Any, mesh: Any = None, **settings: Any) -> Any:
    return plan(MIXED, strategy=strategy, mesh=mesh, devices=4, **settings)


def test_each_has_its_axes() -> None:
    """The batch's strategy is the one of the plan, the others are applied in order, and the axes are placed."""
    made = mixed("rows+cuts+steps", {"rows": -1, "cuts": 2, "steps": 2})
    assert made.choices["strategy"].name == "rows"
    assert [choice.name for choice in made.composed] == ["steps", "cuts"]
    assert str(made.mesh) == "steps=2, rows=1, cuts=2"
    assert made.mesh.names == ("steps", "copy", "rows", "cuts")
    assert [made.mesh.owned_by(name) for name in ("rows", "cuts", "steps")] == [("copy", "rows"), ("cuts",), ("steps",)]
    assert "4 ranks (steps=2, rows=1, cuts=2), " in made.line()
    assert "strategy cuts (plugframe 0.1.0)" in made.line()


def test_who_averages_over_an_axis_that_parts_gradients() -> None:
    """A strategy declares an axis without samples to average over: outermost, and only beside one that says it does."""
    parted = MIXED.put("strategy", "tokens", plugin(divides="sequence", axes=(Axis("tokens", averages=True),))).put(
        "strategy", "able", plugin(axes=(Axis("rows", samples=True),), provides=("averages-axes",))
    )
    made = plan(parted, strategy="able+tokens+cuts", mesh={"rows": 1, "tokens": 2, "cuts": 2}, devices=4)
    assert made.mesh is not None
    assert made.mesh.names == ("tokens", "rows", "cuts")
    assert made.mesh.averaged("able") == ("tokens", "rows")
    assert [made.mesh.data_shard(rank) for rank in range(4)] == [(0, 1)] * 4
    with pytest.raises(SettingError, match="'whole' does not average .* the axis 'tokens' of 'tokens': use 'able' in"):
        plan(parted, strategy="whole+tokens", mesh={"tokens": 2, "rows": 2}, devices=4)
    with pytest.raises(SettingError, match="none of them divides the batch: add .*'able'"):
        plan(parted, strategy="tokens", devices=4)


def test_strategies_that_miss_a_package_are_not_mentioned() -> None:
    """Nobody asked for them: with strategies by name, nothing is skipped under 'auto'."""
    shelf = MIXED.put(
        "strategy", "lacks", plugin(priority=90, requires=("nowhere",), axes=(Axis("rows", samples=True),))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = plan(shelf, strategy="rows+cuts", mesh={"rows": 2, "cuts": 2}, devices=4)
    assert made.choices["strategy"].name == "rows"


def test_a_list_is_a_sum() -> None:
    """A list of names, or of names and objects, is what names with a plus are; the order is the strategies' own."""
    for way in (["cuts", "rows"], ("rows", "cuts"), "cuts + rows"):
        made = mixed(way, {"rows": 2, "cuts": 2})
        assert [made.choices["strategy"].name, made.composed[0].name] == ["rows", "cuts"]
    assert mixed(["rows"]).composed == ()


def test_what_they_need_and_do_adds_up() -> None:
    """Needs, prefers and conflicts are those of all; a guarantee holds if all give it."""
    made = mixed("whole+cuts", {"cuts": 2})
    descriptor = made.choices["strategy"].descriptor
    assert descriptor.provides == ("sharded",)
    assert made.choices["collective"].name == "wire"
    assert mixed("whole").choices["strategy"].descriptor.provides == ("local-backward",)


def test_one_strategy_with_a_mesh() -> None:
    """A mesh of one strategy is the simple case; without mesh= there is none."""
    assert mixed("rows").mesh is None
    assert str(mixed("rows", {"copy": 2}).mesh) == "copy=2, rows=2"
    assert str(mixed("whole", {"all": 4}).mesh) == "rows=4"
    assert str(mixed("cuts", {"rows": 2, "cuts": 2}).mesh) == "rows=2, cuts=2"


@pytest.mark.parametrize(
    ("strategy", "mesh", "error", "said"),
    [
        (
            "rows+whole",
            None,
            SettingError,
            "'rows+whole' in the code: 'rows' and 'whole' both divide the batch: keep one",
        ),
        ("cuts+steps", None, SettingError, "none of them divides the batch: add 'rows' or 'whole'"),
        ("rows+rows", None, SettingError, "'rows+rows' in the code: 'rows' is named twice: keep one"),
        ("rows++cuts", None, SettingError, "has an empty name: write names with a + in between"),
        (
            "rows+cuts",
            None,
            SettingError,
            "rows+cuts: the axes rows and cuts need their …: write mesh=rows=2,cuts=2",
        ),
        (
            "rows+cuts",
            {"rows": 2, "cats": 2},
            SettingError,
            "no axis 'cats'. Did you mean 'cuts'? Their axes: copy, rows, cuts",
        ),
        (
            "rows+cuts",
            {"rows": 3, "cuts": 2},
            SettingError,
            "mesh=rows=3,cuts=2 in the code: it does not fit the 4 ranks of this job",
        ),
        (
            "rows+cuts",
            {"rows": -1, "cuts": 3},
            SettingError,
            "mesh=rows=-1,cuts=3 in the code: it does not fit the 4 ranks",
        ),
        ("whole", {"all": 2, "rows": 2}, SettingError, "all and rows are one axis: keep one"),
        (
            "many+cuts",
            {"cuts": 4},
            SettingError,
            "strategy 'many' has no axes of a mesh, so it can neither",
        ),
        ("many", {"cuts": 4}, SettingError, "mesh=cuts=4 in the code: strategy 'many' has no axes"),
        ("rows+cuts+other", {"cuts": 4}, SettingError, "'other' and strategy 'cuts' both use the axis 'cuts'"),
        ("rows+none", None, Exception, "'none'"),
    ],
)
def test_what_cannot_be_combined(strategy: str, mesh: Any, error: type[Exception], said: str) -> None:
    """Each is refused by name, with what to write."""
    with pytest.raises(error, match=".*".join(map(re.escape, said.split("…")))):
        mixed(strategy, mesh)


@pytest.mark.parametrize(
    "value", [{}, {"rows": 0}, {"rows": -2}, {"rows": True}, {3: 2}, {"a": -1, "b": -1}, "rows", [2]]
)
def test_what_is_no_mesh(value: Any) -> None:
    """A mesh maps names to numbers of ranks."""
    with pytest.raises(SettingError, match=r"mesh=.* in the code: it is a number of ranks for each axis"):
        gather({"mesh": value}, environ={}, folder=Path("/"))


def test_a_mesh_from_anywhere(tmp_path: Path) -> None:
    """The command line's counts like the code's and the file's, and a contradiction names both."""
    read = gather({}, environ={"PLUGFRAME_MESH": "rows=2, cuts=-1"}, folder=tmp_path)
    assert read.value("mesh") == {"rows": 2, "cuts": -1}
    with pytest.raises(SettingError, match="mesh=.* in the code, but .* in the environment variable PLUGFRAME_MESH"):
        gather({"mesh": {"rows": 4}}, environ={"PLUGFRAME_MESH": "rows=2"}, folder=tmp_path)
    same = gather({"mesh": {"rows": 2}}, environ={"PLUGFRAME_MESH": "rows=2"}, folder=tmp_path)
    assert same.value("mesh") == {"rows": 2}
    for text in ("rows", "rows=x", "rows=2,rows=2"):
        with pytest.raises(SettingError, match="it is a number of ranks for each axis"):
            gather({}, environ={"PLUGFRAME_MESH": text}, folder=tmp_path)
    (tmp_path / "plugframe.toml").write_text('strategy = "rows+cuts"\nmesh = {rows = 2, cuts = 2}\n')
    assert gather({}, environ={}, folder=tmp_path).value("mesh") == {"rows": 2, "cuts": 2}


def test_sources_agree_on_strategies() -> None:
    """The same strategies in another order are the same; others contradict."""
    typed = {"strategy": "cuts+rows", "mesh": {"rows": 2, "cuts": 2}}
    assert len(plan(MIXED, typed=typed, strategy=["rows", "cuts"], devices=4).composed) == 1
    with pytest.raises(SettingError, match="'rows' in the code, but 'cuts.rows' in the command line"):
        plan(MIXED, typed=typed, strategy="rows", devices=4)


def options(*words: tuple[str, str, str]) -> Any:
    """Resolve rows+cuts with options: (plugin, name, text) as typed."""
    request = ask(strategy="rows+cuts", mesh={"rows": 2, "cuts": 2}, devices=4)
    found = tuple(Given("strategy", who, name, text, "the command line", "command") for who, name, text in words)
    made = resolve(replace(request, options=found), MIXED, {})
    return {choice.name: choice.arguments for choice in (*made.composed, made.choices["strategy"])}


def test_options_of_one_of_them() -> None:
    """An option is typed with the strategy's name, or without one if a single strategy has it."""
    assert options(("cuts", "count", "3"), ("rows", "count", "2")) == {"cuts": {"count": 3}, "rows": {"count": 2}}
    assert options(("", "depth", "5"))["cuts"] == {"depth": 5}
    with pytest.raises(SettingError, match=r"cuts and rows have .*write --strategy.cuts.count or --strategy.rows.c"):
        options(("", "count", "3"))
    with pytest.raises(SettingError, match="strategy 'hols' is not in use"):
        options(("hols", "count", "3"))
    with pytest.raises(SettingError, match="rows .* has no such option"):
        options(("", "width", "3"))


def test_options_of_one_in_a_file(tmp_path: Path) -> None:
    """A file holds them under the strategy's name."""
    text = '[strategy]\nname = "rows+cuts"\ndepth = 4\n[strategy.cuts]\ncount = 3\n'
    (tmp_path / "plugframe.toml").write_text(text)
    request = gather({"mesh": {"rows": 2, "cuts": 2}, "devices": 4}, environ={}, folder=tmp_path)
    made = resolve(request, MIXED, {})
    assert made.composed[0].arguments == {"count": 3, "depth": 4}


@given(st.permutations([("a", True), ("b", False), ("c", True)]), st.lists(st.integers(1, 3), min_size=3, max_size=3))
def test_who_reads_what(axes: list[tuple[str, bool]], sizes: list[int]) -> None:
    """Ranks along an axis of samples read different shards, the others the same; together they read all."""
    layout = MeshLayout(tuple(Axis(name, samples=samples) for name, samples in axes), tuple(sizes), ("s",) * 3)
    shards: dict[tuple[int, ...], tuple[int, int]] = {}
    for rank in range(layout.num_ranks):
        where = layout.coordinates(rank)
        key = tuple(where[name] for name, samples in axes if samples)
        shard = layout.data_shard(rank)
        assert shards.setdefault(key, shard) == shard
    count = {count for _, count in shards.values()}.pop()
    assert sorted(index for index, _ in shards.values()) == list(range(count))


def test_a_descriptor_says_what_it_divides() -> None:
    """A wrong word is an error of the author."""
    with pytest.raises(ValueError, match="divides='rows'.*: write one of 'stages', 'tensors'"):
        Plugin(factory="a:B", divides="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="write a tuple of Axis"):
        Plugin(factory="a:B", axes=("data",))  # type: ignore[arg-type]
