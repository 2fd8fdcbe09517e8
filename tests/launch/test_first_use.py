"""Find the lines of user code that may have used a device first, for the error when forking is refused."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch

import warm
from plugframe_builtins.elastic.first_use import first_uses

#: A machine with a device that is in use: what torch would say there, and no more.
FAKE = """
import sys, types
import torch
from plugframe import Lite, UnsupportedError
torch.accelerator.current_accelerator = lambda: torch.device("xpu")
torch.get_device_module = lambda device: types.SimpleNamespace(is_initialized=lambda: True)
class Thing(torch.nn.Linear):
    def to(self, *args): return self
    def xpu(self): return self
def fn(lite): ...
def launch():
    try:
        Lite(accelerator="cpu", devices=2, strategy="ddp_fork").launch(fn)
    except UnsupportedError as error:
        print(error)
"""


class Weights:
    """Fake with the methods of a tensor."""

    def __init__(self, device: str = "cpu") -> None:
        self.made = torch.zeros(1, device="meta" if device else None)

    def to(self, *where: object, **more: object) -> Weights:
        return self

    def xpu(self) -> Weights:
        return self


def place(weights: Weights, where: object) -> Weights:
    """Runs in user code that is called from elsewhere."""
    return weights.to(where)


def plainly() -> list[str]:
    weights = Weights()
    weights.xpu()
    found = first_uses("xpu")
    weights.xpu()  # has not run yet
    return found


def by_a_name() -> list[str]:
    device = torch.device("xpu" if torch.xpu.device_count() >= 0 else "cpu")
    Weights().to(device)
    return first_uses("xpu")


def in_a_function() -> list[str]:
    place(Weights(), "cpu")
    place(Weights(), where="xpu:0")
    return first_uses("xpu")


def only_asked() -> list[str]:
    torch.xpu.is_available()
    torch.xpu.manual_seed(1)
    Weights().to("cpu")
    torch.autocast("cpu")

    def later() -> None:
        Weights().xpu()

    return first_uses("xpu")


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        (plainly, ["weights.xpu()"]),
        (by_a_name, ["Weights().to(device)"]),
        (in_a_function, ["return weights.to(where)"]),
        (only_asked, []),
    ],
)
def test_a_use_is_found_where_it_ran(case: object, lines: list[str]) -> None:
    """Device use is found by method, by value of a name, and in functions called with the device; not queries."""
    assert callable(case)
    found = case()
    assert [line.partition(" (")[2].removesuffix(")") for line in found] == lines
    assert all(line.startswith(f"{Path(__file__).name}, line ") for line in found)


def launch_in(folder: Path, body: str, **modules: str) -> str:
    """Return the message a script gets when it launches."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "train.py").write_text(FAKE + textwrap.dedent(body))
    done = warm.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_is_told_the_lines(tmp_path: Path) -> None:
    """Lines in the script and its modules are listed in execution order; without any, nothing is printed."""
    body = """
    import parts
    launch()
    model = parts.build("xpu")
    if model is None:
        model.xpu()
    launch()
    """
    parts = """
    import __main__
    def build(device):
        return __main__.Thing(1, 1).to(device)
    """
    nothing, found = launch_in(tmp_path, body, parts=parts).splitlines()
    start, end = "launcher='fork' cannot start ranks after this process has used a xpu device", ": restart it and use"
    assert nothing.startswith(f"{start}{end}")
    line = FAKE.count("\n") + 6
    assert found.startswith(
        f"{start}, by the look of the code in parts.py, line 4 (return __main__.Thing(1, 1).to(device)), "
        f"or in train.py, line {line} (model.xpu()){end}"
    )
