"""The command line: which words are whose, what is said, and what is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
import pytest
from click.testing import CliRunner

import plugframe
from plugframe import Plugin, hookimpl
from plugframe.base import Accelerator
from plugframe.cli import cli
from plugframe.cli.arguments import split
from plugframe.cli.run import command as run_command
from plugframe.cli.table import plain
from plugframe.core.config.request import FIELDS
from plugframe.core.registry.registry import Entry, Registry
from plugframe.errors import RankFailedError
from plugframe.hooks.launcher import Job
from plugframe.hooks.world import World

# ---------------------------------------------------------------------- a small world of plugins


class FakeAccelerator(Accelerator):
    """Three devices of type cpu."""

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return True

    @hookimpl
    def accelerator_device_count(self) -> int:
        return 3

    @hookimpl
    def accelerator_parse_devices(self, devices: Any) -> tuple[int, ...]:
        return tuple(range(3 if devices in ("auto", "-1") else int(devices)))

    @hookimpl
    def accelerator_device(self, index: int) -> Any:
        return SimpleNamespace(type="cpu")

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return "gloo"


class FailingAccelerator(FakeAccelerator):
    """One that cannot say whether it is there."""

    def accelerator_is_available(self) -> bool:
        raise RuntimeError("driver too old")


class FakeEnvironment:
    """A shell, or the starter of two processes if FAKE_WORLD is set."""

    def environment_detect(self) -> bool:
        return True

    def environment_launched(self) -> bool:
        return "FAKE_WORLD" in os.environ

    def environment_world(self) -> World:
        return World(world_size=2, local_world_size=2)

    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        """Nothing to compare."""


class FakeStrategy:
    """Says one line in a dry run."""

    def strategy_describe(self) -> list[str]:
        return ["config: {}"]


def make_launcher() -> Any:
    """Replaced by a fixture."""
    raise NotImplementedError


def _factory(name: str) -> str:
    return f"{__name__}:{name}"


accelerator = Plugin(
    factory=_factory("FakeAccelerator"), summary="Fake devices.", devices=("cpu",), priority=1, tags=("fast",)
)
failing = Plugin(factory=_factory("FailingAccelerator"), devices=("cpu",), priority=9)
best = Plugin(best_of="fast", summary="The best.")
plain_strategy = Plugin(factory=_factory("FakeStrategy"), ranks="one", priority=1)
many = Plugin(factory=_factory("FakeStrategy"), priority=0)
alias = Plugin(alias_of="many", implies={"launcher": "functions"})
dangling = Plugin(alias_of="gone")
anything = Plugin(factory=_factory("Any"), priority=0)
environment = Plugin(factory=_factory("FakeEnvironment"), priority=0)
launcher = Plugin(factory=_factory("make_launcher"), priority=0, provides=("script", "function"))
functions = Plugin(factory=_factory("make_launcher"), provides=("function",))
needy = Plugin(factory=_factory("Any"), requires=("module_that_is_not_there",), extra="acme-ddp[fast]")
newer = Plugin(factory=_factory("Any"), api=99)
not_a_plugin = "text"


def _entry(kind: str, name: str, attribute: str, distribution: str = "plugframe", **more: Any) -> Entry:
    version = "0.1.0" if distribution == "plugframe" else "1.2"
    value = f"{__name__}:{attribute}"
    return Entry(kind=kind, name=name, value=value, distribution=distribution, version=version, **more)


BUILT_IN = [
    _entry("accelerator", "fake", "accelerator"),
    _entry("accelerator", "best", "best"),
    _entry("strategy", "one", "plain_strategy"),
    _entry("strategy", "many", "many"),
    _entry("strategy", "many_spawn", "alias"),
    _entry("precision", "32-true", "anything"),
    _entry("collective", "wire", "anything"),
    _entry("checkpoint", "file", "anything"),
    _entry("environment", "shell", "environment"),
    _entry("launcher", "starter", "launcher"),
    _entry("launcher", "functions", "functions"),
    _entry("logger", "paper", "anything"),
    _entry("extension", "guard", "anything"),
]


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class Ground(NamedTuple):
    """What a test of ``run`` sees: the folder, what was launched, and what this process became."""

    folder: Path
    jobs: list[Job]
    replaced: list[tuple[list[str], dict[str, str]]]


def plug(*words: str) -> Result:
    """Run the command line in this process."""
    result = CliRunner().invoke(cli, list(words), prog_name="plugframe")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    """Make the built-ins above and `entries` what is installed."""
    monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, **_: cls([*BUILT_IN, *entries])))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ground:
    """A folder with train.py, the plugins above, a launcher that records, and a process that cannot be replaced."""
    for name in [n for n in os.environ if n.startswith(("PLUGFRAME_", "MASTER_", "NODE_RANK", "FAKE_WORLD"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    install(monkeypatch)
    found = Ground(tmp_path, [], [])

    def replace(file: str, args: list[str], env: dict[str, str]) -> None:
        assert file == args[0] == sys.executable
        found.replaced.append((args[1:], env))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvpe", replace)
    recorder = SimpleNamespace(launcher_launch=lambda job: found.jobs.append(job))
    monkeypatch.setattr(sys.modules[__name__], "make_launcher", lambda: recorder)
    return found


def _only_line(result: Result) -> str:
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert result.out == ""
    return lines[0]


# ---------------------------------------------------------------------- whose word is it

OPTIONS = {name: p for p in run_command.params if isinstance(p, click.Option) for name in p.opts}


@pytest.mark.parametrize(
    ("line", "own", "command"),
    [
        ("train.py", "", "train.py"),
        ("model train.py --strategy=ddp --devices=8", "--strategy=ddp --devices=8", "train.py"),
        ("--devices 8 train.py --epochs 3", "--devices=8", "train.py --epochs 3"),
        ("--num_nodes=2 train.py --node_rank 1", "--num-nodes=2 --node-rank=1", "train.py"),
        ("train.py a --devices 2 b --dry-run c", "--devices=2 --dry-run", "train.py a b c"),
        ("train.py --lr=1 -- --devices=4 -x", "", "train.py --lr=1 --devices=4 -x"),
        ("train.py -- --", "", "train.py --"),
        ("train.py -m 3 -d 2 -h --help --version", "", "train.py -m 3 -d 2 -h --help --version"),
        ("-m pkg.train --lr 1 --devices=2", "--devices=2", "-m pkg.train --lr 1"),
        ("model --devices=2 -mpkg.train", "--devices=2", "-m pkg.train"),
        ("--devices -1 train.py", "--devices=-1", "train.py"),
        ("-v train.py -v --verbose", "--verbose", "train.py -v --verbose"),
        ("-- -odd.py --devices=2", "--devices=2", "-odd.py"),
        ("--plugin a train.py --plugins b,c", "--plugin=a --plugins=b,c", "train.py"),
        ("--devices 2 train.py --devices=2", "--devices=2", "train.py"),
        ("model", "", "model"),
        ("train.py model --model=x", "", "train.py model --model=x"),
    ],
)
def test_words_before_and_after_the_script(line: str, own: str, command: str) -> None:
    """Known long options are plugframe's wherever they stand before a bare --; the rest is the script's, in order."""
    words = split(line.split(), OPTIONS)
    assert " ".join(words.own) == own
    assert " ".join(words.command) == command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--stategy=ddp train.py", r"has no option '--stategy'\. Did you mean '--strategy'\?"),
        ("-x train.py", "has no option '-x'"),
        ("", "SCRIPT is missing: type 'plugframe run train.py'"),
        ("--devices=2", "SCRIPT is missing"),
        ("--devices", "--devices needs a value: type --devices=N|LIST"),
        ("train.py --strategy --devices=2", "--strategy needs a value"),
        ("-m", "-m needs the name of a module"),
        ("--devices=2 train.py --devices=4", "--devices is given twice, as --devices=2 and as --devices=4"),
        ("--dry-run=yes train.py", "--dry-run takes no value"),
    ],
)
def test_wrong_words(world: Ground, line: str, message: str) -> None:
    """A wrong word before the script, or an option without its value, is one line and exit code 2."""
    with pytest.raises(click.UsageError, match=message):
        split(line.split(), OPTIONS)
    result = plug("run", *line.split())
    assert result.code == 2
    assert _only_line(result).startswith("plugframe: ")


def test_every_setting_has_an_option() -> None:
    """What the constructor takes, the command line takes."""
    assert set(FIELDS) <= {p.name for p in run_command.params}


# ---------------------------------------------------------------------- what is said of wrong values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--strategy=mny"],
            "strategy='mny' is not installed. Did you mean 'many'? Installed: many, many_spawn, one.",
        ),
        (["--accelerator=fakee"], "Did you mean 'fake'?"),
        (["--num-nodes=x"], "num_nodes='x' in the command line (--num-nodes) is not a number."),
        (["--timeout=0"], "timeout_s=0.0 in the command line (--timeout)"),
        (["--node-rank=x"], "'x' is not a valid integer"),
        (["--callbacks=module"], "type package.module:Class"),
        (["--strategy=one", "--devices=2"], "strategy='one' works with one rank"),
        (["--strategy=many_spawn", "--devices=2"], "launcher='functions' cannot start a script again"),
        (["--node-rank=1"], "there is one node: add --num-nodes"),
        (["--num-nodes=2"], "add --main-address=HOST"),
        (["--num-nodes=2", "--main-address=a"], "add --node-rank=0 on a, --node-rank=1 on the other"),
        (
            ["--num-nodes=3", "--main-address=a", "--node-rank=3"],
            "node_rank=3, but num_nodes=3: must be 0 to 2",
        ),
        (["--num-nodes=4:2"], "--num-nodes=4:2 is neither a number nor MIN:MAX, such as 2:4."),
        (["--num-nodes=2:"], "--num-nodes=2: is neither a number nor MIN:MAX"),
        (["--num-nodes=2:4"], "add --rdzv-endpoint=HOST:PORT"),
        (["--num-nodes=2:4", "--rdzv-endpoint=a:x"], "--rdzv-endpoint='a:x' is not HOST:PORT"),
        (["--num-nodes=2:4", "--rdzv-endpoint=a", "--node-rank=1"], "--node-rank is for a fixed number of nodes"),
        (["--num-nodes=2", "--rdzv-endpoint=a:1"], "use --num-nodes=2:2, or give --node-rank and --main-address"),
        (["--num-nodes=2:4", "--rdzv-endpoint=a", "--rdzv-timeout=0"], "--rdzv-timeout=0: must be a number of seconds"),
        (["--grace-period=-1"], "--grace-period=-1: must be a number of seconds from 0"),
        (["--config=nowhere.toml"], "does not exist"),
        (["--plugins=guard,guard"], "extension 'guard' is given twice"),
    ],
)
def test_a_wrong_value_is_one_line(world: Ground, words: list[str], message: str) -> None:
    """Whatever is wrong with a value is said in one line, with exit code 2, and nothing is started."""
    result = plug("run", *words, "train.py")
    assert result.code == 2
    assert message in _only_line(result)
    assert not world.jobs
    assert not world.replaced


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("trian.py", "The script 'trian.py' does not exist. Did you mean 'train.py'?"),
        ("sub/train.py", "there is no folder 'sub'"),
        (".", "is a folder without a __main__.py"),
    ],
)
def test_a_missing_script(world: Ground, script: str, message: str) -> None:
    """A script that is not there is named with the closest file in its folder."""
    result = plug("run", script)
    assert result.code == 2
    assert message in _only_line(result)


def test_a_missing_module(world: Ground) -> None:
    """A module that is not there is named with the closest one here."""
    result = plug("run", "-m", "trainn.part")
    assert result.code == 2
    assert "There is no module 'trainn' here or among the installed ones. Did you mean 'train'?" in _only_line(result)


@pytest.mark.parametrize("option", ["--checkpoint=best.pt", "--config=model.yaml"])
def test_an_option_the_script_wanted(world: Ground, option: str) -> None:
    """An option after the script that plugframe took and cannot use says how to hand it to the script."""
    result = plug("run", "train.py", option)
    name = option.partition("=")[0]
    assert result.code == 2
    assert f"If {name} is meant for the script, write it after a bare --." in _only_line(result)
    assert plug("run", "train.py", "--devices=1", "--", option).code == 0
    assert world.replaced[0][0] == ["-u", "train.py", option]


def test_a_broken_plugin_is_one_line_and_exit_code_1(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that does not import is its author's fault: exit code 1, the package named."""
    install(monkeypatch, _entry("strategy", "acme", "no_such_attribute", "acme-ddp"))
    result = plug("run", "--strategy=acme", "train.py")
    assert result.code == 1
    assert "strategy 'acme' (acme-ddp 1.2) is broken" in _only_line(result)


# ---------------------------------------------------------------------- what is started


def test_one_rank_replaces_this_process(world: Ground) -> None:
    """One rank needs no supervisor: this process becomes the script, with what was typed in its environment."""
    assert plug("run", "--devices=1", "--timeout", "30", "train.py", "--epochs", "3").code == 0
    ((args, environ),) = world.replaced
    assert args == ["-u", "train.py", "--epochs", "3"]
    handed = {k: v for k, v in environ.items() if k.startswith("PLUGFRAME_")}
    assert handed == {
        "PLUGFRAME_DEVICES": "1",
        "PLUGFRAME_TIMEOUT_S": "30",
        "PLUGFRAME_FROM_COMMAND_LINE": "devices,timeout_s",
    }
    assert not world.jobs


def test_several_ranks_go_to_the_launcher(world: Ground) -> None:
    """More than one rank is a job for the launcher, with the settings typed and no resolved ones."""
    words = [
        "--devices",
        "2",
        "--plugins",
        "guard",
        "--logger=paper",
        "--loggers=paper",
        "--callback=json.decoder:C,csv:E",
    ]
    assert plug("run", "model", "train.py", *words[:-2], "x", words[-1]).code == 0
    (job,) = world.jobs
    environ = dict(job.environ)
    assert set(environ.pop("PLUGFRAME_FROM_COMMAND_LINE").split(",")) == {
        "devices",
        "plugins",
        "loggers",
        "callbacks",
    }
    assert environ == {
        "PLUGFRAME_DEVICES": "2",
        "PLUGFRAME_PLUGINS": "guard",
        "PLUGFRAME_LOGGERS": "paper",
        "PLUGFRAME_CALLBACKS": "json.decoder:C,csv:E",
    }
    assert job == Job(num_processes=2, command=("train.py", "x"), environ=job.environ)
    assert not world.replaced


def test_a_module_and_restarts(world: Ground) -> None:
    """-m reaches the launcher as Python takes it; restarts need a launcher also for one rank."""
    assert plug("run", "--devices=1", "--max_restarts=2", "-m", "train", "--lr=1").code == 0
    (job,) = world.jobs
    assert (job.command, job.max_restarts, job.num_processes) == (("-m", "train", "--lr=1"), 2, 1)


def test_several_nodes(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node rank, address and port reach the launcher, from options or from the usual variables."""
    words = ("run", "--num-nodes=2", "--devices=1", "train.py")
    assert plug(*words, "--node-rank=1", "--main-address=10.0.0.1").code == 0
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.2")
    monkeypatch.setenv("MASTER_PORT", "4000")
    monkeypatch.setenv("NODE_RANK", "0")
    assert plug(*words).code == 0
    found = [(job.num_nodes, job.node_rank, job.main_address, job.main_port) for job in world.jobs]
    assert found == [(2, 1, "10.0.0.1", 29500), (2, 0, "10.0.0.2", 4000)]


def test_a_launcher_that_starts_every_node_needs_no_address(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told how many there are, and where they meet only if that was typed."""
    everywhere = Plugin(factory=_factory("make_launcher"), priority=0, provides=("script", "nodes"))
    monkeypatch.setattr(sys.modules[__name__], "launcher", everywhere)
    words = ("run", "--num-nodes=2", "--devices=1", "train.py")
    assert plug(*words).code == 0
    assert plug(*words, "--main-address=10.0.0.1", "--main-port=4000").code == 0
    found = [(job.num_nodes, job.node_rank, job.main_address, job.main_port) for job in world.jobs]
    assert found == [(2, 0, None, None), (2, 0, "10.0.0.1", 4000)]


def test_nodes_that_come_and_go(world: Ground) -> None:
    """The launcher is told how many at least and at most, and where they meet; the ranks are not told a number."""
    words = ("run", "--num-nodes=2:4", "--devices=1", "train.py", "--grace-period=60", "--rdzv-timeout=9")
    assert plug(*words, "--rdzv-endpoint=10.0.0.1:4000").code == 0
    (job,) = world.jobs
    assert (job.min_nodes, job.num_nodes, job.main_address, job.main_port) == (2, 4, "10.0.0.1", 4000)
    assert (job.grace_s, job.timeout_s) == (60.0, 9.0)
    assert job.environ["PLUGFRAME_NUM_NODES"] == "auto"
    result = plug(*words, "--rdzv-endpoint=10.0.0.1", "--dry-run")
    assert "on 2 to 4 nodes, rendezvous at 10.0.0.1:29500" in result.out


def test_inside_another_launcher(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processes exist already, the script takes this one's place, whatever their number."""
    monkeypatch.setenv("FAKE_WORLD", "1")
    result = plug("run", "--strategy=many", "train.py", "--max-restarts=3")
    assert result.code == 0
    assert _only_line(result) == (
        "plugframe: warning: --max-restarts has no effect: shell has started the processes already."
    )
    assert world.replaced[0][0] == ["-u", "train.py"]


def test_the_environment_is_not_forced_on_the_ranks(world: Ground) -> None:
    """--environment says who started this process; the ranks are started by the launcher."""
    assert plug("run", "--environment=shell", "--devices=2", "train.py").code == 0
    assert world.jobs[0].environ["PLUGFRAME_ENVIRONMENT"] == "auto"


def test_a_setting_by_variable_is_checked_and_left_alone(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PLUGFRAME_ variable counts as typed, and a message names the variable."""
    monkeypatch.setenv("PLUGFRAME_DEVICES", "2")
    assert plug("run", "train.py").code == 0
    assert world.jobs[0].num_processes == 2
    assert world.jobs[0].environ == {"PLUGFRAME_FROM_COMMAND_LINE": ""}
    monkeypatch.setenv("PLUGFRAME_TIMEOUT_S", "soon")
    assert "in the environment variable PLUGFRAME_TIMEOUT_S is not a number" in _only_line(plug("run", "train.py"))


def test_a_settings_file(world: Ground) -> None:
    """--config reaches this process and, as a full path, the ranks."""
    (world.folder / "mine.toml").write_text('devices = 2\nstrategy = "many"\n')
    assert plug("run", "train.py", "--config", "mine.toml").code == 0
    (job,) = world.jobs
    assert job.num_processes == 2
    assert job.environ["PLUGFRAME_CONFIG"] == str((world.folder / "mine.toml").resolve())


def test_options_without_effect_are_said(world: Ground) -> None:
    """An address with one node, and a misspelt variable, are one warning line each."""
    result = plug("run", "--main-port=4000", "--devices=1", "train.py")
    assert "warning: --main-port has no effect: one node needs no address" in _only_line(result)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--precison=16"], "--precision"),
        (["--device", "3"], "--devices"),
        (["--guard"], "--guard before SCRIPT"),
        (["--guards=1"], "--guard before SCRIPT"),
        (["--learning-rate=3", "--seed=1", "-x"], ""),
        (["--", "--precison=16"], ""),
    ],
)
def test_a_word_of_the_script_that_looks_like_an_option_is_said(world: Ground, words: list[str], meant: str) -> None:
    """It goes to the script all the same: that may be what it is."""
    result = plug("run", "--devices=1", "train.py", *words)
    [(command, _)] = world.replaced
    assert command[command.index("train.py") + 1 :] == [word for word in words if word != "--"]
    wanted = f"plugframe: warning: {words[0].partition('=')[0]} goes to the script. "
    wanted += f"For plugframe's type {meant}; else write it after a bare --."
    assert result.err.splitlines() == ([wanted] if meant else [])


def test_a_misspelt_variable_is_said(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PLUGFRAME_ variable that is no setting is one line on stderr, without a source line."""
    monkeypatch.setenv("PLUGFRAME_STRATEGIE", "many")
    line = _only_line(plug("run", "--devices=1", "train.py"))
    assert line.startswith("plugframe: warning: The environment variable PLUGFRAME_STRATEGIE is not a setting.")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            RankFailedError("rank 1 on host: boom\n  at line 3", exit_code=139),
            139,
            "rank 1 on host: boom\n  at line 3",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failed_or_interrupted_job(
    world: Ground, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    """A failed rank's report is printed as it is and its exit code is ours; Ctrl-C is 130."""

    def fail(job: Job) -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "make_launcher", lambda: SimpleNamespace(launcher_launch=fail))
    result = plug("run", "--devices=2", "train.py")
    assert (result.code, result.err.strip()) == (code, said)


def test_a_dry_run_shows_the_settings_file_and_its_callbacks(world: Ground) -> None:
    """Code that a file names is seen before it runs, with the file."""
    Path("plugframe.toml").write_text('callbacks = ["json:JSONDecoder"]\n', encoding="utf-8")
    out = plug("run", "--dry-run", "--devices=2", "train.py").out
    file = Path("plugframe.toml").resolve()
    rows = [line.split() for line in out.splitlines()]
    assert ["callback", "json:JSONDecoder", "asked", "for", "in", str(file)] in rows
    assert any(row[:3] == ["settings", "file", str(file)] for row in rows)


def test_dry_run(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """--dry-run shows every choice with its reason and what would be started, and starts nothing."""
    install(monkeypatch, _entry("accelerator", "acme", "missing_descriptor", "acme-accel"))
    result = plug("run", "--dry-run", "--devices=2", "--max-restarts=1", "train.py", "--lr", "a b")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["what", "value", "why"]
    assert any(line.startswith("strategy     many (plugframe 0.1.0)") for line in lines)
    assert any("asked for in the command line (--devices)" in line for line in lines)
    assert (
        "starts: 2 ranks of python train.py --lr 'a b' by launcher starter (plugframe 0.1.0), up to 1 restarts" in lines
    )
    assert "hands over: PLUGFRAME_DEVICES=2" in lines
    assert "strategy: config: {}" in lines
    assert "plugframe: warning: accelerator 'acme' (acme-accel 1.2) is broken" in result.err.splitlines()[0]
    assert not world.jobs
    assert "this process becomes python -u train.py" in plug("run", "--dry_run", "--devices=1", "train.py").out
    several = plug("run", "--dry-run", "--num-nodes=2", "--node-rank=1", "--main-address=a", "train.py").out
    assert "3 ranks of python train.py by launcher starter (plugframe 0.1.0), node 1 of 2, main a:29500" in several


# ---------------------------------------------------------------------- list-plugins


def test_list_plugins(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain table of every name with its package, and what metadata alone says of it."""
    install(
        monkeypatch,
        _entry("strategy", "many", "many", "acme-ddp"),
        _entry("strategy", "twin", "many", "acme-ddp"),
        _entry("strategy", "twin", "many", "other"),
        _entry("stratgy", "lost", "many", "acme-ddp"),
    )
    result = plug("list-plugins")
    rows = [line.split(maxsplit=5) for line in result.out.splitlines()]
    assert rows[0] == ["kind", "name", "package", "version", "needs", "status"]
    assert ["strategy", "many", "plugframe", "0.1.0", "-", "not checked"] in rows
    assert ["strategy", "many", "acme-ddp", "1.2", "-", "shadowed by the built-in; use acme-ddp:many"] in rows
    assert [
        "strategy",
        "twin",
        "other",
        "1.2",
        "-",
        "the same name in several packages; use other:twin",
    ] in rows
    lost = "broken: there is no such kind. Did you mean 'strategy'?"
    assert ["stratgy", "lost", "acme-ddp", "1.2", "-", lost] in rows
    assert result.code == 0


def test_list_plugins_of_one_kind(world: Ground) -> None:
    """--kind keeps one kind; an unknown one is an error with the closest."""
    rows = plug("list_plugins", "--kind=strategy").out.splitlines()
    assert [row.split()[1] for row in rows[1:]] == ["many", "many_spawn", "one"]
    result = plug("list-plugins", "--kind=strategies")
    assert result.code == 2
    assert "--kind='strategies' is not a kind. Did you mean 'strategy'? Kinds: accelerator," in _only_line(result)


def test_list_plugins_as_json(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """--json is a list of objects with the table's columns."""
    install(monkeypatch)
    found = json.loads(plug("list-plugins", "--json", "--kind", "launcher").out)
    assert found[1] == {
        "kind": "launcher",
        "name": "starter",
        "package": "plugframe",
        "version": "0.1.0",
        "needs": "",
        "status": "not checked",
    }


@pytest.mark.ranks
def test_list_plugins_check(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """--check loads each descriptor by itself and says what is broken, missing or incompatible; exit code 1."""
    install(
        monkeypatch,
        _entry("strategy", "text", "not_a_plugin", "acme-ddp"),
        _entry("strategy", "typo", "no_such_attribute", "acme-ddp"),
        _entry("strategy", "newer", "newer", "acme-ddp"),
        _entry("strategy", "needy", "needy", "acme-ddp"),
        _entry("strategy", "dangling", "dangling", "acme-ddp"),
    )
    result = plug("list-plugins", "--check", "--json")
    found = {row["name"]: row for row in json.loads(result.out)}
    assert found["fake"]["status"] == "ok"
    assert found["fake"]["summary"] == "Fake devices."
    assert found["best"]["summary"] == "= the best fast here: The best."
    assert found["many_spawn"]["summary"] == "= many with launcher functions"
    assert found["text"]["status"].startswith(f"broken: {__name__}:not_a_plugin is a str, not a plugframe.Plugin.")
    assert "AttributeError" in found["typo"]["status"]
    assert found["newer"]["status"].startswith("incompatible: speaks version 99 of the plugin contract")
    missing = "missing module_that_is_not_there: type \"pip install 'acme-ddp[fast]'\""
    assert found["needy"]["status"] == missing
    assert found["dangling"]["status"].startswith("broken: it stands for another plugin, and strategy='gone'")
    assert result.code == 1
    install(monkeypatch)
    assert plug("list-plugins", "--check", "--kind=accelerator").code == 0


@pytest.mark.ranks
def test_a_chatty_descriptor_does_not_spoil_the_listing(
    world: Ground, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a package prints while its descriptor loads goes to stderr."""
    (world.folder / "chatty_acme.py").write_text(
        "import plugframe\nprint('hello')\nplugin = plugframe.Plugin(factory='a:B')\n"
    )
    monkeypatch.syspath_prepend(str(world.folder))
    install(monkeypatch, Entry("extension", "chatty", "chatty_acme:plugin", "acme", "1"))
    result = plug("list-plugins", "--check", "--json")
    monkeypatch.delitem(sys.modules, "chatty_acme", raising=False)
    assert json.loads(result.out)
    assert "hello" in capfd.readouterr().err


def test_needs_are_read_from_metadata(world: Ground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The distributions of a plugin's extra are listed, and how to install the absent ones; nothing is imported."""
    info = tmp_path / "acme_fast-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme-fast\nVersion: 2.0\nProvides-Extra: speed\n"
        "Requires-Dist: click\nRequires-Dist: acme-not-there>=1; extra == 'speed'\n"
        "Requires-Dist: pluggy; extra == 'speed'\n"
    )
    (info / "entry_points.txt").write_text("[plugframe.strategy]\nfast = acme_fast_is_never_imported:plugin [speed]\n")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = json.loads(plug("list-plugins", "--json").out)
    row = next(row for row in found if row["name"] == "fast")
    assert (row["package"], row["version"]) == ("acme-fast", "2.0")
    assert row["needs"] == "acme-not-there, pluggy"
    assert row["status"] == "missing: type pip install 'acme-fast[speed]'"


def test_a_plain_table_is_aligned() -> None:
    """Columns line up, and no line ends in blanks."""
    assert plain(("a", "bb"), [("long", "x"), ("s", "")]) == "a     bb\nlong  x\ns"


def test_a_terminal_gets_a_drawn_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal gets the same cells, with markup-like text left alone."""
    from plugframe.cli.table import show

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    show(("kind", "needs"), [("strategy", "acme[fast]"), ("logger", "")])
    out = capsys.readouterr().out
    assert "acme[fast]" in out
    assert "kind" in out


# ---------------------------------------------------------------------- env, help, version


def test_env(world: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, devices by accelerator, packages and variables; what looks like a secret is not shown."""
    install(
        monkeypatch,
        _entry("accelerator", "sick", "failing", "acme-accel"),
        _entry("accelerator", "gone", "missing_descriptor", "acme-accel"),
    )
    monkeypatch.setenv("PLUGFRAME_STRATEGY", "many")
    monkeypatch.setenv("PLUGFRAME_TOKEN", "abc123")
    found = json.loads(plug("env", "--json").out)
    assert found["system"]["plugframe"] == plugframe.__version__
    assert found["system"]["pytorch"].startswith("2.")
    assert found["devices"]["fake"] == "3"
    assert "best" not in found["devices"]
    assert found["devices"]["sick"] == "RuntimeError: driver too old"
    assert "is broken" in found["devices"]["gone"]
    assert found["packages"]["pluggy"] == metadata.version("pluggy")
    assert found["plugins"]["acme-accel 1.2"] == "accelerator gone, accelerator sick"
    assert found["variables"]["PLUGFRAME_STRATEGY"] == "many"
    assert found["variables"]["PLUGFRAME_TOKEN"] == "(set, not shown)"
    text = plug("env")
    assert text.code == 0
    assert "devices:\n" in text.out


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("PLUGFRAME_X_PWD", "hunter2", ""),
        ("PLUGFRAME_DB_PASS", "hunter2", ""),
        ("TORCH_auth_header", "hunter2", ""),
        ("TORCH_EXTENSIONS_DIR", "/data/aB3/0123456789abcdef0123456789abcdef/x", "same"),
        ("TORCH_HOME", "s3://me:hunter2@store.example/models", "s3://…@store.example/models"),
        ("TORCH_X", "redis://:hunter2@host/0 and http://u:p@h", "redis://…@host/0 and http://…@h"),
        ("PLUGFRAME_LOGGERS", "hf_abcdefghijklmnop", ""),
        ("PLUGFRAME_NOTE", "Bearer abcdefghijkl", ""),
        ("PLUGFRAME_NOTE", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc", ""),
        ("PLUGFRAME_NOTE", "AKIAIOSFODNN7EXAMPLE", ""),
        ("PLUGFRAME_NOTE", "0123456789abcdef0123456789abcdef", ""),
        ("PLUGFRAME_NOTE", "wJalrXUtnFEMI7K7MDENGbPxRfiCYEXAMPLEKEY1", ""),
        ("TORCH_LOGS", "+dynamo,graph_breaks,recompiles,output_code", "same"),
        ("PLUGFRAME_STRATEGY", "deepspeed_stage_3_offload_nvme", "same"),
    ],
)
def test_env_shows_no_secret(monkeypatch: pytest.MonkeyPatch, name: str, value: str, shown: str) -> None:
    """By its name or by its value, and the user and password of a URL."""
    monkeypatch.setenv(name, value)
    found = json.loads(plug("env", "--json").out)["variables"][name]
    assert found == {"": "(set, not shown)", "same": value}.get(shown, shown)


def test_help_and_version() -> None:
    """No arguments print the help; the version is one line; every command has an example."""
    assert plug().code == 0
    assert plug().out == plug("--help").out
    assert plug("--version").out == f"plugframe {plugframe.__version__}\n"
    for name in ("run", "list-plugins", "env", "checkpoint"):
        assert f"plugframe {name}" in plug(name, "-h").out.split("Examples:")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lst-plugins"], "'lst-plugins' is not a command. Did you mean 'list-plugins'?"),
        (["train.py"], "Type 'plugframe run train.py'."),
        (["list-plugins", "--jso"], "--json"),
        (["env", "extra"], "extra"),
    ],
)
def test_a_wrong_command_is_one_line(words: list[str], message: str) -> None:
    """An unknown command or option is one line with the closest, and exit code 2."""
    result = plug(*words)
    assert result.code == 2
    assert message in _only_line(result)


# ---------------------------------------------------------------------- as a process


def _process(*words: str, cwd: Path | None = None, python: tuple[str, ...] = ()) -> Result:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PLUGFRAME_")}
    argv = [sys.executable, *python, "-m", "plugframe", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=cwd, env=environ, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (("list-plugins",), ("torch", "rich", "pluggy", "tomllib")),
        (("--help",), ("torch", "rich", "pluggy", "importlib.metadata")),
        (("run", "--help"), ("torch", "rich", "pluggy", "importlib.metadata")),
        (("--version",), ("torch", "rich", "pluggy", "importlib.metadata")),
    ],
)
def test_a_listing_imports_little(words: tuple[str, ...], without: tuple[str, ...]) -> None:
    """Help, version and listing import no torch, and nothing else that they do not need."""
    result = _process(*words, python=("-X", "importtime"))
    assert result.code == 0
    imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines()}
    assert "plugframe.cli" in imported
    assert not imported & set(without)


def test_a_wrong_name_as_a_process(tmp_path: Path) -> None:
    """A wrong name is one line without a traceback, exit code 2, and torch is not waited for."""
    (tmp_path / "train.py").write_text("")
    result = _process("run", "train.py", "--strategy=dpp", cwd=tmp_path, python=("-X", "importtime"))
    lines = [line for line in result.err.splitlines() if not line.startswith("import time:")]
    assert result.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("plugframe: strategy='dpp' is not installed. Did you mean 'ddp'? Installed: ")
    assert "torch" not in {line.rpartition("|")[2].strip() for line in result.err.splitlines()}


def test_one_rank_as_a_process(tmp_path: Path) -> None:
    """The script gets its own words, its exit code is the command's, and its process is the command's process."""
    (tmp_path / "train.py").write_text("import os, sys\nprint(os.getpid(), sys.argv, flush=True)\nsys.exit(7)\n")
    argv = [sys.executable, "-m", "plugframe", "run", "--accelerator=cpu", "train.py", "--devices=1", "--lr", "2"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 7
    assert out == f"{process.pid} ['train.py', '--lr', '2']\n"
