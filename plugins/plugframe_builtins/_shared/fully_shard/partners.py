"""Parts of a model that hold their own parameters and communicate, beside the units of ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

#: The method of a module's class that returns the module's partner, None for a copy of the module.
PARTNER = "plugframe_partner"


class Partner(nn.Module):
    """A part of a model whose parameters are ``DTensor`` over all ranks already, and whose forward calls collectives.

    A strategy that transforms modules gives a submodule a class with the method ``plugframe_partner``, which returns
    its partner. The strategy that divides the batch leaves the parameters as they are, compares over ranks that all of
    them run it, and has ranks without a batch take part in an evaluation.

    Args:
        path: of the submodule in the model.
        holders: the modules whose own parameters it holds.
    """

    def __init__(self, path: str, holders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.path = path
        self.holders = list(holders)

    def take_part(self) -> None:
        """Run the collectives of one forward, without an input of this rank."""
        raise NotImplementedError


def find_partners(module: nn.Module) -> dict[Partner, nn.Module]:
    """Return the partners in a module, each with its submodule, in the order of submodules."""
    found: dict[Partner, nn.Module] = {}
    for part in module.modules():
        partner_of = getattr(type(part), PARTNER, None)
        partner = None if partner_of is None else partner_of(part)
        if partner is not None:
            found[partner] = part
    return found


def partners_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that partners hold."""
    holders = [holder for partner in find_partners(module) for holder in partner.holders]
    return {parameter for holder in holders for parameter in holder.parameters(recurse=False)}


def without_partners(module: nn.Module, units: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the units that have parameters of their own."""
    held = set(map(id, partners_parameters(module)))
    return [unit for unit in units if any(id(parameter) not in held for parameter in unit.parameters())]


def with_partners(module: nn.Module, units: Sequence[nn.Module]) -> list[nn.Module]:
    """Return units, given in the order of the model, and the partners, each where its submodule is."""
    places = {id(part): number for number, part in enumerate(module.modules())}
    partners = find_partners(module).items()
    places |= {id(partner): places[id(part)] for partner, part in partners}
    # A unit that is the partner's submodule itself runs first.
    return sorted([*units, *(partner for partner, _ in partners)], key=lambda unit: places[id(unit)])


def gather(unit: Any) -> None:
    """Gather a unit and reshard it, or run a partner's collectives, as running it does."""
    if isinstance(unit, Partner):
        unit.take_part()
    else:
        unit.unshard()
        unit.reshard()
