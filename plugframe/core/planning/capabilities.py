"""What plugins need of one another, and what fits a place and these needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from plugframe.core.planning.candidates import Candidates
from plugframe.core.planning.place import Where
from plugframe.core.planning.plan import Choice
from plugframe.errors import PluginContractError, UnsupportedError


def needs_of(kind: str, users: Iterable[Choice]) -> dict[str, Choice]:
    """Return the capabilities a plugin of `kind` must have, each with the first of `users` that needs it."""
    needs: dict[str, Choice] = {}
    for user in users:
        for capability in user.descriptor.needs.get(kind, ()):
            needs.setdefault(capability, user)
    return needs


def fitting(candidates: Candidates, kind: str, where: Where, needs: Iterable[str] = ()) -> list[Choice]:
    """Return what ``"auto"`` may pick and works there, the most eager first."""
    needs = tuple(needs)
    return [c for c in candidates.automatic(kind) if where.misfit(c.descriptor, needs) is None]


def names_of(choices: Iterable[Choice]) -> str:
    """Return names for a message: ``'a' or 'b'``."""
    return " or ".join(repr(choice.name) for choice in choices)


def pick(candidates: Candidates, kind: str, where: Where, users: Sequence[Choice] = ()) -> Choice:
    """Return the most eager plugin of a kind that works there and has what `users` need.

    Raises:
        UnsupportedError: if there is none.
    """
    needs = needs_of(kind, users)
    found = fitting(candidates, kind, where, needs)
    wishes = _preferences(kind, users)
    liked = [choice for choice in found if set(wishes) <= set(choice.descriptor.provides)]
    if liked and wishes:
        return replace(liked[0], reason=f"auto: provides {_wanted(wishes, 'as', 'prefers')}")
    if not found:
        wanted = f" providing {_wanted(needs)}" if needs else ""
        installed = ", ".join(candidates.catalogue.names(kind)) or "none"
        refused = candidates.refused(kind)
        raise UnsupportedError(f"No installed {kind}{wanted} fits {where}. Installed: {installed}.{refused}")
    providing = f" and provides {_wanted(needs)}" if needs else ""
    return replace(found[0], reason=f"auto: the first that fits {where}{providing}")


def needed(candidates: Candidates, kind: str, where: Where, users: Sequence[Choice]) -> Choice:
    """Return the plugin of a kind that `users` rely on: the one asked for, or the first that fits.

    Raises:
        UnsupportedError: if the one asked for does not work there or lacks what they need.
    """
    asked = candidates.asked(kind)
    if asked is None:
        return pick(candidates, kind, where, users)
    needs = needs_of(kind, users)
    problem = _lacking(asked, needs) or where.misfit(asked.descriptor)
    if problem:
        able = names_of(fitting(candidates, kind, where, needs)) or "another"
        raise UnsupportedError(f"{kind}={asked.name!r} {problem}: choose {able}.")
    return asked


def check_needs(choices: Mapping[str, Choice], users: Iterable[Choice]) -> None:
    """Check that everything the plugins of a plan need is there.

    Raises:
        UnsupportedError: if a plugin lacks what another one needs.
        PluginContractError: if something is needed of a kind that is not part of a plan.
    """
    users = tuple(users)
    for user in users:
        for kind in user.descriptor.needs:
            if kind not in choices:
                known = ", ".join(choices)
                raise PluginContractError(
                    f"{user.kind} {user.origin} has needs={{{kind!r}: …}}: a need is of one of {known}."
                )
    for kind, choice in choices.items():
        problem = _lacking(choice, needs_of(kind, users))
        if problem:
            raise UnsupportedError(f"{kind} {choice.name!r} {problem}: choose another.")


def _lacking(choice: Choice, needs: Mapping[str, Choice]) -> str | None:
    for capability, user in needs.items():
        if capability not in choice.descriptor.provides:
            return f"does not provide {capability!r}, which {user.kind} {user.name!r} needs"
    return None


def _preferences(kind: str, users: Iterable[Choice]) -> dict[str, Choice]:
    """Return the capabilities a plugin of `kind` should have, each with the first of `users` that prefers it."""
    wishes: dict[str, Choice] = {}
    for user in users:
        for capability in user.descriptor.prefers.get(kind, ()):
            wishes.setdefault(capability, user)
    return wishes


def _wanted(needs: Mapping[str, Choice], *around: str) -> str:
    before, after = around or ("for", "")
    parts = [f"{capability!r} {before} {user.kind} {user.name!r} {after}" for capability, user in needs.items()]
    return ", ".join(part.rstrip() for part in parts)
