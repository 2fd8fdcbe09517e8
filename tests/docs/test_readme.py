"""The README says what is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BUILT_INS = (ROOT / "docs" / "built-ins.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "plugins" / "README.md").read_text(encoding="utf-8")


def block(mark: str, page: str = README) -> str:
    """Return the code block after the comment ``<!-- mark -->``."""
    found = re.search(rf"^<!-- {mark} -->\n```\w*\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert found, f"the page has no block {mark!r}"
    return found.group(1)


def snippets(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def run(*command: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **variables},
    )


def test_the_table_of_plugins_is_what_is_printed() -> None:
    """The table is what ``plugframe list-plugins`` prints for the built-ins."""
    done = run(sys.executable, "-m", "plugframe", "list-plugins")
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    ours = [line for line in printed if line.startswith("kind") or " plugframe " in line]
    shown = [line.rstrip() for line in block("list-plugins", BUILT_INS).splitlines()]
    # Whether the packages that some need are installed differs between machines.
    rows = [
        [re.sub(r" +", " ", re.sub(r"missing: .*$", "not checked", line)) for line in lines] for lines in (shown, ours)
    ]
    assert rows[0] == rows[1]


def test_the_plugin_in_twenty_lines_trains(tmp_path: Path) -> None:
    """The plugin of the guide, copied out of it and published as it says, is selected by name and trains."""
    files = {}
    for snippet in [*snippets("python", GUIDE), *snippets("toml", GUIDE)]:
        name = re.match(r"# (\S+)\n", snippet)
        if name:
            files[name.group(1)] = snippet
    assert set(files) >= {"acme/__init__.py", "acme/strategy.py", "pyproject.toml"}
    lines = sum(len([line for line in text.splitlines()[1:] if line.strip()]) for text in files.values())
    assert lines <= 20
    site = tmp_path / "site"
    for name in ("acme/__init__.py", "acme/strategy.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(files[name])
    meta = site / "acme-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    point = re.search(r'entry-points\."([\w.]+)"\]\n(\w+) = "([\w:.]+)"', files["pyproject.toml"])
    assert point
    (meta / "entry_points.txt").write_text(f"[{point.group(1)}]\n{point.group(2)} = {point.group(3)}\n")
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "from plugframe import Lite\n"
        "lite = Lite()\n"
        "model = torch.nn.Linear(2, 1)\n"
        "model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "lite.backward(model(torch.full((1, 2), lite.global_rank + 1.0)).sum())\n"
        "lite.print('gradient', model.weight.grad.tolist(), type(lite.strategy).__name__)\n"
    )
    command = (sys.executable, "-m", "plugframe", "run", "train.py", "--strategy=acme", "--accelerator=cpu")
    done = run(*command, "--devices=2", cwd=tmp_path, PYTHONPATH=str(site))
    assert "gradient [[1.5, 1.5]] Acme" in done.stdout, done.stderr


def test_it_is_read_in_five_minutes() -> None:
    """At most 120 lines."""
    assert len(README.splitlines()) <= 120


def test_the_diff_adds_five_lines() -> None:
    """The diff that the page is about adds five lines."""
    (diff,) = snippets("diff")
    assert len([line for line in diff.splitlines() if line.startswith("+")]) == 5


@pytest.mark.parametrize("mark", ["train", "tests"])
def test_the_commands_name_what_exists(mark: str) -> None:
    """The two commands use files of the repository and the pinned versions."""
    text = block(mark)
    assert "-c constraints.txt" in text
    assert (ROOT / "constraints.txt").exists()
    for script in re.findall(r"\S+\.py", text):
        assert (ROOT / script).exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("verb", "mark"), [("demo", "train"), ("test", "tests")])
def test_the_verbs_do_what_the_commands_do(verb: str, mark: str, tmp_path: Path) -> None:
    """`make demo` and `make test` on a fresh machine run the commands of the README, line by line."""
    assert f"make {verb}" in block("verbs").splitlines()
    done = run("make", "--no-print-directory", "--dry-run", f"VENV={tmp_path}/.venv", verb, cwd=ROOT)
    lines = [line for line in done.stdout.replace(f"{tmp_path}/", "").splitlines() if not line.startswith("touch")]
    assert lines == block(mark).splitlines(), done.stderr


def test_links_lead_somewhere() -> None:
    """Every relative link and picture is there."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_text_of_the_project_names_a_machine() -> None:
    """No file names a path of the machine it was written on."""
    done = run("git", "ls-files", cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout")
    home = re.compile(r"(?<![\w.])/(?:root|work|home/\w+)/")
    for name in done.stdout.split("\n"):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".svg") and path.is_file():
            found = home.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found}"
