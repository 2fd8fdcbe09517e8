"""The machine: versions, names, memory that processes share, room for temporary files."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from plugframe import __version__
from plugframe._compat import metadata
from plugframe.core.registry.entry_points import OWN_DISTRIBUTION
from plugframe.tools.diagnosis.finding import Finding

AREA = "machine"
_SHARED = Path("/dev/shm")
#: Below this, workers of a loader that hand over large batches fail with a bus error.
_ENOUGH_SHARED_BYTES = 512 * 2**20
_ENOUGH_TEMPORARY_BYTES = 256 * 2**20


def look() -> Iterator[Finding]:
    """Look at what every job needs of the machine."""
    yield Finding(AREA, "plugframe", "ok", __version__)
    yield Finding(AREA, "python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield from _requirements()
    yield _host_name()
    yield from _room()


def _requirements() -> Iterator[Finding]:
    """Compare what plugframe requires with what is installed."""
    try:
        requirements = metadata.requires(OWN_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            AREA, "metadata", "error", "plugframe is not installed, only importable: type 'pip install -e .'."
        )
        return
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement.replace(" ", ""))
        if match is None:
            continue  # an extra, or for other versions of Python
        name, least = match.groups()
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(AREA, name, "error", f"not installed, {least} or newer is needed: type 'pip install {name}'.")
            continue
        enough = _numbers(found) >= _numbers(least)
        text = found if enough else f"{found}, {least} or newer is needed: type 'pip install --upgrade {name}'."
        yield Finding(AREA, name, "ok" if enough else "error", text)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        # Backends look this name up to choose the address they listen on.
        why = error.strerror or error
        text = f"{name} has no address ({why}): add it to /etc/hosts, or jobs of several ranks may hang."
        return Finding(AREA, "host name", "warning", text)
    return Finding(AREA, "host name", "ok", f"{name} is {address}")


def _room() -> Iterator[Finding]:
    places = [
        ("temporary files", Path(tempfile.gettempdir()), _ENOUGH_TEMPORARY_BYTES, "set TMPDIR to another folder.")
    ]
    if _SHARED.is_dir():
        hint = "loader workers hand over batches in it; give the container more (docker run --shm-size=8g)."
        places.append(("shared memory", _SHARED, _ENOUGH_SHARED_BYTES, hint))
    for name, folder, enough, hint in places:
        free = shutil.disk_usage(folder).free
        text = f"{folder} has {free / 2**20:,.0f} MB free"
        if not os.access(folder, os.W_OK):
            yield Finding(AREA, name, "error", f"{folder} cannot be written to: {hint}")
        elif free < enough:
            yield Finding(AREA, name, "warning", f"{text}: {hint}")
        else:
            yield Finding(AREA, name, "ok", text)
