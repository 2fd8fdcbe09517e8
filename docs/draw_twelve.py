"""Run the scripts of tests/twelve in six settings and update the table: python docs/draw_twelve.py [NAME…]"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from twelve_cells import SETTINGS, Outcome, num_added, run_all, scripts, title  # noqa: E402

TARGET = Path(__file__).parent / "twelve-scripts.md"
_TABLE, _REASONS = "<!-- table -->", "<!-- reasons -->"


def word(outcome: Outcome) -> str:
    """Return the text of a cell."""
    return outcome.word


def table(cells: dict[tuple[str, str], Outcome]) -> str:
    """Return the table, one row per script."""
    lines = ["| script | what it does | lines | " + " | ".join(SETTINGS) + " |", "| --- " * (len(SETTINGS) + 3) + "|"]
    for path in scripts():
        words = " | ".join(word(cells[path.stem, setting]) for setting in SETTINGS)
        lines.append(f"| `{path.stem}` | {title(path)} | {num_added(path)} | {words} |")
    return "\n".join(lines)


def reasons(cells: dict[tuple[str, str], Outcome]) -> str:
    """Return the messages of refused cells, each once."""
    found: dict[str, list[str]] = {}
    for (name, setting), outcome in cells.items():
        if outcome.word == "refused":
            found.setdefault(" ".join(outcome.text.split()), []).append(f"`{name}`, {setting}")
    return "\n".join(f"- {'; '.join(where)}: {text}" for text, where in sorted(found.items()))


def main() -> None:
    """Run the named scripts, or all; update the page only after running all."""
    wanted = sys.argv[1:]
    cells = run_all([path for path in scripts() if not wanted or path.stem in wanted], list(SETTINGS))
    for (name, setting), outcome in cells.items():
        print(f"{name} {setting}: {word(outcome)}", *dict.fromkeys(outcome.warned), sep="\n    ")
        if outcome.word != "right":
            print(outcome.text)
    if not wanted:
        head, _, rest = TARGET.read_text(encoding="utf-8").partition(_TABLE)
        middle, _, tail = rest.partition(_TABLE)[2].partition(_REASONS)
        end = tail.partition(_REASONS)[2]
        TARGET.write_text(
            f"{head}{_TABLE}\n\n{table(cells)}\n\n{_TABLE}{middle}{_REASONS}\n\n{reasons(cells)}\n\n{_REASONS}{end}",
            encoding="utf-8",
        )
    sys.exit(any(outcome.word in ("WRONG", "failed") for outcome in cells.values()))


if __name__ == "__main__":
    main()
