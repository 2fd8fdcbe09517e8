"""A release has one version, its changes are headed with it, and what it installs is listed."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sysconfig

import plugframe
from paths import ROOT


def test_the_version_is_in_one_place() -> None:
    """Metadata and the newest heading of the changelog have the version of ``plugframe.__version__``."""
    assert importlib.metadata.version("plugframe") == plugframe.__version__, "type: pip install -e . --no-deps"
    headings = re.findall(r"^## \[([^\]]+)\](?: - (.*))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    released = [(version, date) for version, date in headings if version != "Unreleased"]
    assert released[0][0] == plugframe.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", released[0][1])
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)


def test_a_release_is_ten_lines() -> None:
    """Each is one step."""
    lines = (ROOT / "RELEASE.md").read_text(encoding="utf-8").splitlines()
    assert [line.partition(".")[0] for line in lines[2:]] == [str(number) for number in range(1, 11)]


def test_the_bill_of_materials_lists_what_plugframe_needs() -> None:
    """Every requirement is a component with version, licence and address, and none is of another package."""
    script = runpy.run_path(str(ROOT / ".ci" / "sbom"))
    there = script["installed"](sysconfig.get_path("purelib"))
    needs = script["required"](there)
    bill = script["bill"](there, needs)
    parts = {part["name"]: part for part in bill["components"]}
    assert {"torch", "pluggy", "click", "rich", "safetensors", "xxhash", "sympy"} <= set(parts)
    assert not {"plugframe", "pytest", "deepspeed"} & set(parts)
    assert all(part["version"] and part["licenses"] and part["purl"].startswith("pkg:pypi/") for part in parts.values())
    addresses = {part["purl"] for part in [bill["metadata"]["component"], *parts.values()]}
    assert {each["ref"] for each in bill["dependencies"]} == addresses
    assert all(set(each["dependsOn"]) <= addresses for each in bill["dependencies"])
    assert bill == script["bill"](there, needs)
