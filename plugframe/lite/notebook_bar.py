"""The progress bar of a notebook: one output of the cell, which is replaced."""

from __future__ import annotations

import html
import importlib
import sys
from typing import Any, TextIO


class NotebookBar:
    """What is displayed: HTML where it can be, else the text."""

    def __init__(self) -> None:
        self._text, self._number, self._total = "", 0, 0
        self._output: Any = None

    def show(self, text: str, number: int, total: int | None) -> None:
        """Display the state of the loop, in place of the one before.

        Args:
            text: shown behind the bar.
            number: of items so far.
            total: of all items, None if it is not known.
        """
        self._text, self._number, self._total = text, number, total or 0
        if self._output is None:
            self._output = importlib.import_module("IPython.display").display(self, display_id=True)
        else:
            self._output.update(self)

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self._number}" max="{self._total}"></progress> ' if self._total else ""
        return f"<div>{bar}<code>{html.escape(self._text)}</code></div>"

    def __repr__(self) -> str:
        return self._text


def in_notebook(file: TextIO) -> bool:
    """Return whether `file` is the stream of a notebook's kernel."""
    return "ipykernel" in sys.modules and type(file).__module__.startswith("ipykernel")
