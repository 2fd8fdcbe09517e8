"""Run the scripts of tests/kinds under every strategy and update the table: python docs/draw_kinds.py [NAME…]"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from kind_cells import STRATEGIES, Kind, Outcome, kinds, run_cell  # noqa: E402

TARGET = Path(__file__).parent / "same-numbers.md"
_TABLE, _REASONS = "<!-- table -->", "<!-- reasons -->"

Row = dict[str, Outcome]


def table(rows: dict[tuple[str, str], Row], titles: dict[str, str]) -> str:
    """Return the table, with one row per script and variant and one column per strategy."""
    lines = ["| script | what it does | " + " | ".join(STRATEGIES) + " |", "| --- " * (len(STRATEGIES) + 2) + "|"]
    for (name, variant), row in rows.items():
        cells = [word(row.get(strategy)) for strategy in STRATEGIES]
        label = f"`{name}`" + (f" {variant}" if variant else "")
        lines.append(f"| {label} | {titles[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def word(outcome: Outcome | None) -> str:
    """Return the text of a cell."""
    if outcome is None:
        return "–"
    return outcome.word + (", warned" if outcome.warned and outcome.word == "right" else "")


def reasons(rows: dict[tuple[str, str], Row]) -> str:
    """Return the messages of refused cells, each once, with its cells."""
    found: dict[str, list[str]] = {}
    for (name, variant), row in rows.items():
        for strategy, outcome in row.items():
            if outcome.word == "refused":
                found.setdefault(" ".join(outcome.text.split()), []).append(
                    f"{f'{name} {variant}'.strip()}: {strategy}"
                )
    return "\n".join(f"- {text}\n  ({'; '.join(where)})" for text, where in sorted(found.items()))


def drawn(kind: Kind, variant: str) -> Row:
    """Run one script and variant under its strategies, and print each result."""
    row = {}
    for strategy in kind.under(variant):
        row[strategy] = outcome = run_cell(kind, variant, strategy)
        print(f"{kind.name} {variant} {strategy}: {word(outcome)}", flush=True)
        if outcome.word in ("WRONG", "failed"):
            print(outcome.text, flush=True)
    return row


def main() -> None:
    """Run the named scripts, or all of them; update the page only after running all."""
    wanted = sys.argv[1:]
    chosen = [kind for kind in kinds() if not wanted or kind.name in wanted]
    rows = {(kind.name, variant): drawn(kind, variant) for kind in chosen for variant in kind.variants}
    if not wanted:
        page = TARGET.read_text(encoding="utf-8")
        head, _, rest = page.partition(_TABLE)
        _, _, tail = rest.partition(_TABLE)
        middle = tail.partition(_REASONS)[0]
        text = f"{head}{_TABLE}\n\n{table(rows, {kind.name: kind.title for kind in chosen})}\n\n{_TABLE}{middle}"
        after = tail.partition(_REASONS)[2].partition(_REASONS)[2]
        TARGET.write_text(f"{text}{_REASONS}\n\n{reasons(rows)}\n\n{_REASONS}{after}", encoding="utf-8")
    bad = sum(outcome.word in ("WRONG", "failed") for row in rows.values() for outcome in row.values())
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
