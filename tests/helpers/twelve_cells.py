"""Run the scripts of ``tests/twelve``, plain and converted, and compare what they print and train.

Each file is both forms of a script: as it stands it is plain torch, and ``converted`` is what the README and
``docs/loop.md`` make of it. Lines that end in ``# -`` are left out there, and those that begin with ``# +`` are added.

The order of samples and random draws in training are set here, as rows of what one process draws for the batch of all
ranks: a rank that reads other samples, or draws other noise, computes other numbers.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import RandomSampler

from paths import TESTS
from plugframe.adopt import state_of
from plugframe.errors import PlugframeError, RankLostError
from plugframe.hooks.world import World
from plugframe.testing.ranks import RanksFailed, rank_store, run_ranks

FOLDER = TESTS / "twelve"
#: What is asked for, and on how many ranks.
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "single": (1, {"STRATEGY": "single"}),
    "ddp": (2, {"STRATEGY": "ddp"}),
    "fsdp": (2, {"STRATEGY": "fsdp"}),
    "deepspeed": (2, {"STRATEGY": "deepspeed"}),
    "bf16": (2, {"STRATEGY": "ddp", "PRECISION": "bf16"}),
    "16": (2, {"STRATEGY": "ddp", "PRECISION": "16"}),
}
#: What other settings are compared with: one process, in the same precision. Each is a form of the script.
REFERENCES: dict[str, dict[str, str]] = {
    "plain": {},
    "one rank, bf16": {"STRATEGY": "single", "PRECISION": "bf16"},
    "one rank, 16": {"STRATEGY": "single", "PRECISION": "16"},
}
#: How far printed numbers may be apart, as a part of themselves, and final weights, as a part of the way they went.
#: Autocast rounds each operation to 8 or 11 bits.
TOLERANCES = {"bf16": (0.1, 0.2), "16": (0.03, 0.03)}
TOLERANCE = (2e-3, 1e-2)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@dataclass
class Outcome:
    """What became of a script.

    Attributes:
        word: ``"ran"``, ``"refused"``, ``"failed"`` or ``"lost"``; after comparing ``"right"`` or ``"WRONG"``.
        text: what it printed, or its error.
        warned: messages of plugframe.
        weights: final weights of its models, by variable and key.
        history: numbers of this rank alone, of a script that plays games.
    """

    word: str
    text: str = ""
    warned: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)


def scripts() -> list[Path]:
    """Return the scripts, by name."""
    return sorted(FOLDER.glob("*.py"))


def title(path: Path) -> str:
    """Return what a script is, from its docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem).splitlines()[0]


def converted(source: str) -> str:
    """Return the form with plugframe, line by line: a line that is left out is empty."""
    lines = [re.sub(r"^(\s*)# \+ (.*)$", r"\1\2", line) for line in source.splitlines()]
    return "\n".join("" if line.endswith("  # -") else line for line in lines) + "\n"


def num_added(path: Path) -> int:
    """Return the number of lines that the converted form adds or changes."""
    return len(re.findall(r"^\s*# \+ ", path.read_text(encoding="utf-8"), re.M))


# ---------------------------------------------------------------- in a rank


class Draws:
    """Random numbers of a script: a rank gets its rows of those of one process.

    Args:
        rank: of this rank, of `ranks`.
        path: of the script; only its own calls draw from here.
    """

    def __init__(self, rank: int, ranks: int, path: str) -> None:
        self._rank, self._ranks, self._path = rank, ranks, path
        self._count = 0

    def rows(self, shape: Sequence[int], draw: Any) -> Tensor:
        """Return this rank's rows of ``draw(shape, generator=…)``."""
        self._count += 1
        first, *rest = shape
        generator = torch.Generator().manual_seed(self._count)
        result: Tensor = draw((first * self._ranks, *rest), generator=generator)
        return result[self._rank :: self._ranks]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Draw from here within the block."""
        own = {name: getattr(torch, name) for name in ("randn", "randn_like", "randint", "multinomial")}

        def asked(size: Any) -> bool:
            return sys._getframe(2).f_code.co_filename == self._path

        def randn(*size: Any, generator: Any = None, device: Any = None) -> Tensor:
            if generator is not None or not asked(size):
                return own["randn"](*size, generator=generator, device=device)
            return self.rows(size, own["randn"]).to(device or "cpu")

        def randn_like(x: Tensor) -> Tensor:
            return self.rows(x.shape, own["randn"]).to(x) if asked(x) else own["randn_like"](x)

        def randint(*args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
            if generator is not None or not asked(args):
                return own["randint"](*args, generator=generator, **kwargs)
            *bounds, shape = args
            return self.rows(shape, lambda size, generator: own["randint"](*bounds, size, generator=generator))

        def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            if not training or not p:
                return x
            return x * (self.rows(x.shape, torch.rand) >= p).to(x) / (1 - p)

        with (
            mock.patch.multiple(torch, randn=randn, randn_like=randn_like, randint=randint),
            mock.patch.object(nn.functional, "dropout", dropout),
            # Which of the first steps a larger one skips depends on the sizes of batches, as in plain torch.
            mock.patch.object(GradScaler, "__init__", partialmethod(GradScaler.__init__, init_scale=256.0)),
            mock.patch.object(RandomSampler, "__iter__", _order),
        ):
            yield


def _order(sampler: Any) -> Iterator[int]:
    """Yield the order of samples of a pass: that of its number."""
    sampler.num_passes = getattr(sampler, "num_passes", 0) + 1
    generator = torch.Generator().manual_seed(sampler.num_passes)
    yield from torch.randperm(len(sampler.data_source), generator=generator).tolist()


def run_script(world: World, path: str, *, plain: bool) -> Outcome:
    """Run one form of a script in this rank."""
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = path
    sys.modules["__main__"] = module
    sys.argv = [path]
    source = Path(path).read_text(encoding="utf-8")
    said, told = io.StringIO(), io.StringIO()
    draws = Draws(world.global_rank, world.world_size, path)
    with warnings.catch_warnings(record=True) as caught, draws.active():
        warnings.resetwarnings()
        warnings.filterwarnings("default", module=r"plugframe.*")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            outcome = _executed(path, source if plain else converted(source), module.__dict__, said)
    lines = [line for line in told.getvalue().splitlines() if line.startswith("plugframe: ")][1:]
    outcome.warned = lines + [str(w.message) for w in caught if "plugframe" in str(w.category.__module__)]
    outcome.history = module.__dict__.get("history", [])
    lite = module.__dict__.get("lite")
    if lite is not None:
        with contextlib.suppress(Exception):  # of a job whose other rank has failed
            lite.teardown()
    return outcome


def _executed(path: str, source: str, names: dict[str, Any], said: io.StringIO) -> Outcome:
    try:
        torch.manual_seed(0)
        exec(compile(source, path, "exec"), names)
        return Outcome("ran", said.getvalue(), weights=_weights(names))
    except RankLostError as error:
        return Outcome("lost", str(error))
    except PlugframeError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except BaseException:  # noqa: BLE001 - whatever it is, it is the outcome
        return Outcome("failed", traceback.format_exc())


def _weights(names: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, module in names.items():
        if not isinstance(module, nn.Module) or not any(p.numel() for p in module.parameters()):
            continue
        lite = names.get("lite")
        is_set_up = lite is not None and state_of(module) is not None
        state = lite.state_dict(module, all_ranks=True) if is_set_up else module.state_dict()
        found |= {f"{name}.{key}": value.detach().float().clone() for key, value in state.items()}
    return found


def run_cells(world: World, cells: list[tuple[str, str]]) -> list[Outcome]:
    """Run cells, ``(path, setting)``, one after another, up to the first that fails on any rank."""
    store = rank_store(timeout_s=300.0)
    outcomes = []
    for number, (path, setting) in enumerate(cells):
        wanted = REFERENCES[setting] if setting in REFERENCES else SETTINGS[setting][1]
        asked = {"ACCELERATOR": "cpu", "TIMEOUT_S": "30", **wanted}
        env = {f"PLUGFRAME_{name}": value for name, value in asked.items()}
        with mock.patch.dict(os.environ, env):
            outcome = run_script(world, path, plain=setting == "plain")
        outcomes.append(outcome)
        store.set(f"cell/{number}/{world.global_rank}", outcome.word)
        words = {store.get(f"cell/{number}/{rank}") for rank in range(world.world_size)}
        if words & {b"failed", b"lost"} or len(words) > 1:
            break
    return outcomes


# ---------------------------------------------------------------- all cells


def run_all(paths: Sequence[Path], settings: Sequence[str]) -> dict[tuple[str, str], Outcome]:
    """Run the scripts under the settings and return what became of each cell, compared with the plain script."""
    references = {setting: f"one rank, {setting}" for setting in ("bf16", "16") if setting in settings}
    wanted = [(str(path), each) for path in paths for each in ("plain", *references.values(), *settings)]
    found: dict[tuple[str, str], list[Outcome]] = {}
    for ranks in (1, 2):
        found |= _started(ranks, [cell for cell in wanted if SETTINGS.get(cell[1], (1,))[0] == ranks])
    results = {}
    for path in paths:
        if found[str(path), "plain"][0].word != "ran":
            raise RuntimeError(f"{path.name} does not run in plain torch:\n{found[str(path), 'plain'][0].text}")
        for setting in settings:
            reference = found[str(path), references.get(setting, "plain")][0]
            results[path.stem, setting] = compared(setting, reference, found[str(path), setting])
    return results


def _started(num_ranks: int, cells: list[tuple[str, str]]) -> dict[tuple[str, str], list[Outcome]]:
    found: dict[tuple[str, str], list[Outcome]] = {}
    while cells:
        try:
            ranks = run_ranks(num_ranks, run_cells, cells, timeout_s=280.0)
        except RanksFailed as error:
            ranks = [[Outcome("failed", str(error))]]
        of_cells = list(zip(*ranks, strict=False))
        found |= {cell: list(outcomes) for cell, outcomes in zip(cells, of_cells, strict=False)}
        cells = cells[len(of_cells) :]
    return found


def compared(setting: str, plain: Outcome, outcomes: list[Outcome]) -> Outcome:
    """Return the outcome of a cell, from those of its ranks."""
    order = ("failed", "refused", "lost", "ran")
    result = min(outcomes, key=lambda outcome: order.index(outcome.word))
    if result.word != "ran":
        return Outcome("failed" if result.word == "lost" else result.word, result.text, outcomes[0].warned)
    if plain.word != "ran":
        return Outcome("failed", f"On one rank: {plain.text}")
    wrong = _games(outcomes) if plain.history else _difference(setting, plain, outcomes)
    return Outcome("WRONG" if wrong else "right", wrong, outcomes[0].warned)


def _difference(setting: str, plain: Outcome, outcomes: list[Outcome]) -> str:
    """Return how a cell differs from the plain script, empty if it does not."""
    printed, trained = TOLERANCES.get(setting, TOLERANCE)
    text = outcomes[0].text
    if _NUMBER.sub("0", text) != _NUMBER.sub("0", plain.text):
        return f"It printed\n{text}instead of\n{plain.text}"
    pairs = zip(_NUMBER.findall(text), _NUMBER.findall(plain.text), strict=True)
    if any(abs(float(one) - float(other)) > _allowed(other, printed) for one, other in pairs):
        return f"It printed\n{text}instead of\n{plain.text}"
    for rank, outcome in enumerate(outcomes):
        if outcome.weights.keys() != plain.weights.keys():
            return f"Weights: {sorted(outcome.weights.keys() ^ plain.weights.keys())}"
        apart, norm = (_norm(outcome.weights, plain.weights), _norm(plain.weights, {}))
        if apart > trained * norm:
            return f"The weights of rank {rank} are {apart / norm:.2g} of their norm apart.\n{text}"
    if any(line for outcome in outcomes[1:] for line in outcome.text.splitlines()):
        return "A rank other than 0 printed."
    return ""


def _norm(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the norm of all weights, minus `others`."""
    return sum(((value - others.get(key, 0)).norm() ** 2).item() for key, value in weights.items()) ** 0.5


def _allowed(number: str, part: float) -> float:
    """Return how far a printed number may be from `number`: a count may be 2 apart where operations are rounded."""
    count = 2.0 if part > TOLERANCE[0] and "." not in number else 0.0
    return max(part * max(abs(float(number)), 0.1), count)


def _games(outcomes: list[Outcome]) -> str:
    """Return what is wrong with a script that plays games: ranks play different ones, and the mean is printed."""
    histories = [outcome.history for outcome in outcomes]
    if len(set(map(tuple, histories))) < len(histories):
        return f"Ranks played the same games: {histories}"
    printed = [float(line.split()[-1]) for line in outcomes[0].text.splitlines()]
    means = [sum(each) / len(each) for each in zip(*histories, strict=True)]
    if any(abs(one - other) > 0.01 for one, other in zip(printed, means, strict=True)):
        return f"It printed {printed}, and the means of all ranks are {means}"
    if printed[-1] < printed[0] + 2:
        return f"It did not learn: {printed}"
    first = outcomes[0].weights
    for outcome in outcomes[1:]:
        if any(not torch.equal(value, first[key]) for key, value in outcome.weights.items()):
            return "The ranks ended with different weights."
    return ""
