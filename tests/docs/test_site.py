"""The site is built without a warning, loads nothing from elsewhere, and its search works from a folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from browser import CHROMIUM, document
from paths import ROOT

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra site"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures are files of the site."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"<(?:script|img|iframe)[^>]*src=\"(?:https?:)?//[^\"]*|<link[^>]*stylesheet[^>]*//[^>]*", text
        )


def test_pages_outside_of_docs_are_there(site: Path) -> None:
    """A link to a file of the repository leads to its page, whose links to docs lead back."""
    assert 'href="project/SECURITY.html"' in (site / "trust.html").read_text(encoding="utf-8")
    assert (site / "project" / "SECURITY.html").exists()


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
def test_the_search_works_from_a_folder(site: Path, tmp_path: Path) -> None:
    """In a browser without a network, of files, a word is found on its page."""
    address = f"file://{site}/index.html?q=accumulate"
    shown = document(address, tmp_path / "profile", "--virtual-time-budget=9000")
    assert re.search(r"md-search-result__meta\">\d+ matching documents", shown)
    assert "accumulation.html?h=accumulate" in shown
