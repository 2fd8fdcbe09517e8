"""One progress bar for all ranks; actions, messages and warnings of rank 0."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch

from plugframe import Lite, RankZeroFilter, SettingError, rank_zero_info, rank_zero_only, rank_zero_warn
from plugframe.lite import progress
from plugframe.lite.progress import Track


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(file: io.StringIO, *, shown: bool = True, **values: Any) -> str:
    bar = Track(range(4), "epoch 3", values, shown=shown, file=file)
    assert len(bar) == 4
    seen = []
    for item in bar:
        seen.append(item)
        bar.update(loss=torch.tensor(item / 2, requires_grad=True))
    assert seen == [0, 1, 2, 3]
    return file.getvalue()


def test_a_bar_is_drawn_over_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label, bar, number, rate, value and time left, in one line that ends with the loop."""
    monkeypatch.setattr(progress, "_DRAW_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    drawn = run(Terminal()).split("\r")
    assert len(drawn) == 6
    assert re.match(r"epoch 3  ━{12}╌{12}  2/4  \S+/s  loss 0.5  0:00 left", drawn[2])
    assert re.match(r"epoch 3  ━{24}  4/4  \S+/s  loss 1.5  in 0:00.*\n", drawn[-1])


def test_lines_are_printed_without_a_terminal() -> None:
    """One line at the end of a short loop, none on other ranks."""
    assert re.fullmatch(r"epoch 3  4/4  \S+/s  loss 1.5  in 0:00\n", run(io.StringIO()))
    assert run(io.StringIO(), shown=False) == ""


def test_a_notebook_has_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell's output is replaced at each drawing: a bar in HTML, and the text; nothing is printed."""
    display = pytest.importorskip("IPython.display")
    shown: list[str] = []

    class Output:
        def update(self, bar: Any) -> None:
            shown.append(bar._repr_html_())

    class Stream(io.StringIO):
        __module__ = "ipykernel.iostream"

    def displayed(bar: Any, *, display_id: bool) -> Output:
        assert display_id
        shown.append(bar._repr_html_())
        return Output()

    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(display, "display", displayed)
    monkeypatch.setattr(progress, "_DRAW_S", 0.0)
    assert run(Stream()) == ""
    assert len(shown) == 5
    assert re.match(r'<div><progress value="2" max="4"></progress> <code>epoch 3  2/4  \S+/s  loss 0.5', shown[1])
    assert "in 0:00" in shown[-1]


def test_values_are_read_when_drawn_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function is called for the drawings, and what is no number is refused."""
    calls: list[int] = []
    run(io.StringIO(), extra=lambda: calls.append(1) or 2.0)
    assert len(calls) == 1
    assert "soon -" in run(io.StringIO(), soon=lambda: later)  # type: ignore[name-defined]  # noqa: F821
    with pytest.raises(SettingError, match=r"track\(loss=…\) shows numbers"):
        list(Track([1], "", {"loss": "text"}, shown=True, file=io.StringIO()))


def test_lite_tracks_and_prints_beside_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """``lite.track`` takes any iterable, and an early end is shown."""
    with Lite(accelerator="cpu", devices=1) as lite:
        for item in lite.track(iter("abc"), loss=1):
            if item == "b":
                break
        lite.print("done")
    shown = capsys.readouterr()
    assert re.search(r"^2  \S+/s  loss 1  in 0:00$", shown.err, flags=re.M)
    assert shown.out == "done\n"


def test_only_rank_zero_runs_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks return None or a default; the rank is that of the environment, or the one that was set."""

    @rank_zero_only
    def number() -> int:
        return 3

    other = rank_zero_only(lambda: 3, default=4)
    assert (number(), other()) == (3, 3)
    monkeypatch.setenv("RANK", "1")
    assert rank_zero_only.rank == 1
    assert (number(), other()) == (None, 4)
    monkeypatch.setattr(type(rank_zero_only), "_rank", 0)
    assert number() == 3


def test_messages_and_warnings_of_rank_zero(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages go to the caller's logger; a warning is shown once; a filter passes severe records of other ranks."""
    caplog.set_level("INFO")
    caplog.handler.addFilter(RankZeroFilter())
    rank_zero_info("step %d", 3)
    assert caplog.records[-1].name == __name__
    assert caplog.records[-1].funcName == "test_messages_and_warnings_of_rank_zero"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("one", "one", "two"):
            rank_zero_warn(text)
        monkeypatch.setenv("RANK", "1")
        rank_zero_warn("three")
    assert [str(each.message) for each in caught] == ["one", "two"]
    assert {each.filename for each in caught} == {__file__}
    rank_zero_info("unseen")
    logging.getLogger("x").info("unseen")
    logging.getLogger("x").warning("seen")
    assert [record.message for record in caplog.records] == ["step 3", "seen"]
