"""``plugframe doctor``: whether this machine can run jobs, what is wrong, and what to type."""

from __future__ import annotations

from collections.abc import Iterator

import click

from plugframe.cli.requirements import require_torch
from plugframe.cli.shared_options import disabling
from plugframe.core.registry.registry import Registry
from plugframe.tools.diagnosis.finding import Finding

_MARKS = {"ok": "ok", "note": "-", "warning": "warn", "error": "FAIL"}


@click.command("doctor", short_help="Check this machine, every plugin, and a job of two ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option("--quick", is_flag=True, help="Leave out the job of two ranks.")
@disabling
def command(as_json: bool, quick: bool) -> int:
    """Check versions, devices, every installed plugin, and a job of two ranks that computes, saves and loads.

    Every plugin is loaded in a process of its own. The exit code is 1 if anything fails; warnings do not count.

    \b
    Examples:
      plugframe doctor
      plugframe doctor --quick --json
    """
    require_torch("plugframe doctor")
    found: list[Finding] = []
    area = ""
    for finding in _look(quick):
        found.append(finding)
        if as_json:
            continue
        if finding.area != area:
            area = finding.area
            click.echo(f"{area}:")
        click.echo(f"  {_MARKS[finding.status]:<5} {finding.name}: {finding.text}")
    errors = sum(finding.status == "error" for finding in found)
    warnings = sum(finding.status == "warning" for finding in found)
    if as_json:
        _print_json(found, errors, warnings)
    else:
        click.echo(f"{len(found)} looked at: {errors} failed, {warnings} to look at.")
    return int(errors > 0)


def _look(quick: bool) -> Iterator[Finding]:
    from plugframe.tools.diagnosis import machine, plugins, selftest

    yield from machine.look()
    registry = Registry.discover()
    yield from plugins.look(registry)
    if not quick:
        yield from selftest.look(registry)


def _print_json(found: list[Finding], errors: int, warnings: int) -> None:
    import json

    findings = [{"area": f.area, "name": f.name, "status": f.status, "text": f.text, **f.facts} for f in found]
    click.echo(json.dumps({"errors": errors, "warnings": warnings, "findings": findings}, indent=2))
