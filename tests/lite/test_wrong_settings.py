"""Invalid settings of ``Lite`` are one-line errors of the constructor, with the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from plugframe import Lite, UsageError


class Thing:
    """Not a plugin."""


NO_NAMES: tuple[Any, ...] = (True, 1.5, [], "", Thing())

#: Of each argument values that are wrong, and for some what must be said of them.
WRONG: dict[str, tuple[Any, ...]] = {
    "accelerator": (*NO_NAMES, 3, ("cud", "Did you mean 'cuda'?"), "CPU "),
    "strategy": (
        *NO_NAMES,
        ("dpp", "Did you mean 'ddp'?"),
        ("DDP", "Did you mean 'ddp'?"),
        ("dp", "use strategy='ddp'"),
    ),
    "devices": (*NO_NAMES, 0, -2, "x", "2;3", [0, 0], ["a"], {}),
    "mesh": ({"data": 0}, {"data": True}, {3: 2}, {"a": -1, "b": -1}, ({"data": 2}, "has no axes of a mesh")),
    "num_nodes": (True, 0, -1, 1.5, "2", "x", Thing()),
    "precision": (
        *NO_NAMES,
        8,
        ("fp16", "use precision='16-mixed'"),
        ("float32", "use precision='32-true'"),
        ("bfloat16", "use precision='bf16-mixed'"),
        ("16-mixd", "Did you mean '16-mixed'?"),
    ),
    "collective": (*NO_NAMES, 3, ("torhc", "Did you mean 'torch'?"), ("gloo", "use collective='torch'")),
    "checkpoint": (*NO_NAMES, ("safetensor", "Did you mean 'safetensors'?")),
    "environment": (*NO_NAMES, ("slrum", "Did you mean 'slurm'?")),
    "launcher": (*NO_NAMES, ("spwan", "Did you mean 'spawn'?")),
    "plugins": (3, True, {}, Thing(), ["profiler", "profiler"], ("profilr", "Did you mean 'profiler'?")),
    "callbacks": (3, True, [3], {}, "x", "no.such.module:Class", "plugframe:NoSuchClass"),
    "loggers": (3, True, ["csv", "csv"], ("cvs", "Did you mean 'csv'?")),
    "timeout_s": (True, 0, -1, math.inf, math.nan, "x", Thing()),
    "report_after_s": (True, -1, math.inf, math.nan, "x", Thing()),
    "diagnostics": (0, 2, "x", [], Thing(), ("true", "it is true or false")),
}
CELLS = [
    (name, *(value if isinstance(value, tuple) else (value, ""))) for name, values in WRONG.items() for value in values
]


@pytest.mark.parametrize(("name", "value", "said"), CELLS, ids=[f"{c[0]}-{n}" for n, c in enumerate(CELLS)])
def test_a_wrong_setting_is_refused(name: str, value: Any, said: str) -> None:
    """An invalid value is an error, and not read as a default or another value."""
    with pytest.raises(UsageError) as caught:
        Lite(**{name: value})
    text = str(caught.value)
    assert len(text.splitlines()) <= 3
    assert said in text
    shown = value[0] if name == "callbacks" and isinstance(value, list) else value
    words = [repr(shown), str(shown), type(shown).__name__, *(map(repr, value) if isinstance(value, list) else ())]
    if name == "mesh":  # as it is typed
        words = [",".join(f"{axis}={size}" for axis, size in value.items())]
    assert any(word in text for word in words), text


def test_every_setting_is_in_the_table() -> None:
    """Every argument of ``Lite`` has invalid values in this test."""
    names = Lite.__init__.__annotations__.keys() - {"return"}
    assert names == WRONG.keys()
    with pytest.raises(TypeError, match="stratgy"):
        Lite(stratgy="ddp")  # type: ignore[call-arg]
