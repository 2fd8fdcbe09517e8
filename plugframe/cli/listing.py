"""The rows of ``plugframe list-plugins``, from metadata alone; without click, which takes longer than a listing."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from plugframe.core.registry.registry import Entry, Registry
from plugframe.errors import SettingError, closest

#: Status of a plugin with only its metadata read, and of one whose descriptor and hooks were checked.
NOT_CHECKED, OK = "not checked", "ok"
#: What is wrong with a plugin that was loaded, None if nothing is; and its summary.
Checked = tuple["str | None", str]


class Row(NamedTuple):
    """One line of the listing.

    Attributes:
        kind: of the plugin.
        name: what the user types.
        package: the distribution that publishes it.
        version: of that distribution.
        needs: distributions of the extras it needs.
        status: ``"ok"``, ``"not checked"``, or what is wrong and what to type.
        summary: what the descriptor says of itself; empty unless it was loaded.
    """

    kind: str
    name: str
    package: str
    version: str
    needs: str
    status: str
    summary: str = ""

    @property
    def broken(self) -> bool:
        """Whether its author has something to fix."""
        return self.status.startswith(("broken", "incompatible"))


def entries_of(registry: Registry, kind: str | None) -> list[Entry]:
    entries = sorted([*registry.entries(kind), *registry.refused(kind)], key=_order)
    if kind is not None and not entries:
        from plugframe.hooks.kinds import KINDS  # a listing does without

        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise SettingError(f"--kind={kind!r} is not a kind.{closest(kind, KINDS)} Kinds: {known}.")
    return entries


def _order(entry: Entry) -> tuple[str, bool, str, str]:
    return entry.kind, not entry.builtin, entry.distribution, entry.name


def row_of(registry: Registry, entry: Entry, checked: Checked | None, statuses: Statuses) -> Row:
    status, summary = checked or (None, "")
    return Row(
        kind=entry.kind,
        name=entry.name,
        package=entry.distribution,
        version=entry.version,
        needs=", ".join(registry.needs(entry)),
        status=status or statuses.of(entry, checked=checked is not None),
        summary=summary,
    )


class Statuses:
    """The status of plugins from metadata only."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._refused = registry.refused()
        usable = registry.entries()
        self._published = Counter((entry.kind, entry.name) for entry in usable)
        self._own_kinds = {entry.kind for entry in [*usable, *self._refused] if entry.builtin}

    def of(self, entry: Entry, *, checked: bool) -> str:
        status = self._of(entry)
        return OK if checked and status == NOT_CHECKED else status

    def _of(self, entry: Entry) -> str:
        if entry in self._refused:
            return self._refused[entry]
        if self._registry.missing(entry):
            return f"missing: type pip install '{entry.distribution}[{','.join(entry.extras)}]'"
        if self._registry.shadowed(entry):
            return f"shadowed by the built-in; use {entry.qualified}"
        if not entry.builtin and self._published[entry.kind, entry.name] > 1:
            return f"the same name in several packages; use {entry.qualified}"
        return NOT_CHECKED if entry.kind in self._own_kinds else _stray(entry.kind)


def _stray(kind: str) -> str:
    """Return the status of a plugin of a kind that plugframe itself has no plugin of."""
    from plugframe.hooks.kinds import KINDS

    return NOT_CHECKED if kind in KINDS else f"broken: there is no such kind.{closest(kind, KINDS)}"


def show_rows(rows: list[Row], *, check: bool) -> None:
    from plugframe.cli.table import show

    # The status last: it is the one that can be long.
    columns = ["kind", "name", "package", "version", "needs", *(["summary"] if check else []), "status"]
    show(columns, [[getattr(row, column) for column in columns] for row in rows])
