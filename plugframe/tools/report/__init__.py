"""``plugframe report``: draw runs into one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from plugframe.cli.shared_options import disabling
from plugframe.errors import SettingError
from plugframe.tools.report.checkpoints import found_in
from plugframe.tools.report.page import page
from plugframe.tools.report.runs import read_runs


@click.command("report", short_help="Draw runs into one HTML page.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path(path_type=Path))
@click.option("-o", "--output", default="report.html", show_default=True, help="The file to write.")
@click.option(
    "--checkpoints",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder of lite.checkpoints(), drawn into the plots; repeatable, one for each run in their order.",
)
@disabling
def command(runs: tuple[Path, ...], output: str, folders: tuple[Path, ...]) -> None:
    """Draw metrics, throughput, memory, checkpoints and restarts of runs of the logger csv into one HTML page.

    A RUN is the folder of a run, such as runs/version_0, or a folder of several. The page loads nothing from elsewhere.

    \b
    Examples:
      plugframe report runs/version_3
      plugframe report runs -o all.html
      plugframe report runs/version_3 --checkpoints ckpts
    """
    found = read_runs(runs)
    if folders and len(folders) not in (1, len(found)):
        raise SettingError(f"--checkpoints is given {len(folders)} times for {len(found)} runs: give one for each run.")
    for run, folder in zip(found, folders, strict=False):
        run.checkpoints = found_in(folder)
    target = Path(output)
    if target.is_dir():
        raise SettingError(f"--output={output} is a folder: name a file, such as {target / 'report.html'}.")
    try:
        target.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise SettingError(f"--output={output} cannot be written: {error.strerror or error}.") from None
    count = f"{len(found)} run{'s' if len(found) > 1 else ''}"
    click.echo(f"{output}: {count}, {len({name for run in found for name in run.metrics})} metrics")
