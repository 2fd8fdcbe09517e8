"""A device that only torch knows trains with what is built in: nothing to patch, and no plugin to write.

The device is the simulated one of ``examples/plugins/plugframe-pydevice``, and of that package the part for torch
alone: a distribution made here names it under ``torch.backends``, as packages for real devices do, and
``import torch`` finds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import EXAMPLES

SOURCE = EXAMPLES / "plugins" / "plugframe-pydevice" / "src"
DEVICE = "pydevice"
DDP, FSDP = {"strategy": "ddp"}, {"strategy": "fsdp", "precision": "bf16-mixed"}

SCRIPT = '''
import gc, json, os, sys, warnings
import torch, torch.distributed as dist
from pathlib import Path
from torch import nn
from plugframe_builtins._shared.data_parallel.engine import Engine
from plugframe import Lite

folder = Path(sys.argv[1])

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.first(x)
        self.autocast = [kind for kind in ("cpu", "cuda", "pydevice") if torch.is_autocast_enabled(kind)]
        self.dtype = str(hidden.dtype)
        return self.second(hidden.relu())

def train(**settings):
    """Train four steps, each rank on its rows of the batch, and tell what is seen on the way."""
    torch.manual_seed(0)
    x, model = torch.randn(8, 4), Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Lite(**settings) as lite:
        model, optimizer = lite.setup(model, optimizer)
        mine = lite.to_device(x[lite.global_rank :: lite.world_size])
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (model(mine) - mine.sum(1, keepdim=True)).square().mean()
            lite.backward(loss)
            optimizer.step()
            losses.append(float(lite.all_reduce(loss.detach())))
        told = {"losses": losses, "device": str(lite.device), "current": torch.accelerator.current_device_index()}
        told |= {"autocast": model.autocast, "dtype": model.dtype, "rank": lite.global_rank}
        told |= {"accelerator": type(lite.accelerator).__module__, "strategy": type(lite.strategy).__name__}
        told["parameters"] = sorted({str(parameter.device) for parameter in model.parameters()})
        told["patched"] = sorted(name for name in sys.modules if name == "plugframe_pydevice.accelerator")
        if dist.is_initialized():
            told |= across(lite, model, f"{lite.global_rank}-{settings['strategy']}")
    return told

def across(lite, model, name):
    """Tell what only ranks together have."""
    told = {"backend": dist.get_backend_config()}
    replicas = [each for each in gc.get_objects() if isinstance(each, Engine)]
    told["replicas"] = [sorted({bucket.buffer.device.type for bucket in each._reducer._buckets}) for each in replicas]
    meshes = {parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh")}
    told["meshes"] = [[mesh.device_type, mesh.size()] for mesh in meshes]
    (folder / f"{name}.arrived").touch()
    lite.barrier()
    told["arrived"] = len(list(folder.glob(f"*-{name.partition('-')[2]}.arrived")))
    return told

told = [train(**settings) for settings in json.loads(sys.argv[2])]
(folder / f"{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(told))
'''


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of processes in which torch finds the device when it is imported."""
    site = tmp_path_factory.mktemp("site")
    entries = {"METADATA": "Metadata-Version: 2.1\nName: acme-torch-device\nVersion: 1.0\n"}
    entries["entry_points.txt"] = f"[torch.backends]\n{DEVICE} = plugframe_pydevice.device:load\n"
    (site / "acme_torch_device-1.0.dist-info").mkdir()
    for name, text in entries.items():
        (site / "acme_torch_device-1.0.dist-info" / name).write_text(text, encoding="utf-8")
    ours = {"PYTHONPATH": f"{site}{os.pathsep}{SOURCE}", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "PYDEVICE_COUNT": "2", "PYTHONWARNINGS": "ignore"}


def run(environment: dict[str, str], *command: str | Path) -> str:
    """Run ``python`` with that command and return what it printed."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the reports of one process: with the chosen accelerator, on the CPU, and in mixed precision."""
    folder = tmp_path_factory.mktemp("alone")
    settings: list[dict[str, Any]] = [{"devices": 1}, {"accelerator": "cpu", "devices": 1}]
    settings += [{"devices": [1], "precision": precision} for precision in ("bf16-mixed", "16-mixed")]
    run(environment, "-c", SCRIPT, folder, json.dumps(settings))
    told: list[dict[str, Any]] = json.loads((folder / "alone.json").read_text(encoding="utf-8"))
    return told


@pytest.fixture(scope="module")
def together(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Return the reports of two ranks of `plugframe run`, under DDP and under FSDP."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    options = ("--accelerator=accel", "--devices=2", "--")
    words = ("-m", "plugframe", "run", folder / "train.py", *options, folder, json.dumps([DDP, FSDP]))
    run(environment, *words)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_auto_selects_the_device(alone: list[dict[str, Any]]) -> None:
    """``Lite()`` takes the device torch found, by the built-in accelerator; the package brings no plugin."""
    assert alone[0]["accelerator"] == "plugframe_builtins.accel.accelerator"
    assert alone[0]["device"] == f"{DEVICE}:0"
    assert alone[0]["patched"] == []


def test_a_single_device_trains_as_the_cpu_does(alone: list[dict[str, Any]]) -> None:
    """On one device the losses are the CPU's; a device chosen by its index holds the model, and is the current one."""
    assert alone[1]["device"] == "cpu"
    assert alone[0]["losses"] == pytest.approx(alone[1]["losses"], rel=1e-6)
    assert alone[0]["strategy"] == "SingleRank"
    assert alone[2]["parameters"] == [f"{DEVICE}:1"]
    assert alone[2]["current"] == 1


def test_mixed_precision_is_that_of_the_device(alone: list[dict[str, Any]]) -> None:
    """``torch.autocast`` is on for the device's type and for no other, and layers compute in the lower dtype."""
    assert [each["autocast"] for each in alone] == [[], [], [DEVICE], [DEVICE]]
    assert [each["dtype"] for each in alone[2:]] == ["torch.bfloat16", "torch.float16"]
    assert alone[2]["losses"] == pytest.approx(alone[1]["losses"], rel=0.05)
    # The loss scaler begins too high for float16, and leaves out the first step on every device.
    assert alone[3]["losses"][1:] == pytest.approx(alone[1]["losses"][:-1], rel=0.05)


def test_ddp_averages_on_the_device(together: list[list[dict[str, Any]]], alone: list[dict[str, Any]]) -> None:
    """Each rank has its device, DDP takes it without indices, over its backend, and the losses are one process's."""
    for rank, (told, _) in enumerate(together):
        assert told["device"] == f"{DEVICE}:{rank}"
        assert told["parameters"] == [f"{DEVICE}:{rank}"]
        assert told["replicas"] == [[DEVICE]]
        assert f"{DEVICE}:pydevice_gloo" in told["backend"].split(",")
        assert "cpu:gloo" in told["backend"].split(",")
        assert told["losses"] == pytest.approx(alone[1]["losses"], rel=1e-5)


def test_fsdp_shards_on_the_device(together: list[list[dict[str, Any]]], alone: list[dict[str, Any]]) -> None:
    """The mesh is of the device's type, shards are on the rank's device, and units compute in the precision's dtype."""
    for rank, (_, told) in enumerate(together):
        assert told["meshes"] == [[DEVICE, 2]]
        assert told["parameters"] == [f"{DEVICE}:{rank}"]
        assert told["dtype"] == "torch.bfloat16"
        assert told["losses"] == pytest.approx(alone[1]["losses"], rel=0.05)


def test_a_barrier_holds_the_ranks(together: list[list[dict[str, Any]]]) -> None:
    """After ``lite.barrier()`` every rank has come to it, under either strategy."""
    assert [told["arrived"] for rank in together for told in rank] == [2, 2, 2, 2]


def test_the_command_line_knows_the_device(environment: dict[str, str], tmp_path: Path) -> None:
    """``list-plugins`` lists the accelerator as usable, and ``run --accelerator=accel`` plans the ranks on it."""
    listing = json.loads(run(environment, "-m", "plugframe", "list-plugins", "--kind", "accelerator", "--json"))
    assert "accel" in [entry["name"] for entry in listing]
    (tmp_path / "train.py").write_text("", encoding="utf-8")
    options = ("--accelerator=accel", "--devices=auto", "--precision=bf16-mixed", "--dry-run")
    plan = run(environment, "-m", "plugframe", "run", tmp_path / "train.py", *options)
    assert DEVICE in plan
    assert "2 ranks" in plan
