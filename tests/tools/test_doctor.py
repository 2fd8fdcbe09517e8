"""``plugframe doctor``: each plugin in a process of its own, a job of two ranks, and what to type."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from plugframe._compat import metadata
from plugframe.cli import cli
from plugframe.core.registry.registry import Entry, Registry
from plugframe.tools.diagnosis import machine, plugins, selftest
from plugframe.tools.diagnosis.finding import Finding

Use = Callable[..., None]


def doctor(*words: str) -> Any:
    return CliRunner().invoke(cli, ["doctor", *words], prog_name="plugframe")


def by_name(found: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


@pytest.mark.ranks
def test_a_sound_machine_is_told_so() -> None:
    """Every built-in loads, two ranks compute, save and load, and the exit code is 0."""
    result = doctor("--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 0, [each for each in told["findings"] if each["status"] == "error"]
    assert told["errors"] == 0
    names = {(each["area"], each["name"]): each for each in told["findings"]}
    assert names["plugins", "strategy ddp"]["text"] == "loads"
    for name in ("all_reduce", "all_gather", "broadcast", "save", "load"):
        assert names["two ranks", name]["right"]
        assert names["two ranks", name]["mb_per_s"] > 0


def test_broken_packages_are_named_with_what_to_do(packages: Use) -> None:
    """Each broken name is one failed line; every other name is looked at as before; the exit code is 1."""
    packages("broken", "acme")
    result = doctor("--quick")
    assert result.exit_code == 1
    lines = {line.split(": ")[0].split(" (")[0].strip(): line for line in result.stdout.splitlines()}
    assert "ImportError: libacme" in lines["FAIL  strategy broken-import"]
    assert "(plugframe-broken 0.3.0): its " in lines["FAIL  strategy broken-import"]
    assert "Fix or uninstall plugframe-broken" in lines["FAIL  strategy broken-exit"]
    assert "overrides strategy_next_batch without a mark" in lines["FAIL  strategy broken-hook"]
    assert "which is no hook" in lines["FAIL  strategy broken-extra"]
    assert "pip install --upgrade plugframe" in lines["FAIL  strategy broken-api"]
    assert "pip install 'plugframe-broken[sdk]'" in lines["-     strategy broken-needs"]
    assert "  ok    strategy ddp: loads" in result.stdout.splitlines()
    assert lines["ok    strategy acme"].endswith("): loads")


@pytest.mark.ranks
def test_a_plugin_that_hangs_or_kills_is_told_of() -> None:
    """A plugin that hangs, or ends its process, is stopped and reported."""

    def hang() -> list[plugins.Answer]:
        time.sleep(3600)
        return []

    def die() -> list[plugins.Answer]:
        os._exit(3)

    def chatter() -> list[plugins.Answer]:
        print("hello")
        return [("ok", "loads")]

    assert plugins.apart(hang, count=1, timeout_s=0.2) == [
        ("error", "did not load within 0 s: uninstall it, or report it to its author.")
    ]
    assert (
        plugins.apart(die, count=2)
        == [("error", "ended the process that loaded it (exit code 3): uninstall it, or report it to its author.")] * 2
    )
    assert plugins.apart(chatter, count=1) == [("ok", "loads")]


@pytest.mark.ranks
def test_clashes_and_stale_metadata_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages with a name, a package installed twice, and an editable one that was changed since."""
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[project]\nname = "acme"\n'
        '[project.entry-points."plugframe.logger"]\nnew = "acme:plugin"\nold = "acme:plugin"\n'
    )
    for version in ("1.0", "2.0"):
        info = tmp_path / f"acme-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[plugframe.logger]\nold = acme:plugin\n")
        (info / "direct_url.json").write_text(json.dumps({"url": f"file://{source}", "dir_info": {"editable": True}}))
    entries = [
        Entry("logger", "old", "nowhere_acme:plugin", "acme", "1.0"),
        Entry("logger", "old", "nowhere_other:plugin", "other", "1.0"),
        Entry("logger", "csv", "nowhere_other:plugin", "other", "1.0"),
    ]
    registry = Registry([*entries, *(each for each in Registry.discover().entries("logger") if each.builtin)])
    found = list(plugins.look(registry))
    texts = [f"{each.name}: {each.text}" for each in found if each.status == "warning"]
    assert "logger old: published by 2 packages: write 'acme:old' or 'other:old'." in texts
    assert "logger csv: the bare name is the built-in's: write 'other:csv' for the other." in texts
    assert any(text.startswith("acme: is installed 2 times (") for text in texts)
    stale = f"acme: its metadata is older than its pyproject.toml (logger new): type 'pip install -e {source}'."
    assert stale in texts


def test_what_the_machine_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little shared memory and a host name without an address are warnings with a remedy; an old package fails."""
    usage = type("Usage", (), {"free": 10 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)

    def unknown(name: str) -> str:
        raise OSError(2, "Name or service not known")

    monkeypatch.setattr("socket.gethostbyname", unknown)
    versions = {"torch": "2.1.0", "pluggy": "1.10.2"}
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))
    found = by_name(machine.look())
    assert found["shared memory"].status == "warning"
    assert "--shm-size" in found["shared memory"].text
    assert found["host name"].status == "warning"
    assert found["torch"].status == "error"
    assert found["torch"].text == "2.1.0, 2.11 or newer is needed: type 'pip install --upgrade torch'."
    assert found["pluggy"].status == "ok"


@pytest.mark.ranks
def test_a_job_that_fails_is_told_with_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code and the end of what the command said are in the line."""
    monkeypatch.setattr(selftest, "_accelerator", lambda registry: "nonesuch")
    (found,) = selftest.look(Registry([]))
    assert found.status == "error"
    assert "exit code 2" in found.text
    assert "accelerator='nonesuch' is not installed" in found.text
    monkeypatch.undo()
    (found,) = selftest.look(Registry([]))
    assert found.status == "note"
