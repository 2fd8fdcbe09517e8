"""What is disabled, and what is not allowed, is never imported; whoever asks for it is told where that was said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fake_distributions import EXTENSION, STRATEGY, in_folder, publish, shelf  # noqa: F401  a fixture
from plugframe import Lite, PlugframeWarning, RefusedPluginError, SettingError, UnknownPluginError, UnsupportedError
from plugframe.cli import cli
from plugframe.cli.shared_options import disabled_variables, policy_variables
from plugframe.core.config.request import gather
from plugframe.core.registry.policy import Policy, read_policy
from plugframe.core.registry.registry import Entry, Registry
from plugframe.hooks.variables import ALLOW, DISABLE, FROM_COMMAND_LINE

Put = Callable[..., None]
VARIABLE = "the environment variable PLUGFRAME_DISABLE"
#: What a module that must never be imported does when it is.
TRAP = "import os, pathlib\npathlib.Path(os.environ['TRAP']).write_text(__name__)\n"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once a trapped module was imported, in any process; and a folder without settings."""
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trap"


def entry(qualified: str, kind: str = "strategy") -> Entry:
    """Return an entry; one of plugframe's own without a package."""
    distribution, _, name = qualified.rpartition(":")
    return Entry(kind, name, "nowhere:plugin", distribution or "plugframe", "1.2")


def policy(folder: Path, file: str = "", **variables: str) -> Policy:
    """Read what is said in a settings file of `folder` and in variables."""
    (folder / "plugframe.toml").write_text(file)
    return read_policy({f"PLUGFRAME_{name}": text for name, text in variables.items()}, folder)


def plug(*words: str) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(cli, list(words))


# ---------------------------------------------------------------------- what is said, and where


@pytest.mark.parametrize(
    ("file", "variables", "refused"),
    [
        ("", {}, ()),
        ("", {"DISABLE": "acme"}, ("one:acme", "two:acme")),
        ("", {"DISABLE": "one:acme"}, ("one:acme",)),
        ("", {"DISABLE": "ONE"}, ("one:acme", "one:other")),
        ("", {"DISABLE": " one:acme , ddp,"}, ("one:acme", "ddp", "two:ddp")),
        ("", {"DISABLE": "plugframe:ddp"}, ("ddp",)),
        ("disable = ['two']", {"DISABLE": "one:other"}, ("one:other", "two:acme", "two:ddp")),
        ("allow = []", {}, ("one:acme", "one:other", "two:acme", "two:ddp")),
        ("allow = ['one']", {}, ("two:acme", "two:ddp")),
        ("allow = ['one:acme', 'Two']", {}, ("one:other",)),
        ("allow = ['one']\ndisable = ['acme']", {}, ("one:acme", "two:acme", "two:ddp")),
        ("allow = ['one']", {"ALLOW": "one:acme,two"}, ("one:other", "two:acme", "two:ddp")),
        ("", {"ALLOW": "plugframe"}, ("one:acme", "one:other", "two:acme", "two:ddp")),
        ("allow = ['acme']", {}, ("one:acme", "one:other", "two:acme", "two:ddp")),
    ],
)
def test_a_policy_refuses(tmp_path: Path, file: str, variables: dict[str, str], refused: tuple[str, ...]) -> None:
    """Disabled is a name, a package or both; allowed a package or one name of it; plugframe's own always are."""
    entries = [entry(name) for name in ("ddp", "single", "one:acme", "one:other", "two:acme", "two:ddp")]
    registry = Registry(entries, policy(tmp_path, file, **variables))
    expected = {name if ":" in name else f"plugframe:{name}" for name in refused}
    assert {e.qualified for e in registry.refused()} == expected
    assert [e for e in entries if e not in registry.refused()] == [e for e in entries if e in registry.entries()]


@pytest.mark.parametrize(
    ("file", "variables", "error"),
    [
        ("allow = 'acme'", {}, r"allow in .*plugframe.toml is 'acme': it is a list of names, such as"),
        ("disable = [1]", {}, r"disable in .*plugframe.toml is \[1\]: it is a list of names"),
        (
            "allow = ['acme-*']",
            {},
            r"allow in .*plugframe.toml holds 'acme-\*': write a package, or package:name, in full",
        ),
        ("allow = ['']", {}, r"holds '': write a package"),
        ("", {"DISABLE": "a:b:c"}, r"PLUGFRAME_DISABLE holds 'a:b:c'"),
        ("", {"DISABLE": "plugframe"}, r"'plugframe' is disabled in .*: that is all of plugframe itself. Name one of"),
        ("alow = []", {}, ""),
        ("allow = ", {}, r"plugframe.toml is not valid TOML"),
    ],
)
def test_a_wrong_policy_is_an_error(tmp_path: Path, file: str, variables: dict[str, str], error: str) -> None:
    """What cannot be understood does not fall back to allowing everything."""
    if not error:
        (tmp_path / "plugframe.toml").write_text(file)
        with pytest.raises(SettingError, match=r"'alow' is not a setting. Did you mean 'allow'\?"):
            gather({}, environ={}, folder=tmp_path)
        return
    with pytest.raises(SettingError, match=error):
        policy(tmp_path, file, **variables)


def test_both_keys_are_no_settings_of_a_job(tmp_path: Path) -> None:
    """``allow`` and ``disable``, in a file or in variables, are read by the plugin policy and are no settings."""
    (tmp_path / "pyproject.toml").write_text("[tool.plugframe]\nallow = []\ndisable = ['x']\nstrategy = 'ddp'\n")
    request = gather({}, environ={DISABLE: "x", ALLOW: "y"}, folder=tmp_path)
    assert set(request.settings) == {"strategy"}
    assert request.notes == ()
    assert read_policy({}, tmp_path / "deeper" / "down").allowed[0].source == f"allow in {tmp_path / 'pyproject.toml'}"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("acme", r"strategy 'acme' \(one 1.2\) is disabled by 'one' in .*PLUGFRAME_DISABLE: take it out there to use"),
        ("one:acme", r"strategy 'acme' \(one 1.2\) is disabled by 'one' in"),
        ("ddp", r"strategy 'ddp' \(plugframe 1.2\) is disabled by 'plugframe:ddp' in"),
        (
            "free",
            r"strategy 'free' \(two 1.2\) is not allowed: add 'two' to allow in .*toml, where 'free' is taken for a",
        ),
        ("two:ddp", r"strategy 'ddp' \(two 1.2\) is not allowed: add 'two' to allow in .*plugframe.toml$"),
    ],
)
def test_a_refused_name_says_where_that_was_said(tmp_path: Path, words: str, error: str) -> None:
    """By its bare and by its qualified name. A built-in's name falls to nobody else while it is disabled."""
    entries = [entry(name) for name in ("ddp", "one:acme", "two:ddp", "two:free")]
    registry = Registry(entries, policy(tmp_path, "allow = ['free', 'one']", DISABLE="one,plugframe:ddp"))
    with pytest.raises(RefusedPluginError, match=error.removesuffix("$")):
        registry.find("strategy", words)
    with pytest.raises(RefusedPluginError, match="strategy"):
        registry.describe(next(e for e in entries if words in (e.name, e.qualified)))


def test_of_two_packages_the_one_that_may_be_used_has_the_name(tmp_path: Path) -> None:
    """Disabling one of them settles which is meant."""
    entries = [entry("one:acme"), entry("two:acme")]
    assert Registry(entries, policy(tmp_path, DISABLE="one")).find("strategy", "acme").distribution == "two"
    assert Registry(entries, policy(tmp_path, "allow = ['one']")).find("strategy", "acme").distribution == "one"
    with pytest.raises(RefusedPluginError, match=r"\(one 1.2\) is disabled"):
        Registry(entries, policy(tmp_path, DISABLE="acme")).find("strategy", "acme")


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["allow", "disable"])
def test_what_is_refused_is_never_imported(shelf: Put, trap: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:  # noqa: F811
    """No command, no selection, no error on the way and no object in the code imports it; what is allowed works."""
    kinds = ("accelerator", "strategy", "precision", "collective", "checkpoint", "environment", "launcher", "logger")
    for kind in kinds:
        shelf(f"evil-{kind}", "6.6", kind, "evil", source=TRAP)
    shelf("evil-two", "6.6", "extension", "evil", source=TRAP)
    shelf("good-extension", "1.0", "extension", "good")
    names = [f"evil-{kind}" for kind in (*kinds, "two")]
    (trap.parent / "plugframe.toml").write_text(f"{how} = {['good-extension'] if how == 'allow' else names}\n")
    with Lite(accelerator="cpu", devices=1, plugins="good") as lite:
        lite.launch()
    with pytest.raises(RefusedPluginError, match=r"strategy 'evil' \(evil-strategy 6.6\) is "):
        Lite(strategy="evil")
    with pytest.raises(UnknownPluginError, match="not installed"):
        Lite(strategy="nothing-like-it")
    rows = json.loads(plug("list-plugins", "--check", "--json").stdout)
    evil = [row for row in rows if row["name"] == "evil"]
    assert len(evil) == 9
    assert {row["status"].partition(" ")[0] for row in evil} == {"not" if how == "allow" else "disabled"}
    assert [row["status"] for row in rows if row["name"] == "good"] == ["ok"]
    for words in (("list-plugins", "evil"), ("run", "--strategy=evil", __file__)):
        result = plug(*words)
        assert result.exit_code == 2
        assert re.fullmatch(r"plugframe: \w+ 'evil' \(evil-\w+ 6.6\) is .*plugframe\.toml.*\n", result.stderr)
    assert plug("env").exit_code == 0
    assert not trap.exists()
    assert not [name for name in sys.modules if name.startswith("evil")]


def test_auto_without_what_it_needs_says_what_is_disabled(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plugin is taken where there is one; where there is none, the error names what was disabled and where."""
    monkeypatch.setenv(DISABLE, "safetensors")
    assert Lite(accelerator="cpu", devices=1).plan.choices["checkpoint"].name == "dcp"
    monkeypatch.setenv(DISABLE, "cpu")
    with pytest.raises(UnsupportedError, match=rf"finds no device.* accelerator 'cpu' .* disabled .* {VARIABLE}"):
        Lite()
    monkeypatch.delenv(DISABLE)
    result = plug("run", "--devices=2", "--disable-plugin=elastic,spawn", "--disable-plugin=fork", __file__)
    assert result.exit_code == 2
    assert re.search(r"No installed launcher .* 'fork' .* disabled by 'fork' in the command line", result.stderr)


# ---------------------------------------------------------------------- words that disable nothing


def test_a_word_that_disables_nothing_is_told(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed it is an error; in a variable or a file, which may be for many machines, a warning. With what was meant."""
    text = r"'dpd' is disabled in {}, and no plugin or package of that name is installed. Did you mean 'ddp'\?"
    for command in (("list-plugins",), ("env",), ("run", __file__), ("checkpoint", "inspect", "nothing")):
        result = plug(*command, "--disable-plugin=dpd")
        assert result.exit_code == 2, command
        assert re.search(text.format(r"the command line \(--disable-plugin\)"), result.stderr), command
    monkeypatch.setenv(DISABLE, "dpd")
    with pytest.warns(PlugframeWarning, match=text.format(VARIABLE)):
        Lite(accelerator="cpu", devices=1)
    result = plug("list-plugins")
    assert result.exit_code == 0
    assert re.search(text.format(VARIABLE), result.stderr)


def test_the_option_holds_for_its_command_alone(trap: Path) -> None:
    """Every command that reads what is installed takes it, and leaves this process as it was."""
    before = dict(os.environ)
    for _ in range(2):
        rows = json.loads(
            plug("list-plugins", "--json", "--disable-plugin", "csv", "--disable-plugin=ddp,single").stdout
        )
        off = {(row["kind"], row["name"]) for row in rows if row["status"].startswith("disabled by")}
        assert off == {("logger", "csv"), ("strategy", "ddp"), ("strategy", "single"), ("collective", "single")}
        assert dict(os.environ) == before
    assert plug("list-plugins", "--disable-plugin", "a b").exit_code == 2


# ---------------------------------------------------------------------- in ranks


def test_what_was_typed_is_handed_on(tmp_path: Path) -> None:
    """With what the variable holds already, and told apart from it."""
    variables = disabled_variables(("csv,ddp", "csv"), {DISABLE: "mine", FROM_COMMAND_LINE: "devices"})
    assert variables == {DISABLE: "mine,csv,ddp", FROM_COMMAND_LINE: "devices,disable=csv,disable=ddp"}
    read = read_policy(variables, tmp_path)
    assert [(each.word, each.by) for each in read.disabled] == [
        ("mine", "variable"),
        ("csv", "command"),
        ("ddp", "command"),
    ]
    assert disabled_variables((), {DISABLE: "mine"}) == {}
    assert gather({}, environ=variables, folder=tmp_path).notes == ()


def test_a_policy_travels_to_a_process_elsewhere(tmp_path: Path) -> None:
    """As variables it refuses the same, without the file; of two lists what both allow."""
    entries = [entry(name) for name in ("ddp", "one:acme", "one:other", "two:acme")]
    here = policy(tmp_path, "allow = ['one', 'two:acme']\ndisable = ['two']", ALLOW="one:acme,two", DISABLE="ddp")
    there = read_policy(policy_variables(here), tmp_path / "elsewhere")
    assert [bool(here.refusal(e)) for e in entries] == [bool(there.refusal(e)) for e in entries]
    assert policy_variables(here) == {DISABLE: "ddp,two", ALLOW: "plugframe,two:acme,one:acme"}
    assert policy_variables(Policy()) == {}


def test_ranks_are_held_to_what_was_typed(tmp_path: Path) -> None:
    """The script that `plugframe run` starts, in code of its own, cannot select what its command line disabled."""
    publish(tmp_path, "evil-two", "6.6", "extension", "evil", source=TRAP + EXTENSION)
    (tmp_path / "train.py").write_text(
        "from plugframe import Lite\ntry:\n    Lite(plugins='evil')\nexcept ValueError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-m", "plugframe", "run", "train.py", "--accelerator=cpu", "--devices=1"]
    environ = {**in_folder(tmp_path), "TRAP": str(tmp_path / "trap")}
    done = subprocess.run(
        [*command, "--disable-plugin=evil-two"], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = "extension 'evil' (evil-two 6.6) is disabled by 'evil-two' in the command line (--disable-plugin)"
    assert done.stdout.startswith(expected)
    assert not (tmp_path / "trap").exists()


def test_a_package_that_calls_itself_plugframe_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier on the path, it gets neither the built-ins' names nor their trust; one line says where it is."""
    before = {(entry.kind, entry.name): entry.value for entry in Registry.discover().entries() if entry.builtin}
    publish(tmp_path, "Plugframe", "9.9", "strategy", "ddp", "mine", source=STRATEGY)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry.discover()
    assert {(entry.kind, entry.name): entry.value for entry in registry.entries() if entry.builtin} == before
    assert not any(entry.name == "mine" for entry in registry.entries())
    (note,) = registry.notes()
    assert note == f"The distribution in {tmp_path} calls itself plugframe, and is not the one that runs: uninstall it."
