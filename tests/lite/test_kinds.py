"""Raw loops compute the numbers of one process under every strategy, or are refused, as the docs say."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from kind_cells import STRATEGIES, Kind, kinds, run_cell
from paths import DOCS

CELLS = [(kind, variant) for kind in kinds() for variant in kind.variants]
IDS = [f"{kind.name} {variant}".strip() for kind, variant in CELLS]


def drawing() -> ModuleType:
    """Return the script that draws the page."""
    spec = importlib.util.spec_from_file_location("draw_kinds", DOCS / "draw_kinds.py")
    assert spec is not None
    assert spec.loader is not None
    path = list(sys.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def rows() -> dict[str, list[str]]:
    """Return the cells of the page's table by script and variant."""
    found = {}
    for line in (DOCS / "same-numbers.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            first, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[first.replace("`", "")] = cells
    return found


def test_the_page_has_a_row_for_every_script() -> None:
    """Every script is in the table, and no cell of it is wrong."""
    found = rows()
    assert list(found) == IDS, "type: python docs/draw_kinds.py"
    words = {word for cells in found.values() for word in cells}
    assert words <= {"right", "right, warned", "warned", "refused", "–"}


@pytest.mark.ranks
@pytest.mark.kinds
@pytest.mark.parametrize(("kind", "variant"), CELLS, ids=IDS)
def test_every_cell_is_what_the_page_says(kind: Kind, variant: str) -> None:
    """Under each strategy the script is correct or refused, as in the table."""
    word = drawing().word
    said = dict(zip(STRATEGIES, rows()[f"{kind.name} {variant}".strip()], strict=True))
    outcomes = {strategy: run_cell(kind, variant, strategy) for strategy in kind.under(variant)}
    found = {strategy: word(outcomes.get(strategy)) for strategy in STRATEGIES}
    assert found == said, {
        strategy: each.text for strategy, each in outcomes.items() if found[strategy] != said[strategy]
    }
