"""What is written in the repository uses the field's words."""

from __future__ import annotations

import runpy

import pytest

from paths import ROOT

SCRIPT = ROOT / ".ci" / "english"


@pytest.mark.ranks
def test_no_banned_phrase_is_used() -> None:
    """No docstring, comment, message or page has a phrase that `.ci/english` lists."""
    script = runpy.run_path(str(SCRIPT))
    found = [f"{name}:{line}: {phrase}" for name in script["written"]() for line, phrase in script["found"](name)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["# It waits in vain.", 'x = "a checkpoint of which nothing is left"', "y = 1  # mended"]
)
def test_a_banned_phrase_is_found(text: str) -> None:
    """Comments and strings are read, names are not."""
    script = runpy.run_path(str(SCRIPT))
    assert any(script["PATTERN"].search(line) for _, line in script["prose"](f"{text}\n"))
    assert not any(script["PATTERN"].search(line) for _, line in script["prose"]("mended = a_text = 1\n"))
