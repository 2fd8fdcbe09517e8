"""The page of libraries is what `docs/draw_libraries.py` last wrote."""

from __future__ import annotations

import re

from library_models import LIBRARIES
from paths import ROOT


def test_every_model_has_a_row_of_known_words() -> None:
    """No row is missing, and no cell is wrong or without a message."""
    page = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
    table = page.split("<!-- table -->")[1]
    rows = dict(re.findall(r"^\| \w+: ([^|]+) \| (.*) \|$", table, re.MULTILINE))
    assert list(rows) == [each.name for each in LIBRARIES]
    messages = re.findall(r"^(\d+)\. ", page.split("<!-- reasons -->")[1], re.MULTILINE)
    for row in rows.values():
        for word in re.split(r" \| |; ", re.sub(r"(32-true|bf16-mixed|bf16-true): ", "", row)):
            found = re.fullmatch(r"equal|–|(?:refused|warned) \[(\d+)\]", word)
            assert found is not None, word
            assert found[1] is None or found[1] in messages
