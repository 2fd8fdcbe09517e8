"""What was asked for, and where: code, command line, variable, file; the strongest wins, contradictions are errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from plugframe import SettingError
from plugframe.core.config.request import FIELDS, SWITCHES, Request, Setting, gather, variable


class Sharded:
    """Stands for a plugin object."""


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """Return a folder with no settings file in or above it."""
    return tmp_path


def ask(folder: Path, code: Mapping[str, Any] | None = None, /, **environ: str) -> Request:
    """Gather from `code` and variables, named without their prefix."""
    return gather(code or {}, environ={f"PLUGFRAME_{k}": v for k, v in environ.items()}, folder=folder)


# ---------------------------------------------------------------------- where a setting comes from


def test_nothing_asked_for_is_an_empty_request(empty: Path) -> None:
    """Defaults leave no trace: not "auto", not None, not an empty list."""
    request = ask(empty, {"strategy": "auto", "precision": None, "plugins": (), "loggers": []})
    assert request.settings == {}
    assert request.get("strategy") is None
    assert request.value("num_nodes", 1) == 1


@pytest.mark.parametrize(
    ("code", "environ", "file", "value", "source"),
    [
        ({"strategy": "a"}, {"STRATEGY": "b"}, 'strategy = "c"', "a", "the code"),
        (
            {},
            {"STRATEGY": "b", "FROM_COMMAND_LINE": "strategy"},
            'strategy = "c"',
            "b",
            "the command line (--strategy)",
        ),
        ({}, {"STRATEGY": "b"}, 'strategy = "c"', "b", "the environment variable PLUGFRAME_STRATEGY"),
        ({}, {}, 'strategy = "c"', "c", "plugframe.toml"),
        ({"strategy": "auto"}, {}, 'strategy = "c"', "c", "plugframe.toml"),
        ({"strategy": "a"}, {"STRATEGY": "auto"}, 'strategy = "c"', "a", "the code"),
    ],
)
def test_the_strongest_source_wins(
    empty: Path, code: dict[str, Any], environ: dict[str, str], file: str, value: str, source: str
) -> None:
    """Code over command line over file; a variable counts as the command line, under its own name."""
    (empty / "plugframe.toml").write_text(file)
    setting = ask(empty, code, **environ).get("strategy")
    assert setting is not None
    assert setting.value == value
    assert setting.source.endswith(source)


@pytest.mark.parametrize("field", ["strategy", "devices", "plugins"])
def test_auto_on_the_command_line_undoes_the_file(empty: Path, field: str) -> None:
    """Typed, "auto" is a choice (an empty list of plugins likewise), not the absence of one."""
    (empty / "plugframe.toml").write_text('strategy = "c"\ndevices = 2\nplugins = ["x"]\n')
    assert ask(empty).get(field) is not None
    request = ask(empty, **{field.upper(): "" if field == "plugins" else "auto"})
    assert request.get(field) is None


def test_what_the_command_line_says_beside_the_code_is_kept(empty: Path) -> None:
    """Whether two names contradict each other is known once they are resolved: until then both are there."""
    request = ask(empty, {"strategy": Sharded()}, STRATEGY="fsdp", FROM_COMMAND_LINE="strategy")
    assert request.overridden == {"strategy": Setting("fsdp", "the command line (--strategy)")}
    assert isinstance(request.value("strategy"), Sharded)


def test_variables_are_read_as_what_they_mean(empty: Path) -> None:
    """Numbers are numbers and lists are lists; devices stay as written, for the accelerator to read."""
    environ = {"NUM_NODES": "2", "TIMEOUT_S": "1.5", "PLUGINS": "a, b,", "DEVICES": "0,2"}
    request = ask(empty, **environ)
    assert {field: setting.value for field, setting in request.settings.items()} == {
        "num_nodes": 2,
        "timeout_s": 1.5,
        "plugins": ("a", "b"),
        "devices": "0,2",
    }


def test_every_field_has_its_variable(empty: Path) -> None:
    """What can be said in the code can be said in a variable."""
    values = {variable(field): "true" if field in SWITCHES else "2" for field in FIELDS} | {variable("mesh"): "a=2"}
    assert set(gather({}, environ=values, folder=empty).settings) == set(FIELDS)


def test_a_switch_is_true_or_false(empty: Path) -> None:
    """In every place where it can be given; anything else is refused."""
    for text, value in (("True", True), ("1", True), ("false", False), ("0", False)):
        request = gather({}, environ={"PLUGFRAME_DIAGNOSTICS": text}, folder=empty)
        assert request.value("diagnostics") is value
    with pytest.raises(SettingError, match="diagnostics='maybe' in the environment variable .*: it is true or false"):
        gather({}, environ={"PLUGFRAME_DIAGNOSTICS": "maybe"}, folder=empty)
    with pytest.raises(SettingError, match="diagnostics=2 in the code: it is true or false"):
        gather({"diagnostics": 2}, environ={}, folder=empty)
    with pytest.raises(SettingError, match="diagnostics=True in the code, but False"):
        gather({"diagnostics": True}, environ={"PLUGFRAME_DIAGNOSTICS": "0"}, folder=empty)


def test_the_process_is_the_default(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments, this process's variables and working folder count."""
    (empty / "plugframe.toml").write_text("devices = 3")
    monkeypatch.chdir(empty)
    monkeypatch.setitem(os.environ, "PLUGFRAME_STRATEGY", "ddp")
    request = gather({})
    assert (request.value("devices"), request.value("strategy")) == (3, "ddp")


# ---------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("code", "environ", "said"),
    [
        (
            {"devices": 2},
            {"DEVICES": "4", "FROM_COMMAND_LINE": "devices"},
            r"devices=2 in the code, but '4' in the command line \(--devices\): remove one of the two",
        ),
        ({"devices": [1]}, {"DEVICES": "1"}, r"devices=\[1\] in the code, but '1' in the environment variable"),
        ({"devices": "0,1"}, {"DEVICES": "0,2"}, "devices='0,1' in the code, but '0,2'"),
        ({"num_nodes": 2}, {"NUM_NODES": "3", "FROM_COMMAND_LINE": "num_nodes"}, r"--num-nodes"),
        ({"timeout_s": 5}, {"TIMEOUT_S": "6", "FROM_COMMAND_LINE": "timeout_s"}, r"\(--timeout\)"),
        (
            {"callbacks": (Sharded(),)},
            {"CALLBACKS": "mine:Callback"},
            r"callbacks=\[Sharded\] in the code, but \['mine:Callback'\] in the environment variable",
        ),
    ],
)
def test_a_contradiction_names_both(empty: Path, code: dict[str, Any], environ: dict[str, str], said: str) -> None:
    """The code never overrides the command line silently: both values and both places are named."""
    with pytest.raises(SettingError, match=said):
        ask(empty, code, **environ)


@pytest.mark.parametrize(
    ("code", "environ"),
    [
        ({"devices": 2}, {"DEVICES": "2"}),
        ({"devices": "2"}, {"DEVICES": " 2"}),
        ({"devices": [0, 2]}, {"DEVICES": "0, 2"}),
        ({"devices": [1]}, {"DEVICES": "1,"}),
        ({"devices": -1}, {"DEVICES": "-1"}),
        ({"num_nodes": 2}, {"NUM_NODES": "2"}),
        ({"timeout_s": 5}, {"TIMEOUT_S": "5.0"}),
        ({"callbacks": [Sharded()]}, {"CALLBACKS": f"{__name__}:Sharded"}),
    ],
)
def test_saying_the_same_twice_is_fine(empty: Path, code: dict[str, Any], environ: dict[str, str]) -> None:
    """Two spellings of one value are no contradiction."""
    assert ask(empty, code, **environ).value(next(iter(code))) == next(iter(code.values()))


# ---------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("devices", True, "devices=True in the code is not a value of devices. It is a count, a list of indices, or"),
        ("strategy", True, "strategy=True in the code .* It is the name of a plugin; `plugframe list-plugins`"),
        ("precision", 16.0, r"precision=16\.0 in the code .* name of a plugin"),
        ("num_nodes", 0, "num_nodes=0 in the code: it is an integer from 1"),
        ("num_nodes", 1.5, r"num_nodes=1\.5 in the code: it is an integer"),
        ("num_nodes", "2", "num_nodes='2' in the code: it is an integer"),
        ("num_nodes", False, "num_nodes=False in the code"),
        ("timeout_s", 0, "timeout_s=0 in the code: it is a number of seconds above 0"),
        ("report_after_s", -1, "report_after_s=-1 in the code: it is a number of seconds, 0 for never"),
        ("timeout_s", float("nan"), "timeout_s=nan"),
        ("timeout_s", float("inf"), "timeout_s=inf"),
        ("timeout_s", "soon", "timeout_s='soon'"),
    ],
)
def test_a_wrong_value_in_the_code(empty: Path, field: str, value: Any, said: str) -> None:
    """A value of a wrong type says what was given, where, and what is allowed."""
    with pytest.raises(SettingError, match=said):
        ask(empty, {field: value})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("NUM_NODES", "two", "num_nodes='two' in the environment variable PLUGFRAME_NUM_NODES is not a number"),
        ("NUM_NODES", "0", "num_nodes=0 in the environment variable PLUGFRAME_NUM_NODES: it is an integer from 1"),
        ("TIMEOUT_S", "soon", "timeout_s='soon' .* is not a number"),
        ("TIMEOUT_S", "-1", r"timeout_s=-1\.0 .* above 0"),
        ("TIMEOUT_S", "nan", "timeout_s=nan"),
    ],
)
def test_a_wrong_value_in_a_variable(empty: Path, name: str, text: str, said: str) -> None:
    """A variable is named in full."""
    with pytest.raises(SettingError, match=said):
        ask(empty, **{name: text})


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("stratgy = 'ddp'", r"plugframe.toml: 'stratgy' is not a setting. Did you mean 'strategy'\? Settings: accel"),
        ("devices = true", "devices=True in .*plugframe.toml is not a value of devices"),
        ("num_nodes = '2'", "num_nodes='2' in .*plugframe.toml: it is an integer"),
        ("plugins = 'profiler'", "plugins='profiler' in .*plugframe.toml: it is a list of names"),
        ("loggers = [1]", r"loggers=\[1\] in .*plugframe.toml: it is a list of names"),
        ("num-nodes = 2\nnum_nodes = 3", "'num_nodes' is given twice, with - and with _"),
        ("devices = ", "plugframe.toml is not valid TOML"),
    ],
)
def test_a_wrong_settings_file(empty: Path, file: str, said: str) -> None:
    """A file is named with the key that is wrong and the closest one there is."""
    (empty / "plugframe.toml").write_text(file)
    with pytest.raises(SettingError, match=said):
        ask(empty)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PLUGFRAME_STRATEGIE", " Did you mean 'PLUGFRAME_STRATEGY'?"),
        ("PLUGFRAME_strategy", " Did you mean 'PLUGFRAME_STRATEGY'?"),
        ("PLUGFRAME_TIMEOUT", " Did you mean 'PLUGFRAME_TIMEOUT_S'?"),
        ("PLUGFRAME_CONFG", " Did you mean 'PLUGFRAME_CONFIG'?"),
        ("PLUGFRAME_QQQQQQQQQQQQQQQQQQQQQQQQQQQQ", ""),
    ],
)
def test_a_misspelt_variable_is_noted(empty: Path, name: str, hint: str) -> None:
    """A variable that looks like a setting and is none leaves a note for rank 0 to warn of."""
    request = gather({}, environ={name: "ddp", "HOME": "/", "PLUGFRAME_TRACE": "1"}, folder=empty)
    assert request.notes == (f"The environment variable {name} is not a setting.{hint}",)
    assert not request.settings


# ---------------------------------------------------------------------- settings files


def test_the_file_is_found_upward_in_the_project(empty: Path) -> None:
    """The nearest file counts, up to the root of the project: its first pyproject.toml, or its repository."""
    inner = empty / "project" / "src"
    inner.mkdir(parents=True)
    (empty / "pyproject.toml").write_text('[tool.plugframe]\nstrategy = "outer"\nnum-nodes = 2\n')
    assert ask(inner).value("num_nodes") == 2
    (empty / "project" / "plugframe.toml").write_text('strategy = "inner"\n')
    request = ask(inner)
    assert (request.value("strategy"), request.get("num_nodes")) == ("inner", None)
    (empty / "project" / "plugframe.toml").unlink()
    for root in ("pyproject.toml", ".git", ".hg"):
        (empty / "project" / root).write_text("")
        assert ask(inner).settings == {}, root
        (empty / "project" / root).unlink()


def test_outside_of_a_project_no_folder_above_counts(empty: Path) -> None:
    """Without a root anywhere above, a settings file in a parent folder may be anybody's; the folder's own counts."""
    inner = empty / "scratch"
    inner.mkdir()
    (empty / "plugframe.toml").write_text('callbacks = ["os:abort"]\n')
    assert ask(inner).settings == {}
    assert ask(empty).value("callbacks") == ["os:abort"]


@pytest.mark.parametrize("place", ["plugframe.toml", "."])
@pytest.mark.parametrize(
    ("mode", "said"), [(0o002, "can be written by every user"), (0o020, "can be written by the group with gid 65534")]
)
def test_a_file_that_others_can_write_is_refused(empty: Path, place: str, mode: int, said: str) -> None:
    """It names code that runs in the job. Naming the file says that it is trusted."""
    file = empty / "plugframe.toml"
    file.write_text("devices = 2\n")
    if mode == 0o020:
        if os.getuid() != 0:
            pytest.skip("only root can give a file to another group")
        os.chown(empty / place, -1, 65534)
    (empty / place).chmod((empty / place).stat().st_mode | mode)
    with pytest.raises(SettingError, match=rf"{re.escape(str(file))} is not read, because .* {said}: .*--config="):
        ask(empty)
    assert ask(empty, CONFIG=str(file)).value("devices") == 2


def test_a_file_of_another_user_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the user and that of root are read, nobody else's."""
    (empty / "plugframe.toml").write_text("devices = 2\n")
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    if (empty / "plugframe.toml").stat().st_uid == 0:
        assert ask(empty).value("devices") == 2
        os.chown(empty / "plugframe.toml", 65534, -1)
    with pytest.raises(SettingError, match=r"belongs to another user \(uid \d+\)"):
        ask(empty)


def test_a_named_file_is_the_one(empty: Path) -> None:
    """PLUGFRAME_CONFIG replaces the search; a file that is not there, or says nothing to us, is an error."""
    (empty / "plugframe.toml").write_text('strategy = "found"\n')
    (empty / "mine.toml").write_text('strategy = "named"\n')
    assert ask(empty, CONFIG=str(empty / "mine.toml")).value("strategy") == "named"
    with pytest.raises(SettingError, match=r"The settings file '.*absent.toml' does not exist"):
        ask(empty, CONFIG=str(empty / "absent.toml"))
    (empty / "pyproject.toml").write_text("[tool.other]\n")
    with pytest.raises(SettingError, match=r"pyproject.toml' has no section \[tool.plugframe\]"):
        ask(empty, CONFIG=str(empty / "pyproject.toml"))


def test_a_section_that_is_none_is_refused(empty: Path) -> None:
    """``plugframe = …`` under ``[tool]`` would be ignored: it is an error."""
    (empty / "pyproject.toml").write_text("[tool]\nplugframe = 3\n")
    with pytest.raises(SettingError, match=r"write \[tool.plugframe\]"):
        ask(empty)


def test_a_file_that_cannot_be_read(empty: Path) -> None:
    """A file that is not text is named, not a traceback."""
    (empty / "plugframe.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match="plugframe.toml is not valid TOML"):
        ask(empty)
