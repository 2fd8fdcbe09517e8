"""Run the scripts of ``tests/kinds`` under each strategy, and say what became of them.

Each script is one kind of thing that raw loops do and that sharding or averaging can silently get wrong. It compares
its numbers with those of one process and prints ``right`` or ``WRONG``, or plugframe refuses it.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paths import TESTS
from plugframe import Lite
from plugframe.errors import PlugframeError, RankLostError
from plugframe.hooks.world import World
from plugframe.testing.ranks import RanksFailed, run_ranks

FOLDER = TESTS / "kinds"
#: Under which every script is run that does not say otherwise.
_USUAL = ("single", "ddp", "fsdp", "tensor_parallel", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
#: The columns of the table.
STRATEGIES = (*_USUAL, "context", "expert")
#: Strategies that need others beside them: what is asked for.
_MIXES = {"context": {"STRATEGY": "fsdp+context", "MESH": "data=1,context=2"}}
_HEADER = re.compile(r"^# (variants|strategies|precision|plan|except): *(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """A script of ``tests/kinds``.

    Attributes:
        path: of the script.
        title: first line of its docstring.
        variants: each an argument for one run; ``("",)`` for a script without arguments.
        strategies: under which it is run.
        precision: by name, empty for the default.
        plan: layers that ``tensor_parallel`` splits, ``"0=colwise,2=rowwise"``; it is not run without.
        gaps: ``"variant/strategy"`` that are known not to be right, and listed on the page in words.
    """

    path: Path
    title: str
    variants: tuple[str, ...]
    strategies: tuple[str, ...]
    precision: str
    plan: str = ""
    gaps: tuple[str, ...] = ()

    def under(self, variant: str) -> tuple[str, ...]:
        """Return the strategies under which a variant is run."""
        able = (each for each in self.strategies if self.plan or each != "tensor_parallel")
        return tuple(each for each in able if f"{variant}/{each}" not in self.gaps)

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        word: ``"right"``, ``"refused"``, ``"warned"`` (other numbers, and a warning that says so), ``"WRONG"`` or
            ``"failed"``.
        text: what it printed, or the message of its error.
        warned: whether plugframe warned.
    """

    word: str
    text: str = ""
    warned: bool = False


def kinds() -> Iterator[Kind]:
    """Yield every script, by name."""
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        header: Mapping[str, str] = dict(_HEADER.findall(source))
        title = (ast.get_docstring(ast.parse(source)) or path.stem).splitlines()[0].rstrip(".")
        strategies = tuple(header.get("strategies", "").split()) or _USUAL
        variants = tuple(header.get("variants", "").split()) or ("",)
        gaps = tuple(header.get("except", "").split())
        plan = ",".join(header.get("plan", "").split())
        yield Kind(path, title, variants, strategies, header.get("precision", "").strip(), plan, gaps)


def run_cell(kind: Kind, variant: str, strategy: str, *, timeout_s: float = 90.0) -> Outcome:
    """Run one script under one strategy: on one rank under ``single``, on two under any other."""
    asked = {"STRATEGY": strategy, "ACCELERATOR": "cpu", "PRECISION": kind.precision, **_MIXES.get(strategy, {})}
    if strategy == "tensor_parallel":
        asked["STRATEGY__PLAN"] = kind.plan
    env = {f"PLUGFRAME_{name}": value for name, value in asked.items() if value}
    arguments = [variant] if variant else []
    try:
        num_ranks = 1 if strategy == "single" else 2
        outcomes = run_ranks(num_ranks, run_script, str(kind.path), arguments, timeout_s=timeout_s, env=env)
    except RanksFailed as error:
        return Outcome("failed", str(error))
    return worst([Outcome(*outcome) for outcome in outcomes])


def worst(outcomes: list[Outcome]) -> Outcome:
    """Return the outcome that counts for all ranks; one that lost its peer follows from the peer's own."""
    if any(each.word == "WRONG" for each in outcomes) and any(each.warned for each in outcomes):
        return Outcome("warned", warned=True)
    order = ("WRONG", "failed", "refused", "right", "lost")
    return min(outcomes, key=lambda outcome: order.index(outcome.word))


def run_script(world: World, path: str, arguments: list[str]) -> tuple[str, str, bool]:
    """Run a script in this rank and return the fields of its `Outcome`."""
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = path
    sys.modules["__main__"] = module
    sys.argv = [path, *arguments]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(os.environ.get("TMPDIR", "/tmp"), "extensions"))
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(said):
        warnings.resetwarnings()
        word, text = _executed(path, module.__dict__, said)
    for value in list(module.__dict__.values()):
        if isinstance(value, Lite):
            with contextlib.suppress(Exception):  # of a job whose other rank has failed
                value.teardown()
    return word, text, any("plugframe" in str(each.category.__module__) for each in caught)


def _executed(path: str, namespace: dict[str, Any], said: io.StringIO) -> tuple[str, str]:
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), namespace)
    except SystemExit as leave:
        if leave.code not in (None, 0):
            return "WRONG", said.getvalue()
    except RankLostError as error:
        return "lost", str(error)
    except PlugframeError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 - whatever it is, it is the outcome
        return "failed", traceback.format_exc()
    lines = said.getvalue().splitlines()
    if any(line.startswith("WRONG") for line in lines):
        return "WRONG", said.getvalue()
    return ("right", lines[-1]) if lines else ("failed", "it printed nothing")
