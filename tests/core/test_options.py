"""Options of plugins: declared, given in four ways, checked before anything starts, and the same on every rank."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import warm
from paths import DOCS
from plugframe import Lite, Option, PlugframeWarning, Plugin, SettingError
from plugframe.base import Accelerator, Environment, Extension, Logger, Strategy
from plugframe.cli import cli
from plugframe.cli.plan_table import plan_rows
from plugframe.core.config.request import gather
from plugframe.core.planning.plan import Plan
from plugframe.core.planning.resolve import resolve
from plugframe.core.registry.registry import Entry, Registry
from plugframe.hooks import hookimpl
from plugframe.hooks.spelling import Given, from_variable, read, variable_of
from plugframe.hooks.variables import FROM_COMMAND_LINE, LAUNCHED
from plugframe.launch.choose import choose_launcher
from plugframe.testing.option_check import disagreements, parameters

HERE = __name__

# ---------------------------------------------------------------------- plugins with options


class Acme(Strategy):
    """A strategy that takes whatever it is given, and refuses one combination."""

    def __init__(self, *, units: Any = "auto", timeout_s: float | None = None, level: int = 1, **more: Any) -> None:
        if level == 2 and timeout_s is None:
            raise SettingError("level=2 of strategy 'acme' needs timeout_s.")
        self.units, self.timeout_s, self.level, self.more = units, timeout_s, level, more

    @hookimpl
    def strategy_describe(self) -> list[str]:
        return [f"level {self.level}"]


class Paper(Logger):
    """A logger with an option."""

    def __init__(self, *, folder: str = "paper", rows: int = 1) -> None:
        self.folder, self.rows = folder, rows


class Watch(Extension):
    """An extension with an option."""

    def __init__(self, *, every: int = 1) -> None:
        self.every = every


OPTIONS = (
    Option("units", list[str], "auto", "Blocks."),
    Option("timeout_s", float, None, "Seconds.", above=0),
    Option("level", int, 1, "How much.", minimum=1, maximum=3),
    Option("mode", str, "slow", "How.", ("slow", "fast")),
    Option("fused", bool, False, "Whether."),
    Option("mesh", dict[str, int], None, "Ranks of an axis.", minimum=1),
)
acme = Plugin(factory=f"{HERE}:Acme", options=OPTIONS)
acme_2 = Plugin(factory=f"{HERE}:Acme", options=OPTIONS, preset={"level": 2, "timeout_s": 5.0})
short = Plugin(alias_of="acme")
paper = Plugin(factory=f"{HERE}:Paper", options=(Option("folder", str, "paper"), Option("rows", int, 1, minimum=1)))
watch = Plugin(factory=f"{HERE}:Watch", options=(Option("every", int, 1),))


def _entry(kind: str, name: str, attribute: str) -> Entry:
    return Entry(kind, name, f"{HERE}:{attribute}", "acme-kit", "1.2")


ENTRIES = [
    _entry("strategy", "acme", "acme"),
    _entry("strategy", "acme-2", "acme_2"),
    _entry("strategy", "short", "short"),
    _entry("logger", "paper-trail", "paper"),
    _entry("extension", "watch", "watch"),
]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    """What is installed and the plugins above, for every way in, in a folder without settings."""
    found = Registry([*Registry.discover().entries(), *ENTRIES])
    monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, **_: found))
    monkeypatch.chdir(tmp_path)
    return found


def plan(registry: Registry, typed: Mapping[str, str] | None = None, /, *, file: str = "", **code: Any) -> Plan:
    """Resolve for one rank on the CPU: what is typed on a command line, written in a file and said in the code."""
    options = {f"--{name}": text for name, text in (typed or {}).items() if "." in name}
    fields = {name: text for name, text in (typed or {}).items() if "." not in name}
    environ = {variable_of(option): text for option, text in options.items()}
    environ |= {f"PLUGFRAME_{name.upper()}": text for name, text in fields.items() if name.islower()}
    environ |= {f"PLUGFRAME_{name}": text for name, text in fields.items() if name.isupper()}
    environ[FROM_COMMAND_LINE] = ",".join([*fields, *options])
    Path("plugframe.toml").write_text(file, encoding="utf-8")
    return resolve(gather({"accelerator": "cpu", "devices": 1, **code}, environ=environ), registry, environ)


def arguments(found: Plan, kind: str = "strategy") -> dict[str, Any]:
    """Return what the plugin of a kind will be called with."""
    return found.choices[kind].arguments


# ---------------------------------------------------------------------- declared


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda: Option("Timeout", float), "called like 'timeout_s'"),
        (lambda: Option("a__b", float), "single underscores"),
        (lambda: Option("timeout-s", float), "called like 'timeout_s'"),
        (lambda: Option("name", str), "not .name., which selects the plugin"),
        (lambda: Option("x", bytes), r"type is one of str, int, float and bool.*list\[str\]"),
        (lambda: Option("x", set[str]), "a list or dict of those"),
        (lambda: Option("x", dict[int, str]), "the keys of a dict are str"),
        (lambda: Plugin(factory="a:B", options={"stage": 2}), r"tuple of Option.*preset= for fixed arguments"),  # type: ignore[arg-type]
        (lambda: Plugin(alias_of="b", options=(Option("x", int),)), "has the options of the plugin it stands for"),
        (lambda: Plugin(factory="a:B", options=(Option("x", int), Option("x", str))), "'x' is declared twice"),
        (lambda: Plugin(factory="a:B", api="1"), "write the number of the contract"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_declaration_says_what_to_write(declare: Any, said: str) -> None:
    """An author's slip shows when the descriptor is loaded, with what to write."""
    with pytest.raises(ValueError, match=said):
        declare()


#: What only code can pass: objects, and mappings of several types.
IN_CODE_ONLY = {
    "ddp": {"powersgd", "process_group"},
    "expert": {"mp_policy"},
    "fsdp": {"mp_policy"},
    "tensor_parallel": {"mp_policy", "parallelize"},
    "16-mixed": {"scaler"},
    "bf16-mixed": {"scaler"},
}


def test_the_options_of_built_ins_are_what_their_constructors_take() -> None:
    """Name and default of every option are those of the constructor, and nothing a user could type is left out."""
    registry = Registry.discover()
    seen = 0
    for entry in registry.entries():
        descriptor = registry.describe(entry)
        if not entry.builtin or not descriptor.factory or registry.absent(entry):
            continue
        module, _, name = descriptor.factory.partition(":")
        factory = getattr(importlib.import_module(module), name)
        assert disagreements(descriptor, factory) == [], entry.origin
        declared = {option.name for option in descriptor.options}
        taken = set(parameters(factory)[0]) - set(descriptor.preset)
        assert taken - declared == IN_CODE_ONLY.get(entry.name, set()), entry.origin
        assert all(option.help for option in descriptor.options), entry.origin
        seen += len(declared)
    assert seen > 30


def test_disagreements_are_told() -> None:
    """Unknown keywords, other defaults, and required parameters without an option are reported."""

    def factory(needed: int, /, also: int, level: int = 2) -> None: ...

    descriptor = Plugin(
        factory="a:B", options=(Option("level", int, 1), Option("mode", str), Option("needed", int)), preset={"gone": 1}
    )
    assert disagreements(descriptor, factory) == [
        "the default of 'level' is declared as 1, and is 2",
        "the option 'mode' is not a keyword of the factory",
        "the factory does not take 'needed' by keyword",
        "preset= has 'gone', which is not a keyword of the factory",
        "the factory requires 'needed', which is not an option",
        "the factory requires 'also', which is not an option",
    ]
    assert disagreements(acme, Acme) == []  # it takes any keyword


# ---------------------------------------------------------------------- read

NAMED = {option.name: option for option in OPTIONS}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("timeout_s", "60", 60.0),
        ("timeout_s", "1e3", 1000.0),
        ("level", "3", 3),
        ("mode", "fast", "fast"),
        ("fused", "true", True),
        ("fused", "OFF", False),
        ("units", "Block, Head", ["Block", "Head"]),
        ("units", "auto", "auto"),
        ("mesh", "data=2,tensor=4", {"data": 2, "tensor": 4}),
    ],
)
def test_texts_are_read_as_the_declared_type(name: str, text: str, value: Any) -> None:
    """A string from the command line is converted to the declared type; the string of the default gives the default."""
    found = read(NAMED[name], Given("strategy", "", name, text, "the command line", "command"))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("timeout_s", "soon", r"strategy.timeout_s='soon' in the shell: it is a number above 0\. Type --strategy"),
        ("timeout_s", "0", "a number above 0"),
        ("timeout_s", "nan", "a number above 0"),
        ("level", "2.5", "an integer from 1 up to 3"),
        ("level", "4", "up to 3"),
        ("mode", "fats", r"one of slow, fast\. Did you mean 'fast'\? Type --strategy.mode=slow\|fast"),
        ("fused", "maybe", "true or false"),
        ("units", ",", "a list, each a string, or auto"),
        ("mesh", "data", "Type --strategy.mesh=NAME=N,NAME=N"),
        ("mesh", "data=2,data=3", "names with values"),
        ("mesh", "data=0", "each an integer from 1"),
    ],
)
def test_a_wrong_text_says_what_is_allowed(name: str, text: str, said: str) -> None:
    """What was asked, where, what is allowed, and what to type."""
    with pytest.raises(SettingError, match=said):
        read(NAMED[name], Given("strategy", "", name, text, "the shell", "command"))


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("timeout_s", 60, 60.0),
        ("timeout_s", "60", None),
        ("timeout_s", True, None),
        ("level", 2, 2),
        ("level", 2.0, None),
        ("fused", True, True),
        ("fused", 1, None),
        ("fused", "true", None),
        ("units", ["Block"], ["Block"]),
        ("units", "auto", "auto"),
        ("units", "Block", None),
        ("units", [1], None),
        ("mesh", {"data": 2}, {"data": 2}),
        ("mesh", {"data": "2"}, None),
        ("mesh", "data=2", None),
        ("mode", 3, None),
    ],
)
def test_a_file_has_types_of_its_own(name: str, value: Any, right: Any) -> None:
    """A quoted number in a file is a string: it is refused for an option that takes a number."""
    given = Given("strategy", "", name, value, "plugframe.toml", "file")
    if right is not None:
        assert read(NAMED[name], given) == right
        return
    with pytest.raises(SettingError, match=rf"strategy.{name}=.* in plugframe.toml: it is "):
        read(NAMED[name], given)


def test_limits_in_words() -> None:
    """As a listing and an error show them."""
    assert Option("x", float, maximum=1).allowed == "a number up to 1"
    assert Option("x", list[int], choices=(1, 2)).allowed == "a list, each one of 1, 2"
    assert Option("x", list[int]).form == "N,N"
    assert Option("x", bool).form == "true|false"


def test_a_constructor_validates_by_the_declaration() -> None:
    """What code passes is held to what the descriptor declares; the message is in the words of the code."""
    thing = Acme()
    acme.validate(thing, units=("Block",), timeout_s=60, level=3, mode="fast", fused=True, mesh={"data": 2})
    acme.validate(thing, units="auto", timeout_s=None, mesh=None)
    for values, said in (
        ({"level": 4}, r"Acme\(level=4\): it is an integer from 1 up to 3\."),
        ({"level": None}, r"Acme\(level=None\): it is an integer"),
        ({"fused": 1}, r"Acme\(fused=1\): it is true or false\."),
        ({"level": 1, "mode": "fats"}, r"Acme\(mode='fats'\): it is one of slow, fast\. Did you mean 'fast'\?"),
    ):
        with pytest.raises(SettingError, match=said):
            acme.validate(thing, **values)


# ---------------------------------------------------------------------- given


def test_variables_carry_options_by_a_name_of_their_own() -> None:
    """Kind, plugin where there can be several, and option, between double underscores."""
    assert variable_of("--strategy.timeout-s=60") == "PLUGFRAME_STRATEGY__TIMEOUT_S"
    assert variable_of("--logger.acme-kit:paper-trail.folder") == "PLUGFRAME_LOGGER__ACME_KIT_PAPER_TRAIL__FOLDER"
    for name in ("PLUGFRAME_STRATEGY", "PLUGFRAME_LOGGER__FOLDER", "PLUGFRAME_strategy__X", "PLUGFRAME_STRATEGY__"):
        assert from_variable(name, "x", {}) is None


def test_an_option_from_each_source(registry: Registry) -> None:
    """Command line, variable and file, the stronger one winning, and the plan saying where each is from."""
    file = 'strategy = {name = "acme", timeout-s = 9, level = 2, units = ["Block"]}'
    found = plan(registry, {"strategy.timeout-s": "60", "strategy.fused": "true"}, file=file)
    assert arguments(found) == {"timeout_s": 60.0, "level": 2, "units": ["Block"], "fused": True}
    rows = {what: (value, why) for what, value, why in plan_rows(found)}
    assert rows["strategy.timeout_s"] == ("60.0", "asked for in the command line (--strategy.timeout-s)")
    assert rows["strategy.level"][1].endswith("plugframe.toml")


def test_a_name_in_code_or_an_alias_gets_them_too(registry: Registry) -> None:
    """Options are for what is selected, however it is named and whoever does."""
    assert arguments(plan(registry, {"strategy.level": "3"}, strategy="short")) == {"level": 3}
    assert arguments(plan(registry, {"strategy": "acme-kit:acme", "strategy.level": "3"})) == {"level": 3}
    assert arguments(plan(registry, file='[strategy]\nname = "short"\nlevel = 3', strategy="acme")) == {"level": 3}


def test_loggers_and_extensions_are_told_apart_by_name(registry: Registry) -> None:
    """Their options carry the name, bare or qualified, as far as a variable can hold it."""
    typed = {"loggers": "paper-trail,csv", "logger.acme-kit:paper-trail.rows": "7", "logger.csv.folder": "out"}
    found = plan(registry, {**typed, "plugins": "watch", "extension.watch.every": "3"})
    assert [choice.arguments for choice in found.loggers] == [{"rows": 7}, {"folder": "out"}]
    assert found.extensions[0].arguments == {"every": 3}
    assert ("logger.acme-kit:paper-trail.rows", "7") in [row[:2] for row in plan_rows(found)]
    file = 'loggers = ["paper-trail"]\n[logger.paper-trail]\nfolder = "filed"'
    assert plan(registry, file=file).loggers[0].arguments == {"folder": "filed"}


@pytest.mark.parametrize(
    ("typed", "file", "code", "said"),
    [
        ({"strategy.timeout": "6"}, "", {"strategy": "acme"},
         r"strategy.timeout='6' in the command line \(--strategy.timeout\): strategy acme \(acme-kit 1.2\) has no such "
         r"option\. Did you mean '--strategy.timeout-s'\? Its options: units, timeout_s"),
        ({"strategy.level": "x"}, "", {"strategy": "acme"}, "an integer from 1 up to 3"),
        ({"strategy.level": "2"}, "", {}, r"strategy single .* no options at all\. Nobody asked for 'single'"),
        ({}, "[strategy]\nlevel = 2", {}, r"strategy single .*Nobody asked .*add name = 'NAME' to \[strategy\]"),
        ({}, '[strategy]\nname = "acme"\nlevle = 2', {}, r"levle=2 in .*toml.*Did you mean 'level'\?"),
        ({"strategy.level": "3"}, "", {"strategy": "acme-2"}, "'acme-2' stands for level=2. Leave the option out"),
        ({"logger.csv.folder": "x"}, "", {}, r"logger 'csv' is not in use\. In use: none; --loggers=csv adds it"),
        ({"logger.csx.folder": "x"}, "", {"loggers": "csv"}, r"'csx' is not in use\. Did you mean 'csv'\?"),
        ({"logger.csv.folders": "x"}, "", {"loggers": "csv"}, r"Did you mean '--logger.csv.folder'\?"),
        ({"strategy.level": "3"}, "", {"strategy": Acme()}, "strategy=Acme in the code is an object.*pass level="),
        ({"logger.paper-trail.rows": "3"}, "", {"loggers": Paper()}, "logger=Paper in the code is an object"),
        ({}, "logger = 3", {}, r"logger=3 is no section: loggers= selects"),
        ({}, "[logger]\ncsv = 3", {}, r"logger.csv=3 is no section"),
        ({}, "[strategy]\ntimeout-s = 3\ntimeout_s = 3", {}, "given twice, with - and with _"),
        ({}, "[strategy]\nname = ['acme']", {}, "strategy.name=.* is not the name of a plugin"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused(
    registry: Registry, typed: dict[str, str], file: str, code: dict[str, Any], said: str
) -> None:
    """While the plan is made, before any rank is: in one line with what was asked, what is allowed, what is closest."""
    with pytest.raises(SettingError, match=said) as caught:
        plan(registry, typed, file=file, **code)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "file", "code", "said"),
    [
        ({"STRATEGY__TIMEOUT": "3"}, "", {"strategy": "acme"}, "Did you mean 'PLUGFRAME_STRATEGY__TIMEOUT_S'"),
        ({"STRATGY__LEVEL": "3"}, "", {}, "STRATGY__LEVEL is not a setting. Did you mean 'PLUGFRAME_STRATEGY__LEVEL'"),
        ({"LOGGER__CSV__FOLDER": "x"}, "", {}, "logger 'csv' is not in use"),
        ({}, '[strategy]\nname = "acme"\nlevel = 2\nfused = true', {"strategy": "single"},
         r"strategy.level, strategy.fused in .*toml have no effect: strategy='single' was asked for in the code"),
        ({}, "[strategy]\nlevel = 2", {"strategy": Acme()}, "strategy.level in .* has no effect: strategy=Acme was"),
        ({}, "[logger.csv]\nfolder = 'x'", {}, "logger 'csv' is not in use"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_told(
    registry: Registry, typed: dict[str, str], file: str, code: dict[str, Any], said: str
) -> None:
    """A variable that names nothing, and what a stronger setting overrides in a file: one warning (law 10)."""
    with pytest.warns(PlugframeWarning, match=said):
        plan(registry, typed, file=file, **code)


def test_ranks_do_not_ask_how_they_were_started(registry: Registry) -> None:
    """What was set for the launcher, and for the place it was started at, is not for the ranks."""
    environ = {"PLUGFRAME_LAUNCHER__START_METHOD": "fork", "PLUGFRAME_ENVIRONMENT__X": "1", LAUNCHED: "1"}
    assert gather({}, environ=environ).options == ()
    del environ[LAUNCHED]
    request = gather({}, environ=environ)
    assert [each.name for each in request.options] == ["start_method", "x"]
    assert choose_launcher(request, registry, "script").arguments == {"start_method": "fork"}


class Site(Environment):
    """An environment that is found out, and can be told something."""

    def __init__(self, *, queue: str = "day") -> None:
        self.queue = queue

    @hookimpl
    def environment_detect(self) -> bool:
        return True

    @hookimpl
    def environment_launched(self) -> bool:
        return False


class Chip(Accelerator):
    """An accelerator that is the best there is, and can be told something."""

    device_type = "cpu"

    def __init__(self, *, slot: int = 0) -> None:
        self.slot = slot

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return True

    @hookimpl
    def accelerator_device_count(self) -> int:
        return 1

    @hookimpl
    def accelerator_device(self, index: int) -> torch.device:
        return torch.device("cpu")


site = Plugin(factory=f"{HERE}:Site", options=(Option("queue", str, "day"),), priority=99)
chip = Plugin(factory=f"{HERE}:Chip", options=(Option("slot", int, 0),), priority=999)


def test_what_is_found_out_on_the_machine_gets_its_options_too(registry: Registry) -> None:
    """An environment and an accelerator are asked before they are chosen, and made with their options after."""
    more = Registry([*registry.entries(), _entry("environment", "site", "site"), _entry("accelerator", "chip", "chip")])
    typed = {"environment.queue": "night", "accelerator.slot": "3"}
    for code in ({"accelerator": "auto"}, {"accelerator": "chip", "environment": "site"}):
        found = plan(more, typed, **code)
        assert found.choices["environment"].instance.queue == "night"
        assert found.choices["accelerator"].instance.slot == 3
        assert found.choices["accelerator"].descriptor is chip
    assert plan(more, accelerator="auto").choices["accelerator"].instance.slot == 0


def test_an_option_reaches_the_object(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin that a `Lite` makes has it, and an object in the code contradicts it."""
    monkeypatch.setenv("PLUGFRAME_STRATEGY__LEVEL", "3")
    with Lite(accelerator="cpu", devices=1, strategy="acme") as lite:
        assert lite.strategy.level == 3
    with pytest.raises(SettingError, match=r"strategy.level='3' in the environment variable .* but strategy=Acme"):
        Lite(accelerator="cpu", devices=1, strategy=Acme(level=3))


# ---------------------------------------------------------------------- on the command line


def plug(*words: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, output and messages."""
    result = CliRunner().invoke(cli, list(words), prog_name="plugframe")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def run(*words: str) -> tuple[int, str, str]:
    """Dry-run a script on two ranks of the CPU."""
    Path("train.py").write_text("", encoding="utf-8")
    return plug("run", "train.py", "--accelerator=cpu", "--devices=2", "--dry-run", *words)


def test_a_dry_run_shows_the_options_and_what_is_handed_over(registry: Registry) -> None:
    """Each with its source; a switch is on without a value; the strategy describes itself with them."""
    typed = "--strategy=acme --strategy.timeout-s=60 --strategy.fused --strategy.level=3 --launcher.start-method=fork"
    code, out, err = run(*typed.split())
    assert (code, err) == (0, "")
    for words in (
        "strategy.timeout_s     60.0 ",
        "strategy.fused         True ",
        "asked for in the command line (--strategy.timeout-s)",
        "launcher.start_method  fork ",
        "hands over: PLUGFRAME_STRATEGY__TIMEOUT_S=60",
        "hands over: PLUGFRAME_STRATEGY__FUSED=true",
        "strategy: level 3",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--strategy.level=9",
            r"it is an integer.*Type --strategy.level=N\. If --strategy.level is",
        ),
        ("--strategy.level", "strategy.level='true' in .* Type --strategy.level=N"),
        ("--strategy.level=2", "level=2 of strategy 'acme' needs timeout_s"),
        ("--strategy.level=", "--strategy.level needs a value after the '='"),
        ("--strategy.level=1 --strategy.level=3", "--strategy.level is given twice"),
        ("--strategy.acme.level=2", "level=2 of strategy 'acme' needs timeout_s"),
        ("--strategy.acne.level=2", "strategy 'acne' is not in use. Did you mean 'acme'.* In use: acme"),
        ("--launcher.acme.level=2", "'--launcher.acme.level' is not an option.*--launcher.OPTION=VALUE"),
        ("--logger.folder=x", "'--logger.folder' is not an option.*--logger.NAME.OPTION=VALUE"),
        ("--launcher.start-method=frok", "launcher.start_method='frok' .*Did you mean 'fork'"),
    ],
)
def test_a_wrong_option_is_one_line_and_starts_nothing(registry: Registry, words: str, said: str) -> None:
    """Also what only the plugin itself can refuse is told by the command, once."""
    code, out, err = run("--strategy=acme", *words.split())
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(said, err), err


def test_a_value_may_follow_a_blank(registry: Registry) -> None:
    """Before the script and after it; a switch takes none."""
    words = "--strategy=acme --strategy.timeout-s 60 --strategy.fused --strategy.level 3"
    code, out, err = run(*words.split())
    assert (code, err) == (0, "")
    assert "hands over: PLUGFRAME_STRATEGY__TIMEOUT_S=60" in out
    assert "hands over: PLUGFRAME_STRATEGY__FUSED=true" in out
    assert "hands over: PLUGFRAME_STRATEGY__LEVEL=3" in out
    before = "--strategy=acme --strategy.timeout-s 60 --strategy.fused train.py --accelerator=cpu --devices=2 --dry-run"
    assert "hands over: PLUGFRAME_STRATEGY__TIMEOUT_S=60" in plug("run", *before.split())[1]


def test_words_that_miss(registry: Registry) -> None:
    """A value of a switch after a blank, a misspelt kind before the script, and an option kept for the script."""
    Path("train.py").write_text("", encoding="utf-8")
    assert (
        "'3' does not exist. For the value of the option before it, type --strategy.fused=3."
        in plug("run", "--strategy.fused", "3", "train.py")[2]
    )
    assert "Did you mean '--strategy.level'?" in plug("run", "--stratgy.level=3", "train.py")[2]
    assert "train.py --strategy.level=3" in run("--", "--strategy.level=3")[1]


@pytest.mark.ranks
def test_a_listing_of_one_plugin_shows_its_options(registry: Registry) -> None:
    """As they are typed, with default, values and help; of an alias those of what it stands for."""
    code, out, err = plug("list-plugins", "--kind", "strategy", "acme")
    assert (code, err) == (0, "")
    rows = [line.split("  ") for line in out.splitlines()]
    assert rows[0] == ["strategy acme (acme-kit 1.2): "]
    assert "--strategy.timeout-s" in out
    assert "an integer from 1 up to 3" in out
    assert "[tool.plugframe.strategy]" in out
    assert "stands for acme" in plug("list-plugins", "short")[1]
    fixed = plug("list-plugins", "acme-2")[1]
    assert "stands for level=2, timeout_s=5.0" in fixed
    assert "--strategy.level" not in fixed
    assert "--logger.paper-trail.rows" in plug("list-plugins", "paper-trail")[1]
    assert "It has no options." in plug("list-plugins", "32-true")[1]
    assert '"typed": "--strategy.timeout-s"' in plug("list-plugins", "acme", "--json")[1]
    assert "Did you mean 'acme'?" in plug("list-plugins", "acmee")[2]
    assert "strategy='acmee' is not installed" in plug("list-plugins", "--kind=strategy", "acmee")[2]
    assert len(plug("list-plugins", "--check", "acme")[1].splitlines()) == 2


def test_options_of_a_launcher_that_nobody_needs(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processes exist already, what was typed for the launcher is said to have no effect (law 10)."""
    there = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, text in there.items():
        monkeypatch.setenv(name, text)
    Path("train.py").write_text("", encoding="utf-8")
    err = plug("run", "train.py", "--accelerator=cpu", "--dry-run", "--launcher.start-method=fork")[2]
    assert "--launcher.start-method has no effect: torchelastic has started the processes already" in err


SCRIPT = """
from plugframe import Lite

lite = Lite()
lite.launch()
print(f"rank {lite.global_rank}: {lite.strategy.timeout_s} {lite.loggers[0].folder}")
lite.teardown()
"""


def test_every_rank_gets_the_same_options(tmp_path: Path) -> None:
    """From the command line to the constructors, on two ranks."""
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    typed = "--accelerator=cpu --devices=2 --strategy=ddp --strategy.timeout-s=61 --loggers=csv --logger.csv.folder=o"
    command = [sys.executable, "-m", "plugframe", "run", "train.py", *typed.split()]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = warm.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0: 61.0 o", "rank 1: 61.0 o"]


# ---------------------------------------------------------------------- as it is documented

PAGE = (DOCS / "options.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    """Return the block of the page below a mark."""
    found = re.search(rf"^<!-- {mark} -->\n```\w*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert found, f"docs/options.md has no block {mark!r}"
    return found.group(1)


def test_the_page_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The listing and the messages are those of the commands above them."""
    monkeypatch.chdir(tmp_path)
    assert block("list") == plug("list-plugins", "--kind", "logger", "csv")[1]
    Path("train.py").write_text("", encoding="utf-8")
    for told in block("errors").split("\n\n"):
        command, message = told.strip().split("\n", maxsplit=1)
        assert plug(*command.removeprefix("$ plugframe ").split())[2] == f"{' '.join(message.split())}\n"


def test_the_file_and_the_descriptor_of_the_page_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is written there can be copied."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(block("file"), encoding="utf-8")
    request = gather({}, environ={})
    assert (request.value("strategy"), request.value("loggers")) == ("ddp", ["csv"])
    assert {each.key: each.value for each in request.options} == {
        "strategy.timeout_s": 60,
        "logger.csv.folder": "runs/today",
    }
    names: dict[str, Any] = {}
    exec(block("declare"), names)
    assert [option.name for option in names["plugin"].options] == ["every", "timeout_s", "mode", "layers", "mesh"]
