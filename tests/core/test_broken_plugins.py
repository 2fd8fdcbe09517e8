"""Every way in which an installed plugin can be broken: all other names work, and the message says whose it is."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fake_distributions import STRATEGY, in_folder, publish, shelf  # noqa: F401  a fixture
from plugframe import Lite, PlugframeError, PlugframeWarning, PluginError
from plugframe.core.registry.registry import Registry
from plugframe.hooks import API, KINDS

Put = Callable[..., None]
#: How long one descriptor may take in these tests. Only the one that never ends takes it.
TIMEOUT_S = 5


@dataclass(frozen=True)
class Case:
    """One way to be broken.

    Attributes:
        source: of the module that holds the descriptor.
        selected: what selecting it says after the origin, a pattern; None where that would not come back.
        checked: what ``list-plugins --check`` says, a pattern; ``"ok"`` where only selecting it can tell.
        value: of the entry point.
        of_class: whether the descriptor is all right, and its class is not.
    """

    source: str
    selected: str | None
    checked: str
    value: str = "{module}:plugin"
    of_class: bool = False


def _class(body: str) -> str:
    return STRATEGY.replace("    pass\n", body).replace(
        "from plugframe.base", "from plugframe import hookimpl\nfrom plugframe.base"
    )


FIX = r"Fix(, upgrade)? or uninstall DIST\."
TELL = r"Tell its author, or uninstall DIST\."

CASES = {
    "import error": Case(
        "import a_library_that_is_not_there", rf"is broken: .*ModuleNotFoundError.* {FIX}", rf"broken: .* {FIX}"
    ),
    "syntax error": Case("def broken(:", rf"is broken: .*SyntaxError.* {FIX}", rf"broken: .* {FIX}"),
    "SystemExit at import": Case(
        "raise SystemExit('no licence')", rf"is broken: .*SystemExit: no licence. {FIX}", rf"broken: .* {FIX}"
    ),
    "ends the process at import": Case("import os; os._exit(3)", None, rf"broken: .*\(exit code 3\)\. {FIX}"),
    "killed at import": Case("import os; os.kill(os.getpid(), 9)", None, rf"broken: .*\(signal SIGKILL\)\. {FIX}"),
    "infinite loop at import": Case(
        "while True: pass", None, rf"broken: importing \w+ did not come back within {TIMEOUT_S} s\. {FIX}"
    ),
    "no such module": Case(STRATEGY, rf"is broken: .* {FIX}", rf"broken: .* {FIX}", value="no_such_module:plugin"),
    "no such attribute": Case(STRATEGY, rf"is broken: .* {FIX}", rf"broken: .* {FIX}", value="{module}:plugn"),
    "no attribute": Case(STRATEGY, r"is broken: .* has to write 'package.module:name'\.", r"broken: .*", "{module}"),
    "wrong type": Case(
        "plugin = {'factory': 'a:b'}", rf"is broken: .* is a dict, not .* {TELL}", rf"broken: .* {TELL}"
    ),
    "a class and no descriptor": Case(
        "class plugin: pass", rf"is broken: .* is a type, not .* {TELL}", rf"broken: .* {TELL}"
    ),
    "wrong field": Case(
        "from plugframe import Plugin\nplugin = Plugin(factory='a:b', devices='cpu')",
        rf"is broken: .*devices='cpu'\): write a tuple of strings.* {FIX}",
        rf"broken: .*write a tuple of strings.* {FIX}",
    ),
    "unknown field": Case(
        "from plugframe import Plugin\nplugin = Plugin(factory='a:b', device=('cpu',))",
        rf"is broken: .*unexpected keyword argument 'device'.* {FIX}",
        rf"broken: .* {FIX}",
    ),
    "an alias of nothing": Case(
        "from plugframe import Plugin\nplugin = Plugin(alias_of='gone')",
        r"strategy='gone' is not installed\..*",
        r"broken: it stands for another plugin, and strategy='gone' is not installed\..*",
    ),
    "no implementation": Case(
        "from plugframe import Plugin\nplugin = Plugin(factory='no_such_module:Thing')",
        rf"is broken: its factory .*ModuleNotFoundError.* {FIX}",
        rf"broken: .*ModuleNotFoundError.* {FIX}",
        of_class=True,
    ),
    "not constructible": Case(
        _class("    def __init__(self):\n        raise OSError('no chip')\n"),
        rf"is broken: .* raised OSError: no chip. {FIX}",
        "ok",
        of_class=True,
    ),
    "missing hook": Case(
        "from plugframe import Plugin\nplugin = Plugin(factory=f'{__name__}:Thing')\nclass Thing: pass\n",
        r"does not provide the hook strategy_\w+: implement it and mark it with @plugframe\.hookimpl\.",
        r"broken: does not provide the hook strategy_\w+: implement it and mark it with @plugframe\.hookimpl\.",
        of_class=True,
    ),
    "extra hook": Case(
        _class("    @hookimpl\n    def strategy_backwards(self): pass\n"),
        rf"implements strategy_backwards, which is no hook\. Did you mean 'strategy_backward'\? {FIX}",
        rf"broken: implements strategy_backwards, which is no hook\. Did you mean 'strategy_backward'\? {FIX}",
        of_class=True,
    ),
    "wrong argument": Case(
        _class("    @hookimpl\n    def strategy_next_batch(self, batches): pass\n"),
        rf"breaks the plugin contract: .*batches.* {FIX}",
        rf"broken: breaks the plugin contract: .*batches.* {FIX}",
        of_class=True,
    ),
    "unmarked hook": Case(
        _class("    def strategy_next_batch(self, iterator, exhausted): pass\n"),
        r"overrides strategy_next_batch without a mark: add @plugframe\.hookimpl\.",
        r"broken: overrides strategy_next_batch without a mark: add @plugframe\.hookimpl\.",
        of_class=True,
    ),
    "old API": Case(
        STRATEGY.replace("summary=", "api=-1, summary="),
        r"speaks version -1 of the plugin contract, .*: type 'pip install --upgrade DIST'\.",
        r"incompatible: .* type 'pip install --upgrade DIST'\.",
    ),
    "newer API": Case(
        STRATEGY.replace("summary=", "api=99, summary="),
        r"speaks version 99 of the plugin contract, .*: type 'pip install --upgrade plugframe'\.",
        r"incompatible: .* type 'pip install --upgrade plugframe'\.",
    ),
    "missing dependency": Case(
        STRATEGY.replace("summary=", "requires=('acme_sdk',), summary="),
        r"needs acme_sdk: type \"pip install 'acme_sdk'\"\.",
        r"missing acme_sdk: type \"pip install 'acme_sdk'\"",
    ),
}
#: Name, distribution and version of each case.
BROKEN = {case: (f"bad{i}", f"bad-{i}", f"0.{i}") for i, case in enumerate(CASES)}


def _pattern(text: str, distribution: str) -> str:
    return text.replace("DIST", distribution)


def _lite(**settings: Any) -> Lite:
    return Lite(**{"accelerator": "cpu", "devices": 1, **settings})


@pytest.mark.parametrize("case", [case for case, how in CASES.items() if how.selected])
def test_a_broken_plugin_names_its_package_and_hurts_nobody_else(shelf: Put, case: str) -> None:  # noqa: F811
    """Selecting it is one error with distribution, version and the fix; every other selection works beside it."""
    how, (name, distribution, version) = CASES[case], BROKEN[case]
    shelf(distribution, version, "strategy", name, source=how.source, value=how.value)
    shelf("good-strategy", "1.0", "strategy", "good", source=STRATEGY)
    with pytest.raises(PlugframeError) as caught:
        _lite(strategy=name)
    text = str(caught.value)
    origin = re.escape(f"strategy '{name}' ({distribution} {version}) ")
    assert re.fullmatch(f"({origin})?{_pattern(str(how.selected), distribution)}", text)
    if case != "an alias of nothing":
        assert re.match(origin, text)
    assert "\n" not in text
    assert _lite(strategy="good").plan.choices["strategy"].qualified == "good-strategy:good"
    assert _lite(strategy="single", loggers="csv").plan.choices["strategy"].qualified == "plugframe:single"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlugframeWarning)
        assert _lite().plan.choices["strategy"].qualified == "plugframe:single"


def test_the_check_of_a_listing_survives_all_of_them(tmp_path: Path) -> None:
    """What ends or hangs the process included, each has its own status, and every other plugin is "ok"."""
    for case, (name, distribution, version) in BROKEN.items():
        publish(tmp_path, distribution, version, "strategy", name, source=CASES[case].source, value=CASES[case].value)
    publish(tmp_path, "good-strategy", "1.0", "strategy", "good", source=STRATEGY)
    for name in ("twin-one", "twin-two"):
        publish(tmp_path, name, "2.0", "strategy", "twin", "ddp", source=STRATEGY)
    command = [sys.executable, "-m", "plugframe", "list-plugins", "--check", "--json", f"--timeout={TIMEOUT_S}"]
    done = subprocess.run(
        command, env=in_folder(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    rows = {(row["package"], row["kind"], row["name"]): row for row in json.loads(done.stdout)}
    for case, (name, distribution, version) in BROKEN.items():
        row = rows.pop((distribution, "strategy", name))
        assert row["version"] == version
        assert re.fullmatch(_pattern(CASES[case].checked, distribution), row["status"]), (case, row["status"])
    assert (
        rows.pop(("twin-one", "strategy", "twin"))["status"] == "the same name in several packages; use twin-one:twin"
    )
    assert rows.pop(("twin-two", "strategy", "ddp"))["status"] == "shadowed by the built-in; use twin-two:ddp"
    others = {key: row["status"] for key, row in rows.items() if not key[0].startswith("twin")}
    assert others.pop(("good-strategy", "strategy", "good")) == "ok"
    assert {package for package, _, _ in others} == {"plugframe"}
    assert {status for status in others.values() if not status.startswith("missing")} == {"ok"}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_passes_over_a_broken_plugin_of_any_kind(shelf: Put, kind: str) -> None:  # noqa: F811
    """Under "auto" it is a warning with its name and package, and the job runs on."""
    shelf(f"bad-{kind}", "0.9", kind, "bad", source="raise SystemExit(1)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _lite() as lite:
            lite.launch()
    told = [str(each.message) for each in caught if issubclass(each.category, PlugframeWarning)]
    needed = kind not in ("accelerator", "launcher", "logger", "extension")  # an accelerator was asked for by name
    assert [f"{kind} 'bad' (bad-{kind} 0.9) is broken" in text for text in told] == [True] * needed


def test_each_installed_name_broken_in_turn_leaves_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever entry point of the environment breaks, and however, all others are found and load as before."""
    ways = {case: how for case, how in CASES.items() if how.selected and not how.of_class}
    monkeypatch.syspath_prepend(tmp_path)
    for number, how in enumerate(ways.values()):
        (tmp_path / f"way{number}.py").write_text(how.source)
    entries = Registry.discover().entries()
    for broken in entries:
        for number, (case, how) in enumerate(ways.items()):
            bad = replace(broken, value=how.value.format(module=f"way{number}"))
            registry = Registry([bad if entry is broken else entry for entry in entries])
            if case not in ("an alias of nothing", "missing dependency"):
                with pytest.raises(PluginError, match=re.escape(f"{broken.origin} ")):
                    registry.describe(registry.find(bad.kind, bad.qualified))
        with contextlib.suppress(PluginError):
            registry.describe(bad)
        for other in registry.entries():
            if other is not bad:
                assert registry.find(other.kind, other.qualified) == other
                assert registry.describe(other).api == API
    for number in range(len(ways)):
        sys.modules.pop(f"way{number}", None)
