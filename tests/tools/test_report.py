"""``plugframe report``: the page holds what the runs recorded, and shows it in a browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from browser import CHROMIUM, document
from plugframe import Lite
from plugframe.tools.report import command
from plugframe.tools.report.runs import MOST_POINTS, thinned


def record(folder: Path) -> None:
    """Record a run that fails and is resumed, and one that is not; with checkpoints of the first."""

    def job(first: int, last: int, lr: float, fails: bool = False) -> None:
        with Lite(accelerator="cpu", devices=1, loggers="csv") as lite:
            manager = lite.checkpoints("ckpts")
            state: dict[str, Any] = {"note": 1}
            if first:
                manager.resume(state)
            lite.log_hyperparams({"lr": lr, "note": "</script><b>bold</b>"})
            for step in range(first, last):
                loss = math.nan if step == 3 else 1 / (step + lr)
                lite.log_dict({"loss": loss, "samples_per_s": 100.0, "peak_memory_gb": 0.5}, step=step)
                if step == 4 and lr == 0.1:
                    manager.save(step, state, {"loss": 0.25})
            if fails:
                raise ValueError("the <i>boiler</i> has burst")

    with pytest.raises(ValueError, match="boiler"):
        job(0, 6, 0.1, fails=True)
    job(5, 9, 0.1)
    with pytest.raises(ValueError, match="boiler"):
        job(0, 2, 0.2, fails=True)


def report(*arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments))


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    record(tmp_path)
    return tmp_path


def test_the_page_holds_what_was_recorded(recorded: Path) -> None:
    """Metrics, hyperparameters, status, restarts and checkpoints, in a page that loads nothing."""
    done = report("runs", "--checkpoints=ckpts", "--output=all.html")
    assert (done.exit_code, done.output) == (0, "all.html: 2 runs, 3 metrics\n")
    page = (recorded / "all.html").read_text()
    assert not re.findall(r"""(?:src|href)=|@import|url\(|fetch\(|XMLHttp""", page)
    assert not [url for url in re.findall(r"https?://[^\"'\s]*", page) if url != "http://www.w3.org/2000/svg"]
    data = data_of(page)
    first, second = data["runs"]
    assert (first["name"], first["status"], first["rows"]) == ("version_0", "finished", 9)
    assert (first["num_restarts"], first["restarts"], first["seconds"] > 0) == (1, [5], True)
    assert (second["status"], second["error"]) == ("failed", "ValueError: the <i>boiler</i> has burst")
    loss = first["metrics"]["loss"]
    assert (loss["steps"], loss["values"][3], loss["values"][4]) == ([*range(9)], "nan", 1 / 4.1)
    assert (loss["count"], loss["last"], loss["min"], loss["max"]) == (9, 1 / 8.1, 1 / 8.1, 10.0)
    assert second["hyperparams"] == {"lr": "0.2", "note": "</script><b>bold</b>"}
    (checkpoint,) = first["checkpoints"]
    assert (checkpoint["name"], checkpoint["step"]) == ("step-000000000004.ckpt", 4)
    assert (checkpoint["metrics"], checkpoint["size_bytes"] > 0) == ({"loss": 0.25}, True)
    assert [(group["title"], group["metrics"]) for group in data["groups"]] == [
        ("Metrics", ["loss"]),
        ("Throughput and memory", ["samples_per_s", "peak_memory_gb"]),
    ]


def test_mistakes_are_answered_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path without a run, a table that is none, a folder without checkpoints, an output that cannot be written."""
    monkeypatch.chdir(tmp_path)
    for name, table in {"good": "step,loss\n0,1.0\n1,0.5\n", "bad": "step,loss\n0,much\n", "cut": "a,b\n1,2\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(table)
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (("nowhere",), "There is no run 'nowhere'"),
        (("empty",), "'empty' holds no run, nor do its folders. Runs of these loggers can be drawn: 'csv'"),
        (("bad",), "metrics.csv cannot be read: could not convert string to float: 'much'"),
        (("cut",), "it has no column 'step'"),
        (("good", "--checkpoints=empty"), "--checkpoints=empty holds no checkpoint"),
        (("good", "--output=empty"), "--output=empty is a folder"),
        (("good", "--output=nowhere/x.html"), "cannot be written: No such file"),
        (("good", "--checkpoints=a", "--checkpoints=b"), "--checkpoints is given 2 times for 1 runs"),
    ]:
        done = report(*arguments)
        assert message in str(done.exception), (arguments, done.output)
    assert report("good/metrics.csv").exit_code == 0
    assert data_of((tmp_path / "report.html").read_text())["runs"][0]["metrics"]["loss"]["values"] == [1.0, 0.5]


def test_a_table_that_is_being_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row at the end may be cut; one that goes back, after a resume, has its place."""
    monkeypatch.chdir(tmp_path)
    Path("metrics.csv").write_text("step,loss,other\n5,1.0,\n3,2.0,inf\n7,0.")
    assert report(".").exit_code == 0
    metrics = data_of(Path("report.html").read_text())["runs"][0]["metrics"]
    assert (metrics["loss"]["steps"], metrics["other"]["values"]) == ([3, 5], ["inf"])


def test_many_points_are_thinned_and_keep_their_extremes() -> None:
    """A peak of one step stays visible."""
    steps = list(range(100_000))
    values = [1e9 if step == 54_321 else math.sin(step) for step in steps]
    few, kept = thinned(steps, values)
    assert len(few) <= MOST_POINTS
    assert (few[kept.index(1e9)], few == sorted(few), min(kept) < -0.999) == (54_321, True, True)


ACTS = """
<script>
const out = {};
try {
const count = (what) => document.querySelectorAll(what).length;
out.plots = [...document.querySelectorAll(".plot")].map((p) => p.dataset.metric);
out.paths = count(".plot path.series");
out.restarts = count(".plot[data-metric=loss] .restart");
out.checkpoints = count(".plot[data-metric=loss] .checkpoint");
out.gap = (document.querySelector(".plot[data-metric=loss] path.series").getAttribute("d").match(/M/g) || []).length;
const plot = plots[0], box = plot.svg.getBoundingClientRect();
const at = (x) => ({ clientX: box.left + x, clientY: box.top + 50 });
const fire = (kind, x) => plot.svg.dispatchEvent(new PointerEvent(kind, at(x)));
fire("pointermove", box.width - 12);
out.tip = plot.tip.textContent;
fire("pointerdown", box.width * 0.3); fire("pointerup", box.width * 0.6);
out.zoomed = plot.x0 > 0 && plot.x1 < 8;
plot.svg.dispatchEvent(new MouseEvent("dblclick"));
out.reset = [plot.x0, plot.x1];
const log = document.getElementById("log"); log.click();
out.log = plot.log;
const smooth = document.getElementById("smoothing"); smooth.value = 0.9; smooth.dispatchEvent(new Event("input"));
out.smoothed = count(".plot[data-metric=loss] path.raw");
document.querySelectorAll(".run")[1].click();
out.left = count(".plot[data-metric=loss] path.raw");
out.bold = count("b") + count("i");
out.text = document.body.innerText;
} catch (error) { out.error = error.stack; }
document.body.replaceChildren(document.createTextNode("RESULT" + JSON.stringify(out) + "END"));
</script>
"""


@pytest.mark.ranks  # it starts a browser
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
def test_a_browser_draws_it(recorded: Path) -> None:
    """Lines with gaps at NaN, marks, what a pointer shows, zoom, scale, smoothing and hiding work in Chromium."""
    assert report("runs", "--checkpoints=ckpts").exit_code == 0
    page = (recorded / "report.html").read_text()
    (recorded / "acts.html").write_text(page.replace("</body>", ACTS + "</body>"))
    shown = document(f"file://{recorded}/acts.html", recorded / "profile")
    (text,) = re.findall(r"RESULT(.*)END", shown, re.DOTALL)
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert "error" not in found, found["error"]
    assert found["plots"] == ["loss", "samples_per_s", "peak_memory_gb"]
    assert (found["paths"], found["restarts"], found["checkpoints"], found["gap"]) == (6, 1, 1, 2)
    assert found["tip"].startswith("step 8version_0: 0.12346")
    assert (found["zoomed"], found["reset"], found["log"]) == (True, [0, 8], True)
    assert (found["smoothed"], found["left"], found["bold"]) == (2, 1, 0)
    for part in (
        "ValueError: the <i>boiler</i> has burst",
        "</script><b>bold</b>",
        "step-000000000004.ckpt",
        "finished",
    ):
        assert part in found["text"]
