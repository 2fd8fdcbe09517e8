"""Write what was measured into a page: a table and a plot for each comparison, and the lines that were fitted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

#: The part of the page between these lines is written anew.
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

_BAR_PX, _GAP_PX, _LABEL_PX, _PLOT_PX, _VALUE_PX = 18, 8, 220, 400, 90
_COLORS = {"by hand": "#8c8c8c", "plugframe": "#3b6fb6"}
_OTHER = "#c9c9c9"


def write(page: Path, results: Mapping[str, Any]) -> None:
    """Write tables, plots and lines into `page`, and the plots beside it, in a folder of its name."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [BEGIN, *_about(results)]
    for name, found in results["benchmarks"].items():
        state = "" if found["quiet"] else " (the machine was not quiet)"
        parts += [f"### `{name}`{state}", ""]
        for table in found["tables"]:
            if "line" in table:
                parts += [f"Fitted, {table['line']}: {table['text']}.", ""]
                continue
            plot = folder / f"{_slug(name, table['title'])}.svg"
            plot.write_text(svg(table), encoding="utf-8")
            parts += [f"**{table['title']}**", "", *markdown(table), ""]
            parts += [f"![{table['title']}]({folder.name}/{plot.name})", ""]
    parts.append(END)
    before = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    text = "\n".join(parts)
    if BEGIN in before:
        head, tail = before.split(BEGIN)[0], before.split(END)[-1]
        page.write_text(head + text + tail, encoding="utf-8")
    else:
        page.write_text(f"{before.rstrip()}\n\n## Measured by `python -m benchmarks`\n\n{text}\n", encoding="utf-8")


def _about(results: Mapping[str, Any]) -> list[str]:
    machines = {
        table["machine"] for found in results["benchmarks"].values() for table in found["tables"] if "machine" in table
    }
    form = "short" if results["short"] else "long"
    return [f"The {form} form, on: {'; '.join(sorted(machines))}.", ""]


def markdown(table: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table: median, spread and ratio to the base."""
    unit, base = table["unit"], table["base"]
    lines = [f"| {unit} | median | min … max | ratio to {base}, per round |", "| --- | --- | --- | --- |"]
    for name, row in table["summary"].items():
        lines.append(f"| {name} | {row['median']:.4g} | {row['min']:.4g} … {row['max']:.4g} | {row['ratio']:.3f} |")
    return lines


def svg(table: Mapping[str, Any]) -> str:
    """Return a plot: a bar for the median of each candidate, a line from the least to the most."""
    rows: Sequence[tuple[str, Mapping[str, float]]] = list(table["summary"].items())
    # An outlier must not press all bars together: what is beyond three times the largest median is cut off.
    most = min(max(row["max"] for _, row in rows), 3 * max(row["median"] for _, row in rows)) or 1.0
    height = len(rows) * (_BAR_PX + _GAP_PX) + _GAP_PX
    width = _LABEL_PX + _PLOT_PX + _VALUE_PX
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(table["title"])}</title>'
    ]
    for number, (name, row) in enumerate(rows):
        top = _GAP_PX + number * (_BAR_PX + _GAP_PX)
        middle = top + _BAR_PX / 2

        def at(value: float) -> float:
            return _LABEL_PX + _PLOT_PX * min(value / most, 1.0)

        lines += [
            f'<text x="{_LABEL_PX - 8}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LABEL_PX}" y="{top}" width="{at(row["median"]) - _LABEL_PX:.1f}" height="{_BAR_PX}" '
            f'fill="{_COLORS.get(name, _OTHER)}"/>',
            f'<line x1="{at(row["min"]):.1f}" x2="{at(row["max"]):.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>',
            f'<text x="{_LABEL_PX + _PLOT_PX + 8}" y="{middle + 4}">{row["median"]:.4g} {escape(table["unit"])}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _slug(name: str, title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {title}".lower()).strip("-")
