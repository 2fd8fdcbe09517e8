"""The minimal core stays minimal: its size, what it imports, and what lies at the top of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

PACKAGE = ROOT / "plugframe"
CORE = PACKAGE / "core"
MOST_LINES = 2_500
MOST_MODULES = 4
#: What the core may import of the project, besides itself.
ALLOWED = ("plugframe.core", "plugframe.hooks", "plugframe.errors", "plugframe._compat")


def imported(path: Path) -> Iterator[str]:
    """Yield every module of the project that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            # ``from plugframe import _compat`` may import a module of that name.
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "plugframe" else []
            yield from names or [str(node.module)]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_core_has_at_most_2500_lines() -> None:
    """Every line of every module counts: code, docstrings, comments and blank lines."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in CORE.rglob("*.py")}
    assert sum(lines.values()) <= MOST_LINES, f"{sum(lines.values())} lines: move out what the core can do without"


def test_the_core_imports_the_contract_and_itself_alone() -> None:
    """Hooks and errors are all that it stands on; whatever else it needs reaches it through hooks."""
    for path in sorted(CORE.rglob("*.py")):
        module = path.relative_to(CORE).as_posix()
        found = {name for name in imported(path) if name.partition(".")[0] in ("plugframe", "plugframe_builtins")}
        others = {name for name in found if not any(f"{name}.".startswith(f"{each}.") for each in ALLOWED)}
        # Where the package itself lies, to tell its distribution from another that has its name.
        others -= {"plugframe"} if module == "registry/entry_points.py" else set()
        assert not others, f"core/{module} imports {', '.join(sorted(others))}"


def test_packages_of_the_core_have_no_cycle() -> None:
    """config → registry → planning → runtime: each imports only what stands before it."""
    order = ("config", "registry", "planning", "runtime")
    for path in sorted(CORE.rglob("*.py")):
        package = path.relative_to(CORE).parts[0]
        later = order[order.index(package) + 1 :] if package in order else order
        for name in imported(path):
            assert name.split(".")[2:3] not in [[each] for each in later] or not name.startswith("plugframe.core."), (
                f"{path.relative_to(CORE)} imports {name}"
            )


def test_little_lies_at_the_top_of_the_package() -> None:
    """A module that is not in a package of its kind has to be one that everything stands on."""
    modules = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(modules) <= MOST_MODULES, modules


def test_modules_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by name: of two that share one, the ranks of the second would import the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
