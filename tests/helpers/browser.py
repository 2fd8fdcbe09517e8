"""Chromium, which shows pages to the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def document(address: str, profile: Path, *options: str) -> str:
    """Return the document of a page as Chromium leaves it, after its scripts have run."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", *options, "--dump-dom"]
    # It puts a socket into the temporary folder, whose path may not be longer than that of a socket: not a test's own.
    with tempfile.TemporaryDirectory(prefix="browser-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [*command, f"--user-data-dir={profile}", address],
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return done.stdout
