"""The guide for plugin authors: its commands print what it says, its files are those they write."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest

from paths import DOCS
from plugframe.hooks import KINDS


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_tutorial_says_what_happens(kind: str) -> None:
    """From the empty folder to the wheel: every command is run, the contract suite of the new package included."""
    page = (DOCS / "plugins" / f"{kind}.md").read_text(encoding="utf-8")
    assert script("draw_pages").drawn(page) == page, f"type: {sys.executable} docs/draw_pages.py {kind}"


def test_the_reference_is_that_of_the_hooks() -> None:
    """It is written from the hookspecs, and was since they changed."""
    page = (DOCS / "plugins" / "reference.md").read_text(encoding="utf-8")
    assert script("draw_reference").reference() == page, "type: python docs/draw_reference.py"


def test_links_lead_somewhere() -> None:
    """Every file a page of the documentation links to is there."""
    missing = []
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing
