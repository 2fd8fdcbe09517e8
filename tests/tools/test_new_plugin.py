"""``plugframe new-plugin``: what it writes installs and trains; its own tests are run with the guide's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from plugframe.cli import cli
from plugframe.hooks import KINDS


def plug(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, list(words), prog_name="plugframe")
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of every kind in it, and all of them installed in ``site``."""
    folder = tmp_path_factory.mktemp("written")
    for kind in KINDS:
        code, said = plug("new-plugin", kind, f"acme-{kind}", "--folder", str(folder / kind))
        assert code == 0, said
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", "--no-compile", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site")]
    done = subprocess.run(
        [*command, *(str(folder / kind) for kind in KINDS)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def run(folder: Path, *command: str, timeout_s: float = 300) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--strategy=acme-strategy", "--collective=acme-collective", "--checkpoint=acme-checkpoint", "--devices=2"),
        ("--precision=acme-precision", "--launcher=acme-launcher", "--loggers=acme-logger", "--plugins=acme-extension"),
    ],
)
def test_the_names_train_the_example(written: Path, options: tuple[str, ...]) -> None:
    """The command the package prints works, alone and together with others."""
    said = run(written, "plugframe", "run", "strategy/train.py", "--accelerator=acme-accelerator", *options)
    assert "epoch 4: loss" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("strategi", "acme"), "'strategi' is not a kind. Did you mean 'strategy'? Kinds: accelerator,"),
        (("strategy", "a b"), "'a b' is no name for a plugin: use letters, digits, '-' and '_', such as 'acme'."),
        (("strategy", "auto"), "'auto' is no name for a plugin"),
        (("strategy", "ddp"), "'ddp' is the name of a built-in strategy, which nobody else can take: choose another."),
        (("logger", "acme", "--folder", "taken"), "taken is there already: give another with --folder=FOLDER."),
    ],
)
def test_what_cannot_be_written_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong kind or name, and a folder that is in use, each in one line; nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    code, said = plug("new-plugin", *words)
    assert code == 2
    assert message in said
    assert os.listdir(tmp_path) == ["taken"]
