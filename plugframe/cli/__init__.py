"""The command ``plugframe``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plugframe.cli.commands import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line. Never returns."""
    if sys.argv[1:] == ["list-plugins"]:
        from plugframe.cli.quick_listing import show_listing

        code = show_listing()
        if code is not None:
            sys.exit(code)
    from plugframe.cli.commands import cli

    cli.main(prog_name="plugframe")


def __getattr__(name: str) -> Any:
    # Lazy, because click takes longer than a listing.
    if name != "cli":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from plugframe.cli.commands import cli

    return cli
