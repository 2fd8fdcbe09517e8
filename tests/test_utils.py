"""What every package calls instead of writing it again."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch.distributed as dist

from plugframe.utils.environment import environment, preserved_environment
from plugframe.utils.own_packages import own_packages
from plugframe.utils.rank_text import ranks_text
from plugframe.utils.stores import fresh_prefix, fresh_store


def test_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are set or unset within, and are as before after, also after an error."""
    monkeypatch.setenv("OLD", "1")
    monkeypatch.setenv("GONE", "2")
    monkeypatch.delenv("NEW", raising=False)
    with suppress(ValueError), environment({"OLD": "3", "GONE": None, "NEW": "4"}):
        assert (os.environ["OLD"], os.environ.get("GONE"), os.environ["NEW"]) == ("3", None, "4")
        raise ValueError("out")
    assert (os.environ["OLD"], os.environ["GONE"], os.environ.get("NEW")) == ("1", "2", None)


def test_the_complete_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set, changed or unset within is undone."""
    monkeypatch.setenv("OLD", "1")
    monkeypatch.setenv("GONE", "2")
    monkeypatch.delenv("NEW", raising=False)
    before = dict(os.environ)
    with preserved_environment():
        os.environ.update(OLD="3", NEW="4")
        del os.environ["GONE"]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([1, 0], "ranks 0 and 1"),
        (range(5), "ranks 0-4"),
        ([0, 2, 3, 4, 7], "ranks 0, 2-4 and 7"),
        (range(0, 64, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 24 more"),
        ([*range(0, 16, 2), 20, 21, 22], "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 3 more"),
    ],
)
def test_ranks_are_shown_as_ranges(ranks: list[int], text: str) -> None:
    """Three in a row are a range, and of many a few are enough."""
    assert ranks_text(ranks) == text


def test_a_prefix_is_never_used_twice() -> None:
    """Ranks that call equally often get the same prefix, and another one each time."""
    store = dist.HashStore()
    prefixes = [[fresh_prefix(store, "test", rank) for rank in range(12)] for _ in range(3)]
    assert [len(set(of_all)) for of_all in prefixes] == [1, 1, 1]
    assert len({of_all[0] for of_all in prefixes}) == 3
    assert fresh_prefix(store, "other", 0) not in {of_all[0] for of_all in prefixes}
    first, second = (fresh_store(store, "stores", 0) for _ in range(2))
    first.set("key", "1")
    assert not second.check(["key"])


def test_own_packages_are_those_of_the_distribution() -> None:
    """The built-ins' package is found in the metadata; strangers' packages are not plugframe's own."""
    assert own_packages() == {"plugframe", "plugframe_builtins"}
