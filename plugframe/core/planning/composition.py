"""Several strategies in one job: ``"a+b"``, or a list of names and objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plugframe.core.config.request import Setting
from plugframe.core.planning.installed import Installed
from plugframe.core.planning.plan import Choice
from plugframe.errors import SettingError, UnsupportedError, shown
from plugframe.hooks.descriptor import check_composable
from plugframe.hooks.mesh import ORDER, PLACES, MeshLayout, mesh_text

#: The kind whose plugins can be composed.
COMPOSED = "strategy"


def in_order(choices: Sequence[Choice], setting: Setting, installed: Installed) -> list[Choice]:
    """Return composed strategies in the order in which they are applied to a module.

    Raises:
        SettingError: if one is there twice, or not exactly one of them divides the batch.
    """
    able = (choice for choice in installed.candidates(COMPOSED, by_name=True) if choice.descriptor.axes)
    try:
        check_composable([(choice.name, choice.descriptor) for choice in choices], able)
    except ValueError as error:
        raise SettingError(f"strategy={shown(setting.value)} in {setting.source}: {error}") from None
    return sorted(choices, key=lambda choice: ORDER.index(choice.descriptor.divides))


def mesh_layout(strategies: Sequence[Choice], setting: Setting | None, num_ranks: int) -> MeshLayout | None:
    """Return the mesh for strategies, None if there is one strategy and no mesh was asked for.

    Raises:
        SettingError: if a strategy has no axes, or the sizes do not fit.
    """
    if setting is None and len(strategies) == 1:
        return None
    in_order = sorted(strategies, key=lambda each: PLACES.index(each.descriptor.divides))
    claims = {each.name: each.descriptor.axes for each in in_order}
    try:
        return MeshLayout.of(claims, {} if setting is None else setting.value, num_ranks)
    except ValueError as error:
        text = "+".join(claims) if setting is None else f"mesh={mesh_text(setting.value)} in {setting.source}"
        raise SettingError(f"{text}: {error}") from None


def combined(base: Choice, others: Sequence[Choice]) -> Choice:
    """Return the strategy that divides the batch, with the capabilities, needs and conflicts of all.

    Raises:
        UnsupportedError: if no device is for all of them.
    """
    descriptor = base.descriptor
    for other in others:
        try:
            descriptor = descriptor.beside(other.descriptor)
        except ValueError as error:
            raise UnsupportedError(f"strategies {base.name!r} and {other.name!r}: {error}") from None
    return replace(base, descriptor=descriptor)
