"""Train models of libraries under every strategy and update the table: python docs/draw_libraries.py [NAME…]"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from library_cells import PRECISIONS, STRATEGIES, Cell, Outcome, cells_of, outcomes, write_references  # noqa: E402
from library_models import LIBRARIES, Library  # noqa: E402

TARGET = Path(__file__).parent / "libraries.md"
_TABLE, _REASONS = "<!-- table -->", "<!-- reasons -->"
#: Outcomes whose message is listed.
_TOLD = ("refused", "warned")


def drawn(each: Library, folder: Path, only: list[str]) -> dict[Cell, Outcome]:
    """Run the cells of a row, and print each outcome."""
    began = time.monotonic()
    write_references(each, folder)
    cells = [cell for cell in cells_of(each) if not only or cell.strategy in only]
    found = outcomes(cells, folder)
    for cell, outcome in found.items():
        print(f"{cell.name} {cell.strategy} {cell.precision}: {outcome.word} {outcome.text}", flush=True)
        for text in outcome.warned:
            print(f"    warned: {text}", flush=True)
    print(f"{each.name}: {time.monotonic() - began:.0f} s", flush=True)
    return found


def _messages(found: Mapping[Cell, Outcome]) -> dict[str, int]:
    texts = dict.fromkeys(" ".join(o.text.split()) for o in found.values() if o.word in _TOLD)
    return {text: number for number, text in enumerate(texts, 1)}


def _word(outcome: Outcome, numbers: Mapping[str, int]) -> str:
    if outcome.word not in _TOLD:
        return outcome.word
    return f"{outcome.word} [{numbers[' '.join(outcome.text.split())]}]"


def table(found: Mapping[Cell, Outcome]) -> str:
    """Return the table: one row per model, one column per strategy, a cell in one word if its precisions agree."""
    numbers = _messages(found)
    lines = ["| model | " + " | ".join(STRATEGIES) + " |", "| --- " * (len(STRATEGIES) + 1) + "|"]
    for each in LIBRARIES:
        row = []
        for strategy in STRATEGIES:
            cells = [Cell(each.name, strategy, precision) for precision in PRECISIONS]
            words = [_word(found[cell], numbers) if cell in found else "–" for cell in cells]
            apart = map(": ".join, zip(PRECISIONS, words, strict=True))
            row.append(words[0] if len(set(words)) == 1 else "; ".join(apart))
        lines.append(f"| {each.package}: {each.name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def reasons(found: Mapping[Cell, Outcome]) -> str:
    """Return the messages of refused and warned cells, each once."""
    return "\n".join(f"{number}. {text}" for text, number in _messages(found).items())


def main() -> None:
    """Run the named models (`Llama`, or `Llama:fsdp,ddp`), or all; update the page only after running all."""
    wanted = {name: only.split(",") if only else [] for name, _, only in (word.partition(":") for word in sys.argv[1:])}
    found: dict[Cell, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for each in LIBRARIES:
            if not wanted or each.name in wanted:
                found.update(drawn(each, Path(folder), wanted.get(each.name, [])))
    if not wanted:
        head, _, rest = TARGET.read_text(encoding="utf-8").partition(_TABLE)
        middle = rest.partition(_TABLE)[2].partition(_REASONS)[0]
        tail = rest.partition(_REASONS)[2].partition(_REASONS)[2]
        text = f"{head}{_TABLE}\n\n{table(found)}\n\n{_TABLE}{middle}{_REASONS}\n\n{reasons(found)}\n\n{_REASONS}{tail}"
        TARGET.write_text(text, encoding="utf-8")
    sys.exit(any(outcome.word not in ("equal", *_TOLD) for outcome in found.values()))


if __name__ == "__main__":
    main()
