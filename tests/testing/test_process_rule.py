"""Tests that start processes or compile carry the markers that say so, or fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import HELPERS

CONFTEST = """
from process_rule import ProcessRule

def pytest_configure(config):
    config.pluginmanager.register(ProcessRule())
"""

TESTS = """
import os, subprocess, sys
from contextlib import suppress
import pytest

def start():
    subprocess.run([sys.executable, "-c", ""])

@pytest.fixture
def started():
    start()

@pytest.fixture(scope="module")
def shared():
    getattr(os, "sys" + "tem")("true")

def test_calls_a_helper():
    start()

def test_uses_a_fixture(started):
    pass

@pytest.mark.parametrize("num_workers", [0, 2])
def test_has_workers(num_workers):
    pass

def test_hides_it():
    getattr(os, "sys" + "tem")("true")

def test_swallows_it():
    with suppress(BaseException):
        getattr(os, "sys" + "tem")("true")

@pytest.mark.ranks
def test_is_marked(shared):
    getattr(os, "sys" + "tem")("true")

def test_shares_a_fixture(shared):
    pass

def test_starts_nothing():
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tests, whose conftest has the rule."""
    folder = tmp_path_factory.mktemp("rule") / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_rule.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    ranks: r\n    compile: c\n")
    return folder


def run(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "pytest", "-rA", "--tb=line", "-p", "no:cacheprovider", *words, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(HELPERS), "COLUMNS": "300"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout


def test_what_starts_processes_is_left_out(folder: Path) -> None:
    """What a test's code, its fixtures, or its parameters show is marked."""
    text = run(folder, "--collect-only", "-q", "-m", "not ranks")
    left = [line.partition("::")[2] for line in text.splitlines() if "::" in line]
    hidden = ["test_hides_it", "test_swallows_it", "test_shares_a_fixture"]
    assert left == ["test_has_workers[0]", *hidden, "test_starts_nothing"]


def test_what_is_not_marked_fails(folder: Path) -> None:
    """A process that is started out of sight fails the test, also if the error is swallowed or a fixture starts it."""
    text = run(folder)
    failed = [line.partition("::")[2] for line in text.splitlines() if line.startswith("FAILED")]
    assert [line.partition(" - ")[0] for line in failed] == [
        "test_hides_it",
        "test_swallows_it",
        "test_shares_a_fixture",
    ]
    assert all("mark" in line for line in failed), failed
    assert "3 failed, 6 passed" in text, text
