"""Check every installed plugin, each loaded in its own process."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from plugframe._compat import metadata, tomllib
from plugframe.core.planning.plan import Choice
from plugframe.core.registry.entry_points import Entry, name_and_version, normalize
from plugframe.core.registry.registry import Registry
from plugframe.errors import MissingDependencyError, PlugframeError
from plugframe.tools.diagnosis.finding import Finding, Status
from plugframe.utils.hook_check import check_hooks

AREA = "plugins"
Answer = tuple[Status, str]
#: For one plugin's import and construction; heavy packages take many seconds on a cold disk.
TIMEOUT_S = 60.0


def look(registry: Registry) -> Iterator[Finding]:
    """Load every plugin and yield its status; then yield findings about names and metadata."""
    # Once here instead of in every copy of this process. One that does not import is reported for each plugin.
    with contextlib.suppress(Exception):
        importlib.import_module("torch")
    for entries in _together(registry):
        answers = apart(functools.partial(_load_all, registry, entries), count=len(entries))
        for entry, (status, text) in zip(entries, answers, strict=True):
            origin = "" if entry.builtin else f" ({entry.distribution} {entry.version})"
            facts = {"kind": entry.kind, "plugin": entry.name, "distribution": entry.distribution}
            yield Finding(AREA, f"{entry.kind} {entry.name}{origin}", status, text, facts)
    yield from _clashes(registry)
    yield from _stale(registry)


def _together(registry: Registry) -> list[list[Entry]]:
    """Group the names whose descriptors are in one module: what breaks one of them there breaks all."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in registry.entries():
        groups.setdefault((entry.kind, entry.distribution, entry.value.partition(":")[0]), []).append(entry)
    return list(groups.values())


def _load_all(registry: Registry, entries: Sequence[Entry]) -> list[Answer]:
    answers = [_told(functools.partial(_load, registry, entry)) for entry in entries]
    return [
        (status, text.removeprefix(f"{entry.origin} ").removeprefix("is broken: "))
        for entry, (status, text) in zip(entries, answers, strict=True)
    ]


def _load(registry: Registry, entry: Entry) -> Answer:
    descriptor = registry.describe(entry)
    if descriptor.alias_of:
        registry.find(entry.kind, descriptor.alias_of)
        return "ok", f"stands for {descriptor.alias_of}"
    if descriptor.best_of:
        return "ok", f"stands for the best {descriptor.best_of} here"
    try:
        made = registry.make(entry)
    except MissingDependencyError as error:
        return "note", _line(error)
    choice = Choice(kind=entry.kind, name=entry.name, reason="examined", descriptor=descriptor, entry=entry)
    check_hooks(choice, made)
    if entry.kind != "accelerator":
        return "ok", "loads"
    if not made.accelerator_is_available():
        return "note", "loads; no such device here"
    count = made.accelerator_device_count()
    return "ok", f"loads; {count} device{'s' * (count != 1)} here"


def apart(look: Callable[[], list[Answer]], *, count: int, timeout_s: float = TIMEOUT_S) -> list[Answer]:
    """Call `look` in a copy of this process, so that nothing it does, hanging and crashing included, reaches this one.

    Where the system cannot copy processes it is called here.

    Args:
        look: gives as many answers as `count`.
        count: how many times to say it where `look` does not come back.
        timeout_s: how long it may take.
    """
    if not hasattr(os, "fork"):
        return look()
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _answer(look, read, write)
    os.close(write)
    answer, in_time = _read(read, timeout_s)
    os.close(read)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, ending = os.waitpid(child, 0)
    if not in_time:
        return [("error", f"did not load within {timeout_s:.0f} s: uninstall it, or report it to its author.")] * count
    if not answer:
        code = os.waitstatus_to_exitcode(ending)
        text = f"ended the process that loaded it (exit code {code}): uninstall it, or report it to its author."
        return [("error", text)] * count
    return [(status, text) for status, text in json.loads(answer)]


def _answer(look: Callable[[], list[Answer]], read: int, write: int) -> None:
    """Answer through the pipe, and end this copy without running anything of the program it copies."""
    try:
        os.close(read)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)  # what a plugin prints must not end up in the report
        os.dup2(null, 2)
        os.write(write, json.dumps(look()).encode())
    finally:
        os._exit(0)


def _told(look: Callable[[], Answer]) -> Answer:
    try:
        return look()
    except PlugframeError as error:
        return "error", _line(error)
    except Exception as error:  # noqa: BLE001  a plugin may raise anything, and that is what is to be reported
        return "error", f"{type(error).__name__}: {_line(error)}"


def _read(pipe: int, timeout_s: float) -> tuple[bytes, bool]:
    """Return what comes through the pipe until its other end is closed, and whether that was in time."""
    deadline = time.monotonic() + timeout_s
    parts: list[bytes] = []
    while (left_s := deadline - time.monotonic()) > 0 and select.select([pipe], [], [], left_s)[0]:
        part = os.read(pipe, 65536)
        if not part:
            return b"".join(parts), True
        parts.append(part)
    return b"", False


def _clashes(registry: Registry) -> Iterator[Finding]:
    seen: dict[tuple[str, str], list[Entry]] = {}
    for entry in registry.entries():
        seen.setdefault((entry.kind, entry.name), []).append(entry)
    for (kind, name), entries in seen.items():
        if len(entries) == 1:
            continue
        qualified = " or ".join(repr(entry.qualified) for entry in entries if not entry.builtin)
        if entries[0].builtin:
            text = f"the bare name is the built-in's: write {qualified} for the other."
        else:
            text = f"published by {len(entries)} packages: write {qualified}."
        yield Finding(AREA, f"{kind} {name}", "warning", text)


def _stale(registry: Registry) -> Iterator[Finding]:
    """Find packages whose metadata is out of date."""
    ours = {normalize(entry.distribution) for entry in registry.entries()}
    found: dict[str, list[Any]] = {}
    for distribution in metadata.distributions():
        name = normalize(name_and_version(distribution)[0])
        if name in ours:
            found.setdefault(name, []).append(distribution)
    for name, distributions in found.items():
        if len(distributions) > 1:
            versions = ", ".join(str(each.version) for each in distributions)
            text = f"is installed {len(distributions)} times ({versions}): only the first is used"
            yield Finding(AREA, name, "warning", f"{text}: type 'pip uninstall {name}', twice.")
        difference = _behind_its_source(distributions[0])
        if difference:
            yield Finding(AREA, name, "warning", difference)


def _behind_its_source(distribution: Any) -> str:
    """Compare an editable install with the project file it was made from; return what to do, empty if nothing."""
    told = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not told.get("dir_info", {}).get("editable"):
        return ""
    folder = str(told.get("url", "")).removeprefix("file://")
    try:
        with open(os.path.join(folder, "pyproject.toml"), encoding="utf-8") as file:
            groups = tomllib.loads(file.read()).get("project", {}).get("entry-points", {})
    except (OSError, tomllib.TOMLDecodeError):
        return ""
    written = {
        (g, n, v.replace(" ", ""))
        for g, points in groups.items()
        if g.startswith("plugframe.")
        for n, v in points.items()
    }
    known = {
        (p.group, p.name, p.value.replace(" ", ""))
        for p in distribution.entry_points
        if p.group.startswith("plugframe.")
    }
    names = sorted({f"{group.removeprefix('plugframe.')} {name}" for group, name, _ in written ^ known})
    if not names or not groups:
        return ""
    return f"its metadata is older than its pyproject.toml ({', '.join(names)}): type 'pip install -e {folder}'."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
