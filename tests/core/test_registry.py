"""What is installed: read from metadata alone, found by name, imported only when asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from plugframe import (
    AmbiguousPluginError,
    MissingDependencyError,
    Plugin,
    PluginLoadError,
    SettingError,
    UnknownPluginError,
)
from plugframe.core.registry.registry import Entry, Registry
from plugframe.hooks import API, KINDS

Publish = Callable[..., None]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Return a function that leaves a distribution's metadata where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def publish(name: str, version: str, entry_points: str, *, about: str | None = None) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        if about is None:
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        if about:
            (folder / "METADATA").write_text(about)
        (folder / "entry_points.txt").write_text(entry_points)

    return publish


def entry(name: str, distribution: str = "acme", *, kind: str = "strategy", value: str = "", **more: Any) -> Entry:
    """Return an entry of a distribution; by default its descriptor does not exist."""
    version = "0.1.0" if distribution == "plugframe" else "1.2"
    return Entry(kind, name, value or f"nowhere:{name}", distribution, version, **more)


# ---------------------------------------------------------------------- discovery


def test_every_published_name_of_plugframe_is_found() -> None:
    """The registry holds exactly what the metadata says, with distribution and version, built-ins first."""
    expected = {
        (point.group.removeprefix("plugframe."), point.name)
        for point in metadata.distribution("plugframe").entry_points
        if point.group.startswith("plugframe.") and point.group != "plugframe.command"
    }
    registry = Registry.discover()
    own = [e for e in registry.entries() if e.builtin]
    assert {(e.kind, e.name) for e in own} == expected
    assert {(e.distribution, e.version) for e in own} == {("plugframe", metadata.version("plugframe"))}
    assert {e.kind for e in own} == set(KINDS)


def test_discovery_imports_nothing_that_is_published(publish: Publish) -> None:
    """A distribution whose modules do not even exist is listed like any other."""
    publish("acme-ddp", "1.2", "[plugframe.strategy]\nacme = acme_ddp.nowhere:plugin\n")
    found = Registry.discover().find("strategy", "acme")
    assert (found.qualified, found.value, found.version) == ("acme-ddp:acme", "acme_ddp.nowhere:plugin", "1.2")
    assert not found.builtin
    assert "acme_ddp" not in sys.modules


def test_extras_of_an_entry_point_are_read(publish: Publish) -> None:
    """``name = module:attribute [extra]`` keeps the extra, and its distributions come from metadata."""
    about = (
        "Metadata-Version: 2.1\nName: acme-ddp\nVersion: 1\nProvides-Extra: fast\n"
        "Requires-Dist: torch\nRequires-Dist: acme-absent>=2; extra == 'fast'\n"
    )
    publish("acme-ddp", "1", "[plugframe.strategy]\nacme = acme_ddp:plugin [fast]\n", about=about)
    registry = Registry.discover()
    found = registry.find("strategy", "acme")
    assert (found.value, found.extras) == ("acme_ddp:plugin", ("fast",))
    assert registry.needs(found) == registry.missing(found) == ["acme-absent"]


def test_half_removed_and_malformed_distributions_hurt_nobody(publish: Publish) -> None:
    """What a failed removal left behind, and an entry nobody can parse, are listed and change nothing for others."""
    publish("leftover", "1", "[plugframe.strategy]\nold = leftover:plugin\n", about="")
    publish("careless", "1", "[plugframe.strategy]\nbad = not a reference\nworse = careless\n")
    registry = Registry.discover()
    assert registry.find("strategy", "old").distribution == "unknown"
    with pytest.raises(PluginLoadError, match=r"strategy 'bad' \(careless 1\) is broken: .* names no object"):
        registry.describe(registry.find("strategy", "bad"))
    with pytest.raises(PluginLoadError, match=r"'careless' names no object; .* 'package.module:name'"):
        registry.describe(registry.find("strategy", "worse"))
    assert registry.find("strategy", "ddp").builtin


def test_a_distribution_found_twice_is_one(publish: Publish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same package on two places of the path publishes its names once."""
    publish("acme-ddp", "1.2", "[plugframe.strategy]\nacme = acme_ddp:plugin\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), f"{tmp_path}/../{tmp_path.name}", *sys.path])
    assert [e.name for e in Registry.discover().entries("strategy")].count("acme") == 1


# ---------------------------------------------------------------------- names


NAMES = Registry(
    [
        entry("ddp", "plugframe"),
        entry("ddp", "Broken_DDP"),
        entry("acme", "acme-ddp"),
        entry("acme", "acme-two"),
        entry("lone", "acme-ddp"),
        entry("csv", "plugframe", kind="logger"),
    ]
)


@pytest.mark.parametrize(
    ("name", "qualified"),
    [
        ("ddp", "plugframe:ddp"),
        ("plugframe:ddp", "plugframe:ddp"),
        ("broken-ddp:ddp", "Broken_DDP:ddp"),
        ("Broken.DDP:ddp", "Broken_DDP:ddp"),
        ("acme-two:acme", "acme-two:acme"),
        ("lone", "acme-ddp:lone"),
    ],
)
def test_a_name_finds_its_plugin(name: str, qualified: str) -> None:
    """A bare name is a built-in's or an only one's; a qualified one is spelt as pip would take it."""
    assert NAMES.find("strategy", name).qualified == qualified


def test_a_built_in_name_cannot_be_taken_over() -> None:
    """A third party's plugin of a built-in name is shadowed; the built-in is not."""
    assert [(e.qualified, NAMES.shadowed(e)) for e in NAMES.entries("strategy") if e.name == "ddp"] == [
        ("plugframe:ddp", False),
        ("Broken_DDP:ddp", True),
    ]


def test_an_ambiguous_name_lists_the_qualified_ones() -> None:
    """Two packages with one name are an error once the bare name is used."""
    with pytest.raises(
        AmbiguousPluginError,
        match="'acme' is published by 2 packages: write 'acme-ddp:acme' or 'acme-two:acme'",
    ):
        NAMES.find("strategy", "acme")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dpd", r"strategy='dpd' is not installed. Did you mean 'ddp'\? Installed: acme, ddp, lone\."),
        ("acme-ddp:acm", r"Did you mean 'acme-ddp:acme'\?"),
        ("csv", r"strategy='csv' is not installed. It is the name of a logger\."),
        ("plugframe:lone", "'plugframe:lone' is not installed"),
        ("", "strategy='' is not installed"),
        (":ddp", "':ddp' is not installed"),
    ],
)
def test_an_unknown_name(name: str, said: str) -> None:
    """An unknown name is met with the closest one and with what is installed."""
    with pytest.raises(UnknownPluginError, match=said):
        NAMES.find("strategy", name)


def test_an_unknown_name_where_nothing_is_installed() -> None:
    """Where there is nothing of a kind, that is said."""
    with pytest.raises(UnknownPluginError, match="launcher='elastic' is not installed. Installed: none"):
        NAMES.find("launcher", "elastic")


def test_a_retired_name_says_what_replaced_it() -> None:
    """A name that used to exist is answered with the sentence its successor keeps for it."""
    with pytest.raises(UnknownPluginError, match="strategy='dp' is not installed: .*strategy='ddp'"):
        Registry.discover().find("strategy", "dp")


# ---------------------------------------------------------------------- descriptors and factories


class Counted:
    """Made by a factory; keeps what it was given."""

    def __init__(self, **options: Any) -> None:
        self.options = options


def fail() -> None:
    """A factory that raises in two lines."""
    raise OSError("no chip\non the bus.")


def leave() -> None:
    """A factory that ends the program."""
    raise SystemExit(3)


def refuse() -> None:
    """A factory that was given something wrong by the user."""
    raise SettingError("ACME_PORT='x' is not a port.")


def interrupt() -> None:
    """A factory during which Ctrl-C is pressed."""
    raise KeyboardInterrupt


HERE = __name__
counted = Plugin(factory=f"{HERE}:Counted", preset={"stage": 2})
previous = Plugin(factory=f"{HERE}:Counted", api=API)
newer = Plugin(factory=f"{HERE}:Counted", api=API + 1)
older = Plugin(factory=f"{HERE}:Counted", api=API - 2)
text = "text"
failing = Plugin(factory=f"{HERE}:fail")
leaving = Plugin(factory=f"{HERE}:leave")
refusing = Plugin(factory=f"{HERE}:refuse")
interrupted = Plugin(factory=f"{HERE}:interrupt")
gone = Plugin(factory=f"{HERE}:Gone")
needy = Plugin(factory=f"{HERE}:Counted", requires=("acme_sdk", "json"), extra="acme[sdk]")
odd = Plugin(factory=f"{HERE}:Counted", requires=("acme_sdk.core", "json.decoder"))


def published(attribute: str) -> tuple[Registry, Entry]:
    """Return a registry with one entry, for a descriptor of this module."""
    found = entry(attribute, value=f"{HERE}:{attribute}")
    return Registry([found]), found


def test_making_a_plugin_hands_over_its_options() -> None:
    """Two names can share one factory: the descriptor's options tell them apart, and those of the caller are added."""
    registry, found = published("counted")
    assert registry.make(found).options == {"stage": 2}
    assert registry.make(found, {"stage": 3, "offload": True}).options == {"stage": 3, "offload": True}


def test_a_descriptor_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded stays; a second registry looks again."""
    registry, found = published("counted")
    first = registry.describe(found)
    monkeypatch.setattr(sys.modules[HERE], "counted", previous)
    assert registry.describe(found) is first
    assert Registry([found]).describe(found) is previous


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("text", r"strategy 'text' \(acme 1.2\) is broken: .*:text is a str, not a plugframe.Plugin. .*uninstall acme"),
        ("newer", r"speaks version 3 .* this plugframe speaks 2 and 1: type 'pip install --upgrade plugframe'"),
        ("older", r"speaks version 0 .* this plugframe speaks 2 and 1: type 'pip install --upgrade acme'"),
        ("absent", r"its descriptor .*:absent failed to import with AttributeError.* uninstall acme"),
    ],
)
def test_a_broken_descriptor_names_its_distribution_and_the_way_out(attribute: str, said: str) -> None:
    """Whatever is wrong with a descriptor, its package, the version and the fix are named."""
    registry, found = published(attribute)
    with pytest.raises(PluginLoadError, match=said):
        registry.describe(found)


def test_the_contract_before_this_one_is_still_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin written for the previous version of the contract works, one written for that before it does not."""
    monkeypatch.setattr("plugframe.hooks.descriptor.API", API + 1)
    registry, found = published("previous")
    assert isinstance(registry.make(found), Counted)
    registry, found = published("older")
    with pytest.raises(PluginLoadError, match=r"version 0 .* plugframe speaks 3 and 2: type .*--upgrade acme'"):
        registry.describe(found)


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("failing", r"strategy 'failing' \(acme 1.2\) is broken: .*:fail raised OSError: no chip on the bus\. Fix or"),
        ("leaving", r"raised SystemExit: 3\. Fix or uninstall acme"),
        ("gone", r"its factory .*:Gone failed to import with AttributeError"),
    ],
)
def test_a_broken_factory_names_its_distribution(attribute: str, said: str) -> None:
    """Whatever a factory does, ending the program included, is one line that names its package."""
    registry, found = published(attribute)
    with pytest.raises(PluginLoadError, match=said):
        registry.make(found)


def test_errors_for_the_user_are_not_wrapped() -> None:
    """A PlugframeError or KeyboardInterrupt raised by a factory is not wrapped in a PluginError."""
    registry, found = published("refusing")
    with pytest.raises(SettingError, match="ACME_PORT"):
        registry.make(found)
    registry, found = published("interrupted")
    with pytest.raises(KeyboardInterrupt):
        registry.make(found)


def test_a_missing_dependency_says_what_to_install() -> None:
    """What is missing is told before the factory is imported, with the words to type; what is there is not named."""
    registry, found = published("needy")
    assert registry.absent(found) == "acme_sdk: type \"pip install 'acme[sdk]'\""
    with pytest.raises(MissingDependencyError, match=r"'needy' \(acme 1.2\) needs acme_sdk: type .pip install"):
        registry.make(found)
    registry, found = published("odd")
    assert registry.absent(found) == "acme_sdk.core: type \"pip install 'acme_sdk.core'\""
    registry, found = published("counted")
    assert registry.absent(found) is None


@pytest.mark.parametrize("error", ["SystemExit(2)", "KeyError('x')", "__import__('pytest').skip.Exception('x')"])
def test_a_module_that_raises_anything_on_import_is_contained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """One broken package must not end the program, whatever it raises."""
    (tmp_path / "raising_plugin.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = entry("x", value="raising_plugin:plugin")
    with pytest.raises(PluginLoadError, match="failed to import with"):
        Registry([found]).describe(found)


def test_ctrl_c_during_an_import_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt is not a broken plugin."""
    (tmp_path / "interrupted_plugin.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = entry("x", value="interrupted_plugin:plugin")
    with pytest.raises(KeyboardInterrupt):
        Registry([found]).describe(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "exactly one of factory=, alias_of= and best_of="),
        ({"factory": "a:B", "alias_of": "ddp"}, "exactly one of factory=, alias_of= and best_of="),
        ({"factory": "a.B"}, "write 'package.module:Name'"),
    ],
)
def test_a_wrong_descriptor_is_refused_where_it_is_written(words: dict[str, Any], said: str) -> None:
    """The author sees the mistake in the line that makes it."""
    with pytest.raises(ValueError, match=said):
        Plugin(**words)
