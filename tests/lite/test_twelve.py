"""Scripts of the kinds that people publish, converted, compute in every setting the numbers of plain torch."""

from __future__ import annotations

import re

import pytest

from paths import DOCS
from twelve_cells import FOLDER, SETTINGS, converted, num_added, run_all, scripts


def rows() -> dict[str, list[str]]:
    """Return the cells of the page's table by script."""
    found = {}
    for line in (DOCS / "twelve-scripts.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            first, _, lines, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[first.strip("`")] = [lines, *cells]
    return found


def test_the_page_has_every_script() -> None:
    """Each has a row with its number of lines, and every cell is right or refused."""
    found = rows()
    drawn = {path.stem: str(num_added(path)) for path in scripts()}
    assert {name: cells[0] for name, cells in found.items()} == drawn, "type: python docs/draw_twelve.py"
    assert {word for _, *cells in found.values() for word in cells} <= {"right", "refused"}


def test_the_converted_form() -> None:
    """Lines are left out or added in place, and line numbers stay."""
    source = "a = 1  # -\nif a:\n    b()\n    # + c()\n"
    assert converted(source) == "\nif a:\n    b()\n    c()\n"
    assert all(not re.search(r"# [-+]", converted(path.read_text(encoding="utf-8"))) for path in scripts())


@pytest.mark.ranks
def test_two_models_and_batch_normalisation() -> None:
    """A GAN that clears gradients between a forward and its backward is right where parameters are sharded."""
    cells = run_all([FOLDER / "dcgan.py"], ["ddp", "fsdp"])
    assert {setting: outcome.word for (_, setting), outcome in cells.items()} == {"ddp": "right", "fsdp": "right"}, (
        cells
    )


@pytest.mark.slow
@pytest.mark.ranks
def test_every_cell_is_what_the_page_says() -> None:
    """Each script is right or refused in each setting, as in the table."""
    cells = run_all(scripts(), list(SETTINGS))
    for name, (_, *words) in rows().items():
        for setting, said in zip(SETTINGS, words, strict=True):
            outcome = cells[name, setting]
            # A CPU that computes more in float16 than another may be right where that one refuses.
            assert outcome.word in {said, "right"}, f"{name} {setting}: {outcome.text}"
