"""Compatibility of plugins with devices, ranks and the capabilities that other plugins need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from plugframe.core.planning.installed import Installed
from plugframe.core.planning.plan import Choice
from plugframe.errors import PluginContractError, UnsupportedError
from plugframe.hooks.descriptor import Plugin


@dataclass(frozen=True)
class Target:
    """The target of a job: a device type and a number of ranks."""

    device_type: str
    world_size: int

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} on {self.device_type}"

    def incompatibility(self, descriptor: Plugin) -> str | None:
        """Return why a plugin does not support this target; None if it does."""
        if callable(descriptor.ranks):
            problem = descriptor.ranks({}, self.world_size)
            if problem:
                return f"{problem}, and there {'are' if self.world_size > 1 else 'is'} {self.world_size}"
        elif descriptor.ranks == "one" and self.world_size > 1:
            return f"works with one rank, and there are {self.world_size}"
        if descriptor.devices and self.device_type not in descriptor.devices:
            return f"works on {', '.join(descriptor.devices)}, and the device is {self.device_type}"
        return None


def wanted(kind: str, users: Iterable[Choice], field: Literal["needs", "prefers", "conflicts"]) -> dict[str, Choice]:
    """Return what `users` need, prefer or refuse of a plugin of `kind`, each capability with its first user."""
    found: dict[str, Choice] = {}
    for user in users:
        for capability in getattr(user.descriptor, field).get(kind, ()):
            found.setdefault(capability, user)
    return found


def compatible(
    candidates: Iterable[Choice], target: Target, needs: Iterable[str] = (), conflicts: Iterable[str] = ()
) -> list[Choice]:
    """Return the candidates that support the target, with all needed capabilities and none that conflicts."""
    required, refused = set(needs), set(conflicts)
    return [
        choice
        for choice in candidates
        if required <= set(choice.descriptor.provides)
        and not refused & set(choice.descriptor.provides)
        and target.incompatibility(choice.descriptor) is None
    ]


def ranked(candidates: Iterable[Choice], preferred: Iterable[str]) -> list[Choice]:
    """Return the candidates, stably sorted with those first that provide all preferred capabilities."""
    return sorted(candidates, key=lambda choice: not set(preferred) <= set(choice.descriptor.provides))


def best(kind: str, target: Target, users: Sequence[Choice], installed: Installed) -> Choice:
    """Return the plugin that ``"auto"`` selects.

    Args:
        users: the plugins of the plan so far, which may need or prefer capabilities of it.

    Raises:
        UnsupportedError: if there is none.
    """
    needs, prefers = wanted(kind, users, "needs"), wanted(kind, users, "prefers")
    conflicts = wanted(kind, users, "conflicts")
    found = ranked(compatible(installed.candidates(kind), target, needs, conflicts), prefers)
    if not found:
        wants = f" providing {_by_user(needs)}" if needs else ""
        names = ", ".join(installed.catalogue.names(kind)) or "none"
        raise UnsupportedError(
            f"No installed {kind}{wants} fits {target}. Installed: {names}.{installed.refused(kind)}"
        )
    if prefers and set(prefers) <= set(found[0].descriptor.provides):
        return replace(found[0], reason=f"auto: provides {_by_user(prefers, 'as', 'prefers')}")
    providing = f" and provides {_by_user(needs)}" if needs else ""
    return replace(found[0], reason=f"auto: the first that fits {target}{providing}")


def asked_or_best(
    kind: str, asked: Choice | None, target: Target, users: Sequence[Choice], installed: Installed
) -> Choice:
    """Return the requested plugin, else the one that ``"auto"`` selects.

    Raises:
        UnsupportedError: if the one asked for does not work on the target, or lacks what the others need.
    """
    if asked is None:
        return best(kind, target, users, installed)
    needs, conflicts = wanted(kind, users, "needs"), wanted(kind, users, "conflicts")
    problem = misfit(asked, needs, conflicts) or target.incompatibility(asked.descriptor)
    if problem:
        able = names_of(compatible(installed.candidates(kind), target, needs, conflicts)) or "another"
        raise UnsupportedError(f"{kind}={asked.name!r} {problem}: choose {able}.")
    return asked


def check_needs(choices: Mapping[str, Choice], users: Sequence[Choice]) -> None:
    """Check that the plugins of a plan provide what they need from each other, and nothing that conflicts.

    Raises:
        UnsupportedError: if a plugin lacks what another one needs, or does what another one cannot take.
        PluginContractError: if `needs` or `conflicts` names a kind that is not part of a plan.
    """
    for user in users:
        for field in ("needs", "conflicts"):
            for kind in getattr(user.descriptor, field):
                if kind not in choices:
                    known = ", ".join(choices)
                    raise PluginContractError(
                        f"{user.kind} {user.origin} has {field}={{{kind!r}: …}}: the kind is one of {known}."
                    )
    for kind, choice in choices.items():
        problem = misfit(choice, wanted(kind, users, "needs"), wanted(kind, users, "conflicts"))
        if problem:
            raise UnsupportedError(f"{kind} {choice.name!r} {problem}: choose another.")


def names_of(choices: Iterable[Choice]) -> str:
    """Return names for a message: ``'a' or 'b'``."""
    return " or ".join(repr(choice.name) for choice in choices)


def misfit(choice: Choice, needs: Mapping[str, Choice], conflicts: Mapping[str, Choice]) -> str | None:
    """Return why a plugin does not fit the others; None if it does."""
    for capability, user in needs.items():
        if capability not in choice.descriptor.provides:
            return f"does not provide {capability!r}, which {user.kind} {user.name!r} needs"
    for capability, user in conflicts.items():
        if capability in choice.descriptor.provides:
            return f"has {capability!r}, which {user.kind} {user.name!r} does not support"
    return None


def _by_user(capabilities: Mapping[str, Choice], before: str = "for", after: str = "") -> str:
    parts = [f"{each!r} {before} {user.kind} {user.name!r} {after}" for each, user in capabilities.items()]
    return ", ".join(part.rstrip() for part in parts)
