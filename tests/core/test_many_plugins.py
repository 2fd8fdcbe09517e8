"""Hundreds of installed plugins: all are found, with their own descriptors, and nothing unneeded is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fake_distributions import publish
from plugframe import Lite
from plugframe._compat import Folder
from plugframe.cli import cli
from plugframe.core.registry.registry import Registry
from plugframe.hooks import KINDS

COUNT = 300
DESCRIPTOR = "from plugframe import Plugin\nplugin = Plugin(factory='nowhere:Thing', summary=__name__)\n"


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install plugins of all kinds in turn."""
    kinds = list(KINDS)
    for number in range(COUNT):
        name = f"many-{number}"
        publish(tmp_path, name, f"1.{number}", kinds[number % len(kinds)], f"name{number}", source=DESCRIPTOR)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("many_")]:
        del sys.modules[name]


@pytest.mark.ranks
def test_all_of_many_plugins_are_listed(many: Path) -> None:
    """Every name with its own package and version, by metadata and when loaded."""
    expected = {f"name{number}": (f"many-{number}", f"1.{number}") for number in range(COUNT)}
    result = CliRunner().invoke(cli, ["list-plugins", "--json"])
    rows = [row for row in json.loads(result.stdout) if row["package"] != "plugframe"]
    assert {row["name"]: (row["package"], row["version"]) for row in rows} == expected
    assert {row["status"] for row in rows} == {"not checked"}
    assert not [name for name in sys.modules if name.startswith("many_")]
    result = CliRunner().invoke(cli, ["list-plugins", "--check", "--json"])
    loaded = {row["name"]: row["summary"] for row in json.loads(result.stdout) if row["package"] != "plugframe"}
    assert loaded == {name: package.replace("-", "_") for name, (package, _) in expected.items()}
    assert not [name for name in sys.modules if name.startswith("many_")]


def test_lite_among_many_plugins_chooses_as_among_few(many: Path) -> None:
    """None of them has a priority, so that "auto" is what it is without them; asked for by name each is found."""
    plan = Lite(accelerator="cpu", devices=1).plan
    assert {choice.entry.builtin for choice in plan.all_choices() if choice.entry} == {True}
    assert Registry.discover().find("strategy", "many-1:name1").version == "1.1"


def test_metadata_is_read_again_only_after_something_changed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look costs nothing; a package that comes or goes is seen at once."""
    Registry.discover()
    reads: list[Callable[..., Any]] = []
    read = Folder.read_text
    monkeypatch.setattr(Folder, "read_text", lambda self, name: reads.append(name) or read(self, name))
    Registry.discover()
    assert not reads
    publish(many, "newcomer", "3", "logger", "newcomer")
    assert Registry.discover().find("logger", "newcomer").version == "3"
    assert reads
    for file in (many / "newcomer-3.dist-info").iterdir():
        file.unlink()
    (many / "newcomer-3.dist-info").rmdir()
    assert "newcomer" not in Registry.discover().names("logger")
