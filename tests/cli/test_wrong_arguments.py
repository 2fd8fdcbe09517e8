"""What no option of ``plugframe run`` may be: refused before anything is started, in a line that says what is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from plugframe.cli import cli
from plugframe.cli.run import command as run

#: Of each option values that are wrong, and for some what must be said of them.
WRONG: dict[str, tuple[str | tuple[str, str], ...]] = {
    "--accelerator": (("cud", "Did you mean 'cuda'?"), "CPU ", "3", ("cpu,cuda", "Did you mean 'cuda'?")),
    "--strategy": (("dpp", "Did you mean 'ddp'?"), ("DDP", "Did you mean 'ddp'?"), "ddp,fsdp", "8"),
    "--devices": ("0", "-2", "x", "1.5", "2;3", "0,0", ("many", "a number of processes from 1, or 'auto'")),
    "--precision": (("fp16", "use precision='16-mixed'"), "12", ("bf", "Did you mean 'bf16'?"), "64-mixed"),
    "--collective": (("gloo", "use collective='torch'"), ("torhc", "Did you mean 'torch'?")),
    "--checkpoint": (("safetensor", "Did you mean 'safetensors'?"), "pt"),
    "--environment": (("slrum", "Did you mean 'slurm'?"),),
    "--launcher": (("spwan", "Did you mean 'spawn'?"), "torchrun"),
    "--plugins": (("lokstep", "Did you mean 'lockstep'?"), ("lockstep,lockstep", "given twice"), "lockstep,,x"),
    "--loggers": (("tensorbord", "Did you mean 'tensorboard'?"), ("csv,csv", "given twice")),
    "--callbacks": (
        ("nodot", "type package.module:Class"),
        "a:b:c",
        "a b:c",
        ("nowhere.to:Find", "there is no module 'nowhere'"),
    ),
    "--timeout": (("0", "above 0"), "-1", "soon", "nan", "inf"),
    "--report-after": ("-1", "soon", "nan", "inf"),
    "--mesh": ("2", "data", "data=0", "data=x", "data=2,data=2", ("data=2", "has no axes of a mesh")),
    "--num-nodes": (("0", "from 1"), "-1", "x", "1.5", ("4:2", "MIN:MAX, such as 2:4"), "1:", "0:2", "a:b", ":3"),
    "--rdzv-endpoint": ((":29500", "such as node0:29500"), "host:0", "host:x", "host:99999"),
    "--node-rank": ("-1", "x", ("1", "there is one node: add --num-nodes"), "1.0"),
    "--main-address": (),
    "--main-port": ("0", ("65536", "1<=x<=65535"), "x", "-1"),
    "--rdzv-timeout": (("0", "above 0"), "-1", "x", "nan", "inf"),
    "--grace-period": (("-1", "from 0"), "x", "nan", "inf"),
    "--max-restarts": (("-1", "x>=0"), "x", "1.5"),
    "--log-dir": (("train.py", "train.py"),),
    "--tee": ("x", "4", "0:x", "0:1,0:2"),
    "--numa-binding": ("x", "nodes"),
    "--debug-rank": ("-1", "x", "1.5", "7"),
    "--disable-plugin": (("nosuch", "no plugin or package of that name is installed"),),
    "--config": (("nofile.toml", "does not exist"), (".", "is a folder")),
    "--simulate": (("0", "an integer from 1"), "-1", "x", "1.5"),
    "--strategy.timeout-s": (("x", "number"), "-1"),
    "--strategy.nothing": ("1",),
    "--logger.csv.nothing": ("1",),
}
#: What else has to be typed for an option to mean anything.
WITH = {
    "--rdzv-endpoint": ("--num-nodes=1:2",),
    "--rdzv-timeout": ("--num-nodes=1:2", "--rdzv-endpoint=host:1"),
    "--main-port": ("--num-nodes=2", "--node-rank=0", "--main-address=host"),
    "--strategy.timeout-s": ("--strategy=ddp",),
    "--strategy.nothing": ("--strategy=ddp",),
    "--logger.csv.nothing": ("--loggers=csv",),
}
CASES = [
    (option, *(value if isinstance(value, tuple) else (value, "")))
    for option, values in WRONG.items()
    for value in (*values, ("", "needs a value after the '='"))
]


def test_no_option_is_left_out() -> None:
    """The table has every option that takes a value."""
    takers = [p for p in run.params if isinstance(p, click.Option) and not p.is_flag]
    assert {option.opts[0] for option in takers} <= set(WRONG)


@pytest.mark.parametrize("before", [True, False])
def test_an_option_of_many_plugins_is_that_of_one(before: bool) -> None:
    """The kind of an option is in the singular, also after the script, which would else get it in silence."""
    for word, right in (
        ("--loggers.csv.folder=out", "type --logger.csv.folder."),
        ("--plugins.profiler.path=out", "type --extension.profiler.path."),
    ):
        result = CliRunner().invoke(cli, ["run", *([word, "train.py"] if before else ["train.py", word])])
        assert result.exit_code == 2
        assert right in result.output


@pytest.mark.parametrize(("option", "value", "said"), CASES, ids=[f"{option}={value}" for option, value, _ in CASES])
def test_a_wrong_value_is_refused(
    option: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most three lines say the value and what is allowed, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("")
    result = CliRunner().invoke(cli, ["run", f"{option}={value}", *WITH.get(option, ()), "--dry-run", "train.py"])
    assert result.exit_code == 2, result.output
    assert len(result.output.splitlines()) <= 3
    assert said in result.output
    assert all(part in result.output for part in value.rpartition(",")[2:]) or value == "."


@pytest.mark.parametrize(
    "words", [["run", "x.py"], ["doctor"], ["checkpoint", "verify", "x"], ["list-plugins", "--check"]]
)
def test_commands_that_need_torch_say_so(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, in place of one for each plugin; the others work without it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert result.stderr.endswith("needs PyTorch, which is not installed: pip install torch\n")
    assert result.stderr.count("\n") == 1
    assert CliRunner().invoke(cli, ["list-plugins"]).exit_code == 0
