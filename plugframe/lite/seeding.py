"""``Lite.seed_everything``, callable on the class and on an instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from plugframe.data import seed as seeds

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite


class SeedEverything(Protocol):
    """The signature of `plugframe.seed_everything`."""

    def __call__(
        self,
        seed: int | str | None = None,
        workers: bool = False,
        verbose: bool = True,
        *,
        per_rank: bool | None = None,
    ) -> int:
        """Seed every generator, on every device, and return the seed; see `plugframe.seed_everything`."""
        ...


class Seeding:
    """A method that can be called on the class too."""

    def __get__(self, lite: Lite | None, owner: type) -> SeedEverything:
        def seed_everything(
            seed: int | str | None = None,
            workers: bool = False,
            verbose: bool = True,
            *,
            per_rank: bool | None = None,
        ) -> int:
            """Seed every generator, on every device; see `plugframe.seed_everything`."""
            if lite is None:
                return seeds.seed_everything(seed, workers, verbose, per_rank=per_rank)
            number, drawn = seeds.resolve_seed(seed)
            if drawn and lite.world_size > 1 and lite._alone():
                lite._started("seed_everything")
                number = int(lite._hooks.collective_broadcast_object(obj=number, src=0, group=None))
            device = lite._hooks.accelerator_seed
            seeds.seed_process(number, drawn=drawn, per_rank=per_rank, device=lambda seed: device(seed=seed))
            return number

        return seed_everything
