"""Output of ranks: saved to files, shown with a prefix, or unmodified; and ranks bound to CPUs."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.numa.binding
from click.testing import CliRunner

from plugframe.cli import cli
from plugframe.errors import RankFailedError, UnsupportedError, UsageError
from plugframe.hooks.launcher import Job
from plugframe.launch import supervise
from plugframe.launch.output import Output, parse_tee
from plugframe_builtins.elastic.launcher import Elastic

SPEAKING = """
import os, sys
rank = os.environ["RANK"]
print("out of", rank)
print("err of", rank, file=sys.stderr)
"""

Write = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a script to a new folder, which becomes the working directory, and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(body: str) -> str:
        Path("train.py").write_text(textwrap.dedent(body))
        return "train.py"

    return write


def kept(folder: str = "logs") -> dict[str, str]:
    """Return the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}


def said_by(ranks: Sequence[int], attempt: int) -> dict[str, str]:
    """Return the expected files of ranks that ran `SPEAKING`."""
    return {
        f"attempt-{attempt}/rank-{rank}.std{stream}.log": f"{stream} of {rank}\n"
        for rank in ranks
        for stream in ("out", "err")
    }


# ---------------------------------------------------------------------- the files


@pytest.mark.ranks
def test_output_is_kept_by_attempt_and_rank(script: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """Each attempt has a folder and each rank two files; the terminal shows the same lines with a rank prefix."""
    path = script(f"{SPEAKING}\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and rank == '1': os._exit(3)")
    supervise(Job(num_processes=2, command=(path,), max_restarts=1, log_dir="new/logs"))
    # A rank that leaves at once says only what was not kept back; the other one may have been ended before its first.
    again = {name: text for name, text in kept("new/logs").items() if name.startswith("attempt-1")}
    assert again == said_by((0, 1), 1)
    assert {name for name in kept("new/logs") if name.startswith("attempt-0")} == set(said_by((0, 1), 0))
    out, err = capfd.readouterr()
    assert {"[rank 0] out of 0", "[rank 1] out of 1"} <= set(out.splitlines())
    assert {"[rank 0] err of 0", "[rank 1] err of 1"} <= set(err.splitlines())
    assert all(line.startswith("[rank ") for line in out.splitlines())


@pytest.mark.ranks
def test_nothing_is_written_over_and_a_failure_names_the_folder(
    script: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    """A job that reuses a log folder continues the numbering; its report has the folder."""
    path = script(SPEAKING)
    supervise(Job(num_processes=1, command=(path,), log_dir="logs", tee=()))
    assert capfd.readouterr() == ("", "")
    path = script(f"{SPEAKING}\nraise ValueError('no such colour')")
    with pytest.raises(RankFailedError) as caught:
        supervise(Job(num_processes=1, command=(path,), log_dir="logs", tee=()))
    failure = kept().pop("attempt-1/rank-0.failure.txt")
    assert failure.splitlines()[0] == "Traceback (most recent call last):"
    assert failure.splitlines()[-1] == "ValueError: no such colour"
    assert {name: text for name, text in kept().items() if text != failure} == said_by((0,), 0) | said_by((0,), 1)
    assert caught.value.report.splitlines()[-1] == f"output of the ranks: {Path('logs').absolute() / 'attempt-1'}"
    # Of another node's ranks, which share the folder, a number is not taken.
    assert Output.from_job(Job(num_processes=1, log_dir="logs")).create_attempt_folder(1, [2, 3]) == 1


@pytest.mark.ranks
def test_tracebacks_of_other_ranks_are_in_files(script: Write) -> None:
    """The terminal shows the culprit's traceback; the others are saved, or a hint shows how to save them."""
    path = script("""
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or it may be ended before it has failed
        rank = os.environ["RANK"]
        open(f"ready-{rank}", "w").close()
        while not (os.path.exists("ready-0") and os.path.exists("ready-1")):
            time.sleep(0.01)
        if rank == "0":
            open("failed", "w").close()
            raise ValueError("no such colour")
        while not os.path.exists("failed"):
            time.sleep(0.01)
        [][1]
    """)
    for folder in ("logs", None):
        for name in ("failed", "ready-0", "ready-1"):
            Path(name).unlink(missing_ok=True)
        with pytest.raises(RankFailedError) as caught:
            supervise(Job(num_processes=2, command=(path,), log_dir=folder, tee=()))
        hint = "tracebacks of the other ranks: run again with --log-dir=DIR"
        assert (hint in caught.value.report.splitlines()) == (folder is None)
    last = sorted(kept()[f"attempt-0/rank-{rank}.failure.txt"].splitlines()[-1] for rank in (0, 1))
    assert last == ["IndexError: list index out of range", "ValueError: no such colour"]


@pytest.mark.ranks
def test_a_function_is_heard_too(script: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """Forked ranks write to their files, and rank 0's result comes back."""
    script("")

    def speak() -> int:
        print("out of", os.environ["RANK"], flush=True)
        print("err of", os.environ["RANK"], file=sys.stderr, flush=True)
        return 7

    job = Job(num_processes=2, function=speak, log_dir="logs", tee={1: ("stderr",)})
    assert Elastic(start_method="fork").launcher_launch(job) == 7
    assert kept() == said_by((0, 1), 0)
    assert capfd.readouterr() == ("", "[rank 1] err of 1\n")


@pytest.mark.ranks
def test_without_a_folder_nothing_is_left(script: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """Teed streams use temporary files; the others go to the terminal unmodified."""
    path = script(SPEAKING)
    supervise(Job(num_processes=2, command=(path,), tee={1: ("stdout",)}))
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[rank 1] out of 1", "out of 0"]
    assert sorted(err.splitlines()) == ["err of 0", "err of 1"]
    assert os.listdir() == ["train.py"]


@pytest.mark.ranks
def test_lines_of_ranks_are_written_in_one_piece(
    script: Write, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both streams write complete lines, also under PYTHONUNBUFFERED: pieces of two ranks would be mixed."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    modes = "[(stream.line_buffering, stream.write_through) for stream in (sys.stdout, sys.stderr)]"
    supervise(Job(num_processes=1, command=(script(f"import sys\nprint({modes})"),)))
    assert capfd.readouterr().out == "[(True, False), (True, False)]\n"


# ---------------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("0", ()),
        ("1", ("stdout",)),
        ("out", ("stdout",)),
        ("err", ("stderr",)),
        ("3", ("stdout", "stderr")),
        ("all", ("stdout", "stderr")),
        ("0:3,12:err", {0: ("stdout", "stderr"), 12: ("stderr",)}),
    ],
)
def test_streams_are_numbers_or_words(text: str, means: Mapping[int, Sequence[str]] | Sequence[str]) -> None:
    """``--tee`` takes torchrun's numbers, names for them, and a list by rank."""
    assert parse_tee(text, 13) == means


def test_what_goes_where() -> None:
    """With --log-dir, output goes to files and the terminal; a rank under a debugger uses the terminal only."""
    plain = Output.from_job(Job(num_processes=2))
    assert plain.file(0, "stdout", attempt=0, default_folder=Path("tmp")) == ""
    assert not plain.shows(0, "stdout")
    keeping = Output.from_job(Job(num_processes=2, log_dir="/logs", debug_rank=1))
    assert keeping.file(0, "stderr", attempt=4, default_folder=Path("tmp")) == "/logs/attempt-4/rank-0.stderr.log"
    assert keeping.shows(0, "stderr")
    assert keeping.file(1, "stderr", attempt=4, default_folder=Path("tmp")) == ""
    assert not keeping.shows(1, "stderr")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--log-dir=train.py"], "train.py is a file: use a folder"),
        (["--log-dir=train.py/a/b"], r"a/b cannot be created: .*train.py is a file: use a folder"),
        (["--log-dir=/proc/nothing"], "/proc/nothing is not writable .*: use another folder"),
        (["--log-dir", ""], "--log-dir needs a value"),
        (["--tee=4"], "--tee=4: use 1 or out, 2 or err, 3 or all, 0 for none"),
        (["--tee=0:3,0:1"], "--tee=0:3,0:1: use 1 or out, .* with each rank once"),
        (["--tee=0:3,2:1"], "--tee=0:3,2:1: no rank 2, this job has ranks 0 to 1"),
        (["--numa-binding=near"], "'near' is not one of 'node', 'socket', 'exclusive', 'core-complex'"),
    ],
)
def test_a_wrong_word_is_one_line_and_starts_nothing(script: Write, words: list[str], said: str) -> None:
    """The error has the option, the reason and the alternative; no rank runs."""
    path = script("open('ran', 'w')")
    result = CliRunner().invoke(cli, ["run", "--devices=2", "--accelerator=cpu", *words, path])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(result.stderr)
    assert os.listdir() == ["train.py"]


def test_what_was_typed_reaches_the_launcher(script: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log options also apply to one rank, which then needs a launcher; a dry run creates no folder."""
    path, jobs = script(""), list[Job]()
    monkeypatch.setattr(Elastic, "launcher_launch", lambda self, job: jobs.append(job))
    words = ["run", "--devices=1", "--accelerator=cpu", path, "--log-dir=logs", "--tee=0:out", "--numa-binding=node"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    (job,) = jobs
    assert (job.log_dir, job.tee, job.numa_binding, job.debug_rank) == ("logs", {0: ("stdout",)}, "node", None)
    shown = CliRunner().invoke(cli, [*words, "--dry-run"]).stdout
    assert "output saved in logs, bound to the CPUs by node" in shown
    assert os.listdir() == ["train.py"]
    monkeypatch.setattr(Elastic, "launcher_launch", lambda self, job: None)
    told = CliRunner().invoke(cli, ["run", "--devices=1", "--accelerator=cpu", path, "--tee=0"]).stderr
    assert told == ("plugframe: warning: --tee=0 has no effect: without --log-dir all output goes to the terminal.\n")


# ---------------------------------------------------------------------- NUMA


def bind(**settings: Any) -> None:
    supervise(Job(num_processes=2, command=("train.py",), numa_binding="node", **settings))


def test_a_binding_that_cannot_be_is_one_line(script: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """NUMA binding is refused without GPU, numactl or NUMA nodes, for unknown values, and on errors of torch."""
    script("open('ran', 'w')")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(UnsupportedError, match="each of the 2 ranks near the GPU .* and this machine has 1: omit"):
        bind()
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match="--numa-binding=node requires numactl: install it"):
        bind()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with monkeypatch.context() as patch:
        patch.setattr("plugframe.launch.numa._NODES", "/nowhere")
        with pytest.raises(UnsupportedError, match="/nowhere does not exist, so there are no NUMA nodes"):
            bind()
    with pytest.raises(UsageError, match="--numa-binding=near: use one of node, socket, exclusive, core-complex"):
        supervise(Job(num_processes=2, command=("train.py",), numa_binding="near"))

    def unknown(index: int) -> Any:
        raise RuntimeError("no such device")

    monkeypatch.setattr(torch.cuda, "get_device_properties", unknown)
    with pytest.raises(UnsupportedError, match="torch could not bind the ranks .RuntimeError: no such device."):
        bind()
    assert os.listdir() == ["train.py"]


@pytest.mark.ranks
def test_ranks_are_bound_by_numactl(script: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each rank of a script runs under numactl with the CPUs that torch selects."""
    path = script("import os; open(os.environ['RANK'], 'w').write(os.environ['BOUND'])")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "numactl").write_text('#!/bin/sh\nexport BOUND="$1"\nshift\nexec "$@"\n')
    (programs / "numactl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    # What a machine without GPUs lacks, and no more: the node of each of them. The name is torch's own, and changes.
    (asked,) = (name for name in vars(torch.numa.binding) if name.startswith("_get_numa_node_index_for_"))
    monkeypatch.setattr(torch.numa.binding, asked, lambda *args, **kwargs: 0)
    supervise(Job(num_processes=2, command=(path,), numa_binding="node"))
    assert Path("0").read_text() == Path("1").read_text()
    assert Path("0").read_text().startswith("--physcpubind=")


def test_ranks_are_bound_near_their_own_devices(script: Write) -> None:
    """torch binds by local rank, so devices other than the first ones are refused."""
    from plugframe.cli.start import Nodes
    from plugframe.cli.supervision_options import fields
    from plugframe.core.planning.plan import Plan

    plan = Plan(choices={}, devices=(2, 3), devices_reason="asked for", num_nodes=1, launched=False)
    with pytest.raises(UnsupportedError, match="the devices requested are 2, 3: hide the others"):
        fields(plan, Nodes(numa_binding="node"))
