"""A job of many ranks on one machine: one rank that runs, and others that are taken to be like it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

import warm
from plugframe import Lite
from plugframe.cli import cli
from plugframe.errors import SettingError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.simulate.collective import SimulatedCollective
from plugframe_builtins.simulate.environment import Simulated
from plugframe_builtins.simulate.group import BACKEND, register
from plugframe_builtins.simulate.traffic import Traffic

SIZE = 8

SCRIPT = """
import os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from plugframe import Lite

lite = Lite()
if sys.argv[1:] == ["--mistake"]:
    DataLoader([1], batch_size=32 // lite.world_size)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = lite.setup(model, optimizer)
loader = lite.setup_dataloaders(DataLoader(TensorDataset(torch.randn(640, 64)), batch_size=2))
kept, state = lite.checkpoints("runs", keep_last=1), {"model": model, "optimizer": optimizer}
print("resumed", kept.resume(state))
print("world", lite.global_rank, lite.local_rank, lite.node_rank, lite.world_size, len(loader))
for (x,) in loader:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    lite.backward(loss)
    lite.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
print("gathered", tuple(lite.all_gather(loss).shape), lite.broadcast("x", src=3), lite.should_stop)
lite.barrier("end")
kept.save(1, state)
lite.save("one.ckpt", state, wait=False)
print("left", os.listdir())
"""


PIPELINE = """
import torch
from torch import nn
from plugframe import Lite

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        return self.down(self.up(x))

class Model(nn.Module):
    tensor_parallel_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        out = x.mean(1)
        loss = out.square().mean()
        return RETURNED

lite = Lite()
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = lite.setup(model, optimizer)
x = torch.ones(4, 8)
lite.backward(model(x).mean())
lite.clip_gradients(model, optimizer, max_norm=1.0)
optimizer.step()
model.eval()
with torch.no_grad():
    print("evaluated", tuple(model(x).shape))
"""


def simulate(folder: Path, *options: str, script: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "plugframe", "run", "--simulate", "64", *options, "train.py", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return warm.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("options", "shape", "parameters"),
    [
        ((), "64 nodes of 1", "264.4 kB"),
        (("--strategy=fsdp", "--checkpoint=dcp", "--devices=8", "--lockstep"), "8 nodes of 8", "4.132 kB"),
        (("--strategy=deepspeed", "--strategy.stage=3", "--num-nodes=16"), "16 nodes of 4", "264.4 kB"),
    ],
    ids=["ddp", "fsdp", "deepspeed"],
)
def test_a_strategy_runs_on_64_ranks(options: tuple[str, ...], shape: str, parameters: str, tmp_path: Path) -> None:
    """A script runs to its end as rank 0 of 64, saves nothing, and memory, time and traffic are told."""
    done = simulate(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert said[:3] == ["resumed False", "world 0 0 0 64 5", "gathered (64,) x False"]
    assert said[3] == "left ['train.py']"
    assert f"simulated: rank 0 of 64 on {shape}, alone." in done.stderr
    assert f"memory of this rank: parameters {parameters}" in done.stderr
    assert "for each of 4 steps after the first:" in done.stderr
    assert "not sent by this rank: " in done.stderr
    assert "Nothing is saved: the other ranks of this job are simulated." in done.stderr
    gathers = "all_reduce 1." if not options else "reduce_scatter 1.322 MB in 5 calls"
    assert gathers in done.stderr


def test_a_mesh_runs_on_64_ranks(tmp_path: Path) -> None:
    """Composed strategies and their mesh are those of the job, and what this rank holds is its part of both axes."""
    split = ("--strategy=fsdp+tensor_parallel", "--mesh", "data=16,tensor=4", "--strategy.plan=0=colwise,2=rowwise")
    done = simulate(tmp_path, *split)
    assert done.returncode == 0, done.stderr
    assert "fsdp+tensor_parallel on 64 × cpu on 64 nodes (data=16, tensor=4)" in done.stderr
    assert "world 0 0 0 64 20" in done.stdout
    assert "memory of this rank: parameters 4.144 kB" in done.stderr


@pytest.mark.parametrize("returns", ["loss", "outputs"])
def test_a_pipeline_runs_on_64_ranks(returns: str, tmp_path: Path) -> None:
    """This rank has the first stage, and what other stages send and return has the shapes of the job."""
    script = PIPELINE.replace("RETURNED", "loss" if returns == "loss" else "out")
    (tmp_path / "train.py").write_text(script)
    strategy = ["--strategy=fsdp+tensor_parallel+pipeline", "--mesh", "data=8,tensor=4,pipeline=2", "--devices=8"]
    command = [sys.executable, "-m", "plugframe", "run", "--simulate", "64", *strategy, "train.py"]
    done = warm.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 64 × cpu on 8 nodes (pipeline=2, data=8, tensor=4)" in done.stderr
    # Of 2 blocks: up has 2 x 8 and 2 of 4 parts, down 8 x 2 and, on all of them, 8; of those shards of 8 rows.
    assert "memory of this rank: parameters 100 B" in done.stderr
    assert "send 256 B in 4 calls" in done.stderr
    assert "unwaited" not in done.stderr
    assert f"evaluated {'()' if returns == 'loss' else '(4,)'}" in done.stdout


@pytest.mark.parametrize("keyword", ["environment", "plugins"])
def test_an_object_implies_what_its_name_does(keyword: str) -> None:
    """The collective that sends nothing and the costs; given beside it once more, or contradicted, as with the name."""
    made = {keyword: Simulated(ranks=SIZE)}
    for more in ({}, {"collective": "simulate"}, {"collective": SimulatedCollective()}):
        lite = Lite(accelerator="cpu", strategy="ddp", devices=4, **made, **more)
        assert lite.plan.choices["collective"].name == "simulate"
        assert [choice.name for choice in lite.plan.extensions] == ["costs"]
    with pytest.raises(SettingError, match="collective='torch' in the code, but 'simulate'.*stands for collective"):
        Lite(accelerator="cpu", strategy="ddp", collective="torch", **made)


def test_a_mistake_that_a_cluster_would_find_is_found(tmp_path: Path) -> None:
    """A batch size that 64 ranks leave nothing of ends the script with its own error, last on the terminal."""
    done = simulate(tmp_path, script=("--mistake",))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("should be a positive integer value, but got batch_size=0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--simulate", "64", "--num-nodes=9"], "64 ranks are to be simulated, which are not 9 nodes: type"),
        (["--simulate=64", "--devices=3"], "which are not 3 on each: type --simulate=63, or other --devices"),
        (["--simulate=64", "--devices=8", "--num-nodes=2"], "not 2 nodes of 8 on each: type --simulate=16"),
        (["--simulate=0"], "it is an integer from 1"),
        (["--simulate=many"], "it is an integer from 1"),
        (["--simulate", "--devices=2"], "--simulate needs a value: type --simulate=RANKS."),
        (["--simulate=64", "--collective=torch"], "collective='torch' in the command line"),
        (["--simulate=64", "--simulate=32"], "--environment.ranks is given twice, as"),
        (["--simulat=64"], "Did you mean '--simulate'?"),
        (["--environment=simulate"], "needs the number of ranks: type --simulate=64"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    """What does not fit is told in a line, before anything runs."""
    script = tmp_path / "train.py"
    script.write_text("")
    result = CliRunner().invoke(cli, ["run", *words, "--dry-run", str(script)])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_a_dry_run_shows_the_job(tmp_path: Path) -> None:
    """What would run is resolved for all ranks, on a machine without their devices."""
    script = tmp_path / "train.py"
    script.write_text("")
    result = CliRunner().invoke(cli, ["run", "--simulate=64", "--devices=8", "--dry-run", str(script)])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "8 on each node" in shown
    assert "the first of this machine stands for all" in shown
    assert "64 ranks in all" in shown
    assert "costs (plugframe" in shown


@pytest.fixture
def traffic() -> Iterator[Traffic]:
    """Create a process group of eight ranks; this process is rank 0."""
    counted = Traffic()
    register(counted)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(BACKEND, rank=0, world_size=SIZE, store=store)
    yield counted
    dist.destroy_process_group()


def test_others_are_taken_to_have_what_this_rank_has(traffic: Traffic) -> None:
    """Every collective gives what it would if all ranks had handed in the same."""
    x = torch.tensor([1.0, 2.0])
    for op, expected in (("SUM", 8 * x), ("AVG", x), ("MAX", x), ("PRODUCT", x**8)):
        y = x.clone()
        dist.all_reduce(y, getattr(dist.ReduceOp, op))
        assert torch.equal(y, expected), op
    rows = [torch.zeros(2) for _ in range(SIZE)]
    dist.all_gather(rows, x)
    assert all(torch.equal(row, x) for row in rows)
    mine = torch.zeros(())
    dist.reduce_scatter(mine, list(torch.arange(8.0).unbind()))
    assert mine.item() == 0.0
    dist.reduce_scatter(mine, list(torch.arange(1.0, 9.0).unbind()))
    assert mine.item() == 8.0
    dist.broadcast(x, src=3)
    assert x.tolist() == [1.0, 2.0]
    out = torch.empty(16)
    dist.all_to_all_single(out, torch.arange(16.0))
    assert out.tolist() == [0.0, 1.0] * 8
    dist.barrier()
    objects: list[Any] = [None] * SIZE
    dist.all_gather_object(objects, {"a": 1})
    assert objects == [{"a": 1}] * SIZE
    assert "all_reduce 32 B in 4 calls" in traffic.lines()
    assert "all_to_all 64 B in 1 calls" in traffic.lines()


@pytest.fixture
def collective() -> Iterator[SimulatedCollective]:
    """Set up the collective of rank 0 of eight."""
    hooks = SimpleNamespace(
        environment_store=lambda context, timeout_s: dist.HashStore(),  # type: ignore[attr-defined]
        accelerator_collective_backend=lambda: "gloo",
    )
    context = Context(
        world=World(world_size=SIZE, local_world_size=SIZE),
        device=torch.device("cpu"),
        hooks=hooks,
        names={"collective": "simulate"},
        provides={"collective": ("simulated",)},
    )
    made = SimulatedCollective()
    made.collective_setup(context=context)
    yield made
    made.collective_teardown()


@pytest.mark.parametrize("many", [1, 1000])
def test_what_another_rank_would_send_is_zeros_or_what_this_one_has(collective: SimulatedCollective, many: int) -> None:
    """Every call returns initialised values of the right shape and dtype, however large, and is counted."""
    c, x = collective, torch.arange(1.0, 1.0 + many)
    c.collective_send(tensor=x, dst=3, tag=0, group=None)
    received = c.collective_recv(tensor=torch.full_like(x, torch.nan), src=3, tag=0, group=None)
    assert torch.equal(received, torch.zeros(many))
    stack = torch.arange(float(SIZE)).unsqueeze(1).expand(SIZE, many) + 5
    assert torch.equal(c.collective_scatter(tensor=stack, src=0, group=None), torch.full((many,), 5.0))
    assert torch.equal(c.collective_scatter(tensor=x * torch.nan, src=3, group=None), torch.zeros(many))
    rows = c.collective_all_to_all(tensor=stack, output_sizes=None, input_sizes=None, group=None, sync_grads=False)
    assert torch.equal(rows, torch.full((SIZE, many), 5.0))
    assert c.collective_gather_object(obj="x" * many, dst=0, group=None) == ["x" * many] * SIZE
    assert c.collective_gather_object(obj="x" * many, dst=3, group=None) is None
    with pytest.raises(SettingError, match="dst=0 is this rank"):
        c.collective_send(tensor=x, dst=0, tag=0, group=None)


def test_rows_of_other_ranks_have_the_sizes_that_are_expected(collective: SimulatedCollective) -> None:
    """Sizes of an all-to-all are not compared with ranks that do not exist; missing rows are zeros."""
    sent, output = [1, 2, 0, 0, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0, 0, 0]
    x = torch.arange(1.0, 301.0).view(3, 100).requires_grad_()
    found = collective.collective_all_to_all(
        tensor=x, output_sizes=output, input_sizes=sent, group=None, sync_grads=True
    )
    assert found.shape == (4, 100)
    assert torch.equal(found[:2], x.detach()[:1].expand(2, 100))
    assert torch.equal(found[2:], torch.zeros(2, 100))
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert any(line.startswith("all_to_all") for line in collective._traffic.lines())
