"""The hooks plugins are written against, compared with a snapshot: they do not change unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT
from plugframe import Lite, PlugframeWarning, hookimpl
from plugframe.base import Extension, Strategy
from plugframe.core.registry.registry import Entry, Registry
from plugframe.hooks import API, KINDS, Job, Kind, Option, Plugin, StrategySpec, hookspec
from plugframe.hooks.markers import Deprecated, deprecated_of, is_per_plugin, provider

SNAPSHOT = Path(__file__).parent / "hooks.json"

WHAT_TO_DO = """The plugin contract is not the one of tests/hooks/hooks.json:

  {differences}

Every plugin that is published was written against it. If this is meant:
  1. keep what there was working for one more API (mark it: @provider(deprecated="…", deprecated_arguments={{…}})), or,
     if that cannot be, raise API in plugframe/hooks/descriptor.py;
  2. edit tests/hooks/hooks.json by hand, and raise its "revision";
  3. tell plugin authors in CHANGELOG.md, in a line with the words "plugin contract, revision {revision} ({digest})".
"""


def contract() -> dict[str, Any]:
    """Return everything a plugin is written against, as text."""
    return {
        "descriptor": {cls.__name__: _fields(cls) for cls in (Plugin, Option, Job)},
        "hooks": {kind.name: {name: _hook(kind, name) for name in sorted(kind.hooks)} for kind in KINDS.values()},
    }


def _fields(cls: Any) -> list[str]:
    return [f"{field.name}: {field.type}" for field in dataclasses.fields(cls)]


def _hook(kind: Kind, name: str) -> str:
    function = getattr(kind.spec, name)
    signature = inspect.signature(function)
    parameters = [str(p).replace("'", "") for p in signature.parameters.values() if p.name != "self"]
    deprecated = deprecated_of(function)
    gone = [*(["deprecated"] if deprecated.hook else []), *(f"{name} deprecated" for name in deprecated.arguments)]
    call = "one provider" if function.plugframe_spec["firstresult"] else "every implementation"
    call = "each plugin by itself, optional" if is_per_plugin(function) else call
    return f"({', '.join(parameters)}) -> {signature.return_annotation}; {', '.join([call, *gone])}"


def digest(hooks: dict[str, Any]) -> str:
    """Return a few letters that stand for a contract."""
    return hashlib.sha256(json.dumps(hooks, sort_keys=True).encode()).hexdigest()[:8]


def differences(then: Any, now: Any, where: str = "") -> list[str]:
    """Return what is not the same, a line each."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [line for key in keys for line in differences(then.get(key), now.get(key), f"{where} {key}".strip())]
    return [] if then == now else [f"{where}: {then or 'absent'}  ->  {now or 'gone'}"]


def test_the_hooks_are_those_of_the_snapshot() -> None:
    """A hook, its signature or the descriptor changes only together with the snapshot, by hand."""
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    now = contract()
    found = differences({name: snapshot[name] for name in now}, now)
    assert not found, WHAT_TO_DO.format(
        differences="\n  ".join(found), revision=snapshot["revision"] + 1, digest=digest(now)
    )


def test_the_changelog_tells_the_revision() -> None:
    """The revision of the snapshot stands in the changelog, with letters that any change of the contract changes."""
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    words = f"plugin contract, revision {snapshot['revision']} ({digest(contract())})"
    changelog = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    assert words.lower() in changelog.lower(), (
        f"CHANGELOG.md does not say {words!r}: add a line that says what changed."
    )


def test_the_snapshot_names_the_api() -> None:
    """The number in the descriptor and in the snapshot are raised together."""
    assert json.loads(SNAPSHOT.read_text(encoding="utf-8"))["api"] == API


def test_a_change_is_told_line_by_line() -> None:
    """What was, what is, and where."""
    then = {"hooks": {"strategy": {"a": "()", "b": "()"}}}
    now = {"hooks": {"strategy": {"a": "(x)", "c": "()"}}}
    assert differences(then, now) == [
        "hooks strategy a: ()  ->  (x)",
        "hooks strategy b: ()  ->  gone",
        "hooks strategy c: absent  ->  ()",
    ]
    assert digest(then) != digest(now)


# ---------------------------------------------------------------------- what is on its way out


class Aged(Strategy):
    """A strategy that implements a hook of its own, and inherits all others."""

    @hookimpl
    def strategy_describe(self) -> list[str]:
        return []


class Spying(Extension):
    """Wraps a hook, and takes one of its arguments."""

    @hookimpl(wrapper=True)
    def strategy_optimizer_step(self, closure: Any) -> Any:
        return (yield)


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a hook and an argument of another be deprecated, and a third hook that every strategy inherits."""

    def deprecate(name: str, **what: Any) -> None:
        monkeypatch.setattr(getattr(StrategySpec, name), "plugframe_deprecated", Deprecated(**what))

    deprecate("strategy_describe", hook="implement strategy_setup.")
    deprecate("strategy_optimizer_step", arguments={"closure": "it is part of step"})
    deprecate("strategy_zero_grad", hook="it is gone")


def test_a_deprecated_hook_or_argument_is_warned_of_by_plugin(aged: None) -> None:
    """One warning for each, with the plugin's name and what to write; what a base class does is not the author's."""
    with pytest.warns(PlugframeWarning) as told:
        Lite(accelerator="cpu", devices=1, strategy=Aged(), plugins=[Spying()])
    assert [str(each.message) for each in told] == [
        "strategy object Aged implements strategy_describe, which is deprecated: implement strategy_setup. "
        "To avoid this, fix its class.",
        "extension object Spying takes closure in strategy_optimizer_step, which is deprecated: it is part of step. "
        "To avoid this, fix its class.",
    ]


def test_the_package_of_a_deprecated_plugin_is_named(aged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names the package to upgrade; a plugin that uses nothing deprecated causes none."""
    entry = Entry("strategy", "aged", f"{__name__}:plugin", "acme-kit", "1.2")
    registry = Registry([*Registry.discover().entries(), entry])
    monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, **_: registry))
    said = (
        r"strategy 'aged' \(acme-kit 1.2\) implements strategy_describe.*upgrade acme-kit, or report it to its author"
    )
    with pytest.warns(PlugframeWarning, match=said):
        Lite(accelerator="cpu", devices=1, strategy="aged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lite(accelerator="cpu", devices=1, strategy="single")


plugin = Plugin(factory=f"{__name__}:Aged")


def test_a_hook_is_marked_where_it_is_specified() -> None:
    """Both markers take it, with and without arguments, and pluggy is given what it needs."""

    class Spec:
        @provider
        def plain(self) -> None: ...

        @provider(deprecated="use another")
        def old(self) -> None: ...

        @hookspec(deprecated_arguments={"x": "leave it out"})
        def told(self, x: int) -> None: ...

    assert deprecated_of(Spec.plain) == Deprecated()
    assert deprecated_of(Spec.old).hook == "use another"
    assert deprecated_of(Spec.told).arguments == {"x": "leave it out"}
    firstresult = [vars(function)["plugframe_spec"]["firstresult"] for function in (Spec.plain, Spec.old, Spec.told)]
    assert firstresult == [True, True, False]
