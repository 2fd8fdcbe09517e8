"""What Fabric's scripts import and call beside the methods of `Lite`."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffload, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
from torch.utils.data import DataLoader

import plugframe
from lightning_module import Lightning
from plugframe import CheckpointKeyError, CheckpointNotFoundError, SettingError, SettingTypeError
from plugframe.fabric import Fabric, is_wrapped, strategies
from plugframe.fabric.utilities import (
    AttributeDict,
    Throughput,
    ThroughputMonitor,
    measure_flops,
    move_data_to_device,
    suggested_max_num_workers,
)
from plugframe.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn


def on_one(**settings: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **settings)


def test_fabric_is_lite() -> None:
    """There is one class, under both names, and early Lite's positional arguments."""
    assert plugframe.Fabric is Fabric is plugframe.Lite
    with Fabric("cpu", "single", 1, 1, 32) as fabric:
        assert fabric.plan.choices["precision"].name == "32-true"


def test_exceptions_are_those_that_scripts_catch(tmp_path: Path) -> None:
    """A missing checkpoint, a missing key and a wrong type are Python's own errors too, with a plain message."""
    path = tmp_path / "a.ckpt"
    with on_one() as fabric:
        model = fabric.setup(nn.Linear(1, 1))
        with pytest.raises(FileNotFoundError, match="does not exist") as missing:
            fabric.load(path)
        assert type(missing.value) is CheckpointNotFoundError
        fabric.save(path, {"model": model, "step": 1})
        with pytest.raises(KeyError, match="missing: 'optimizer'") as key:
            fabric.load(path, {"model": model, "optimizer": 1})
        assert type(key.value) is CheckpointKeyError
        assert not str(key.value).startswith('"')
        for call in (
            partial(fabric.save, path, [model]),
            partial(fabric.load, path, [model]),
            partial(fabric.setup, "model"),
            partial(fabric.setup_dataloaders, "data"),
            partial(fabric.launch, "train"),
        ):
            with pytest.raises(TypeError) as wrong:
                call()
            assert type(wrong.value) is SettingTypeError


def test_a_filter_is_validated_before_anything_is_written(tmp_path: Path) -> None:
    """A filter is a dict of functions for keys of the state."""
    with on_one() as fabric:
        save = partial(fabric.save, tmp_path / "a.ckpt", {"model": fabric.setup(nn.Linear(1, 1)), "step": 1})
        with pytest.raises(TypeError, match="filter is a dict .* got list"):
            save(filter=["model"])
        with pytest.raises(KeyError, match="filter names 'modle', .*Did you mean 'model'"):
            save(filter={"modle": lambda name, value: True})
        with pytest.raises(TypeError, match=r"filter\['model'\] is a function"):
            save(filter={"model": "bias"})
        with pytest.raises(plugframe.CheckpointError, match="filter names 'step', which is an int and has no entries"):
            save(filter={"step": lambda name, value: True})
        assert not list(tmp_path.iterdir())
        save(filter={"model": lambda name, value: name == "bias"})
        assert list(fabric.load(tmp_path / "a.ckpt")["model"]) == ["bias"]


def test_a_module_has_a_device() -> None:
    """`model.device` is where the parameters are, unless the module has an attribute of that name."""

    class Own(nn.Linear):
        device = "mine"

    with on_one() as fabric:
        model, own, empty = fabric.setup(nn.Linear(1, 1)), fabric.setup(Own(1, 1)), fabric.setup(nn.ReLU())
        assert model.device == empty.device == torch.device("cpu")
        assert own.device == "mine"
        model.device = "set"
        assert model.device == "set"
    assert not hasattr(empty, "device")


def test_is_wrapped_ends_with_the_job() -> None:
    """What is set up counts as wrapped, until tear-down."""
    model, loader = nn.Linear(1, 1), DataLoader(range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    objects = (model, optimizer, loader)
    with on_one() as fabric:
        assert not any(map(is_wrapped, objects))
        fabric.setup(model, optimizer)
        fabric.setup_dataloaders(loader)
        assert all(map(is_wrapped, objects))
    assert not any(map(is_wrapped, objects))


def test_a_lightning_module_logs_and_steps_through_lite(tmp_path: Path) -> None:
    """`self.log`, `self.logger`, `self.optimizers`, `self.manual_backward` and hooks of a LightningModule work."""
    model = Lightning()
    before = model.layer.weight.item()
    with on_one(loggers=["csv"]) as fabric:
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
        assert model.logger is fabric.logger
        assert model.optimizers() is optimizer
        model.manual_step(torch.ones(1, 1))
        assert model.layer.weight.item() == pytest.approx(before - 1)
        fabric.call("on_train_epoch_end")
        assert model.epochs == 1
        assert copy.deepcopy(model)._fabric is None
    assert model._fabric is None
    assert model._fabric_optimizers == []


def test_replace_sampler_is_use_distributed_sampler() -> None:
    """Early Lite's name works, with a deprecation warning."""
    with on_one() as fabric:
        with pytest.warns(DeprecationWarning, match="write use_distributed_sampler=False"):
            fabric.setup_dataloaders(DataLoader(range(3)), replace_sampler=False)
        with pytest.raises(SettingError, match="got replace_sampler= as well"):
            fabric.setup_dataloaders(DataLoader(range(3)), replace_sampler=True, use_distributed_sampler=False)


def test_run_needs_no_guard(tmp_path: Path) -> None:
    """The ranks of an unguarded `run()` run the script; each goes on after it."""
    script = tmp_path / "early.py"
    script.write_text(
        "from plugframe import Lite\n"
        "class Early(Lite):\n"
        "    def run(self, x):\n"
        "        return x + self.global_rank\n"
        "print('result', Early('cpu', 'ddp', 2).run(3))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if "result" in line) == ["result 3", "result 4"]


def test_a_state_with_attributes(tmp_path: Path) -> None:
    """An `AttributeDict` is a dict with attributes, and a state to save and to load into."""
    state = AttributeDict(step=1)
    state.loss = 0.5
    assert state == {"step": 1, "loss": 0.5}
    assert repr(state) == "step: 1\nloss: 0.5"
    del state.loss
    with pytest.raises(AttributeError, match="has no key 'stop'. Did you mean 'step'"):
        state.stop  # noqa: B018
    with on_one() as fabric:
        fabric.save(tmp_path / "a.ckpt", state)
        state.step = 0
        fabric.load(tmp_path / "a.ckpt", state)
    assert state.step == 1


def test_throughput_over_a_window() -> None:
    """Rates are those of the window; those of the job are times the ranks."""
    throughput = Throughput(available_flops=1e3, world_size=2, window_size=3)
    assert throughput.compute() == {}
    for number in range(1, 5):
        throughput.update(time=2.0 * number, batches=number, samples=3 * number, lengths=30 * number, flops=100)
    found = throughput.compute()
    assert found["samples"] == 12
    assert (found["device/samples_per_sec"], found["samples_per_sec"]) == (1.5, 3.0)
    assert (found["items_per_sec"], found["device/flops_per_sec"], found["device/mfu"]) == (30.0, 50.0, 0.05)
    with pytest.raises(SettingError, match="total since the start, and was 8.0"):
        throughput.update(time=1.0, batches=5, samples=15, lengths=150, flops=1)
    with pytest.raises(SettingError, match="give it in all updates"):
        throughput.update(time=9.0, batches=5, samples=15)
    throughput.reset()
    assert throughput.compute() == {}
    with pytest.raises(SettingError, match="integer from 2"):
        Throughput(window_size=1)


def test_throughput_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A monitor logs the rates under the step."""
    monkeypatch.chdir(tmp_path)
    with on_one(loggers=["csv"]) as fabric:
        monitor = ThroughputMonitor(fabric, window_size=2)
        monitor.update(time=1.0, batches=1, samples=4)
        monitor.update(time=2.0, batches=2, samples=8)
        assert monitor.compute_and_log(step=7)["samples_per_sec"] == 4.0
    assert any("samples_per_sec" in file.read_text() for file in tmp_path.rglob("*.csv"))


def test_flops_of_a_model() -> None:
    """A forward of a linear layer is 2 × in × out operations a sample; its backward adds that of the weights."""
    model, x = nn.Linear(4, 3, bias=False), torch.ones(2, 4)
    assert measure_flops(model, lambda: model(x)) == 2 * 2 * 4 * 3
    assert measure_flops(model, lambda: model(x), torch.sum) == 2 * 2 * 2 * 4 * 3


def test_small_helpers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are moved; rank 0 alone speaks; workers are a share of the cores."""
    assert move_data_to_device({"x": [torch.ones(1)]}, "meta")["x"][0].is_meta
    assert suggested_max_num_workers(1000) == 1
    caplog.set_level(logging.INFO)
    rank_zero_info("hello %s", "there")
    with pytest.warns(UserWarning, match="careful") as warned:
        rank_zero_warn("careful")
    assert [warning.filename for warning in warned] == [__file__]
    monkeypatch.setenv("RANK", "1")
    rank_zero_info("again")
    rank_zero_warn("careful")
    assert caplog.messages == ["hello there"]


# ---------------------------------------------------------------------- strategies


def test_strategies_have_fabrics_names() -> None:
    """Every strategy class of Fabric that has an equal is there; another name says which is meant."""
    assert dir(strategies) == sorted(
        ("DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy")
    )
    with pytest.raises(AttributeError, match="Did you mean 'DDPStrategy'"):
        strategies.DPPStrategy  # noqa: B018


def test_ddp_strategy() -> None:
    """Options of torch's DDP are passed on; settings of the job are refused, with where they go."""
    strategy = strategies.DDPStrategy(find_unused_parameters=True, bucket_cap_mb=3, timeout=timedelta(seconds=1800))
    assert (type(strategy).__name__, strategy.bucket_cap_mb) == ("DDP", 3)
    with on_one(strategy=strategy) as fabric:
        assert fabric.plan.choices["strategy"].name == "ddp"
    for options, match in (
        ({"process_group_backend": "gloo"}, "pass collective="),
        ({"start_method": "spawn"}, "pass launcher="),
        ({"timeout": timedelta(seconds=5)}, "pass timeout_s="),
        ({"parallel_devices": [0]}, "pass devices="),
        ({"find_unused_paramters": True}, "Did you mean 'find_unused_parameters'"),
    ):
        with pytest.raises(SettingError, match=match):
            strategies.DDPStrategy(**options)
    with pytest.raises(SettingError, match="one of process_group= and timeout_s="):
        plugframe_ddp(process_group=object(), timeout_s=1.0)
    with pytest.raises(SettingError, match=r"accelerator='cuda', devices=\[1\]"):
        strategies.SingleDeviceStrategy("cuda:1")
    with on_one(strategy=strategies.SingleDeviceStrategy()) as fabric:
        assert fabric.plan.choices["strategy"].name == "single"


def plugframe_ddp(**options: Any) -> Any:
    from plugframe_builtins.ddp.strategy import DDP

    return DDP(**options)


def test_fsdp_strategy() -> None:
    """Arguments of the first FSDP become those of the second."""
    mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    strategy = strategies.FSDPStrategy(
        auto_wrap_policy={nn.Linear},
        activation_checkpointing_policy=ModuleWrapPolicy({nn.GELU}),
        sharding_strategy="SHARD_GRAD_OP",
        mixed_precision=mixed,
        cpu_offload=CPUOffload(offload_params=False),
        use_orig_params=True,
    )
    assert strategy.units == {nn.Linear}
    assert strategy.activation_checkpointing == {nn.GELU}
    assert strategy.reshard_after_forward is False
    assert strategy.mp_policy["param_dtype"] is torch.bfloat16
    assert not strategy.cpu_offload
    hybrid = strategies.FSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 4))
    assert hybrid.mesh == {"replicate": 2, "shard": 4}
    by_size = strategies.FSDPStrategy(auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=8))
    assert [by_size.units(nn.Linear(1, size, bias=False)) for size in (7, 8)] == [False, True]
    with pytest.warns(plugframe.PlugframeWarning, match="pass checkpoint='safetensors'"):
        strategies.FSDPStrategy(state_dict_type="full")
    for options, match in (
        ({"sharding_strategy": "NO_SHARD"}, "use strategy='ddp'"),
        ({"sharding_strategy": "HYBRID_SHARD"}, "go together"),
        ({"sharding_strategy": "SHARDED"}, "it is one of"),
        ({"ignored_modules": []}, "has no argument 'ignored_modules'"),
        ({"auto_wrap_policy": 3}, "takes classes of modules"),
    ):
        with pytest.raises(SettingError, match=match):
            strategies.FSDPStrategy(**options)


def test_deepspeed_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments go to options or into DeepSpeed's configuration; a configuration beside them is refused."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which deepspeed sets when it is imported
    pytest.importorskip("deepspeed")
    strategy = strategies.DeepSpeedStrategy(stage=3, offload_optimizer=True, contiguous_gradients=False, thread_count=2)
    assert (strategy.options.stage, strategy.options.offload_optimizer) == (3, "cpu")
    assert strategy._raw == {"zero_optimization": {"contiguous_gradients": False}, "aio": {"thread_count": 2}}
    with pytest.raises(SettingError, match="write those into the configuration"):
        strategies.DeepSpeedStrategy(config={}, thread_count=2)
    with pytest.raises(SettingError, match="has no argument 'remote_device'"):
        strategies.DeepSpeedStrategy(remote_device="nvme")


def test_model_parallel_strategy_refuses_what_it_cannot_do() -> None:
    """Sizes are validated, and a function that shards over the data axis itself, or makes another model, is refused."""
    make = strategies.ModelParallelStrategy
    with pytest.raises(SettingError, match="tensor_parallel_size=0"):
        make(lambda model, mesh: model, tensor_parallel_size=0)
    with pytest.raises(SettingError, match="pass checkpoint='safetensors'"):
        make(lambda model, mesh: model, save_distributed_checkpoint=False)

    def shards(model: Any, mesh: Any) -> Any:
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=mesh["data_parallel"])

    for function, match in (
        (shards, "leave it out"),
        (lambda model, mesh: nn.Linear(1, 1), "change the model in place"),
    ):
        with on_one(strategy=make(function)) as fabric, pytest.raises(plugframe.UsageError, match=match):
            fabric.setup(nn.Linear(1, 1))
