"""`python -m benchmarks` runs scripts that exist, and keeps their raw numbers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_suite", ROOT / "benchmarks" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_name_is_listed_and_a_wrong_one_is_refused(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Each script exists."""
    assert suite.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(suite.BENCHMARKS)
    assert all((ROOT / "benchmarks" / each.script).is_file() for each in suite.BENCHMARKS.values())
    with pytest.raises(SystemExit):
        suite.main(["nothing"])
    assert "there is no benchmark nothing: choose from startup, " in capsys.readouterr().err


@pytest.mark.ranks
def test_raw_numbers_and_a_failure_are_kept(suite: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With medians and ratios; a script that fails makes the exit code 1."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import rounds; rounds.machine = lambda: 'this one'\n"
        "rounds.keep('title', {'by hand': [1.0, 2.0, 4.0], 'ours': [2.0, 2.0, 2.0]}, unit='s', base='by hand')\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(suite, "BENCHMARKS", {"one": suite.Benchmark("about", str(script))})
    monkeypatch.setattr(suite.time, "sleep", lambda _: None)
    assert suite.main(["--short", "--out", str(tmp_path / "out")]) == 1
    kept = json.loads((tmp_path / "out" / "benchmarks.json").read_text())["benchmarks"]["one"]
    assert kept["exit_code"] == 3
    (table,) = kept["tables"]
    assert table["results"]["by hand"] == [1.0, 2.0, 4.0]
    assert table["summary"]["ours"] == {"median": 2.0, "min": 2.0, "max": 2.0, "ratio": 1.0}


def test_a_page_is_written_anew_between_its_marks(suite: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tables, plots beside the page and fitted lines; what stands around the marks stays."""
    table = {
        "title": "A step",
        "unit": "µs",
        "base": "by hand",
        "machine": "this one",
        "summary": suite.summary({"by hand": [1.0, 2.0, 100.0], "plugframe": [0.5, 1.0, 1.5]}, "by hand"),
    }
    line = {"line": "ranks 1, 2", "text": "over ranks: +1.00 s +0.5000 s each"}
    found = {"short": True, "benchmarks": {"step": {"quiet": False, "tables": [table, line]}}}
    target = tmp_path / "benchmarks.md"
    target.write_text("# Benchmarks\n\nProse.\n")
    for _ in range(2):
        suite.page.write(target, found)
        text = target.read_text()
        assert text.startswith("# Benchmarks\n\nProse.\n")
        assert text.count("**A step**") == 1
    assert "| plugframe | 1 | 0.5 … 1.5 | 0.500 |" in text
    assert "### `step` (the machine was not quiet)" in text
    assert "Fitted, ranks 1, 2: over ranks: +1.00 s +0.5000 s each." in text
    plot = (tmp_path / "benchmarks" / "step-a-step.svg").read_text()
    assert "![A step](benchmarks/step-a-step.svg)" in text
    assert plot.count("<rect") == 2
    monkeypatch.setattr(suite, "_commit", lambda: "abc")
    assert suite.trend(found)["ratios"] == {"step: A step: plugframe": 0.5}
