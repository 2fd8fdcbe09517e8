"""The built-in accelerators: what each says of its devices, asked with and without such a device."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plugframe import Plugin, SettingError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins import accel, cpu, cuda, gpu, mps
from plugframe_builtins.accel.accelerator import TorchAccelerator
from plugframe_builtins.cpu.accelerator import CPU
from plugframe_builtins.cuda.accelerator import CUDA
from plugframe_builtins.mps.accelerator import MPS

ACCELERATORS = {"cpu": cpu.plugin, "cuda": cuda.plugin, "mps": mps.plugin, "accel": accel.plugin}
LIGHT = (
    *("accel", "bf16", "cpu", "csv_logger", "cuda", "fp16", "fp32", "fp64", "gpu", "mps", "profiler"),
    "tensorboard_logger",
)


def context_of(device: torch.device) -> Context:
    return Context(world=World(), device=device, hooks=SimpleNamespace(), names={})


def test_descriptors_import_nothing_heavy(run_python: Callable[[str], str]) -> None:
    """Loading every descriptor imports neither torch nor an implementation."""
    modules = [f"plugframe_builtins.{name}" for name in LIGHT]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "print([m for m in sys.modules if m in ('torch', 'numpy', 'tensorboard')"
        " or m.startswith('plugframe_builtins.') and m.count('.') > 1])"
    )
    assert run_python(code).strip() == "[]"


def test_descriptors_name_what_exists() -> None:
    """Every descriptor has a summary, and its factory makes the object with the options given."""
    for name in LIGHT:
        module = importlib.import_module(f"plugframe_builtins.{name}")
        descriptors = [value for value in vars(module).values() if isinstance(value, Plugin)]
        assert descriptors
        for descriptor in descriptors:
            assert descriptor.summary.endswith(".") or ":" in descriptor.summary
            if descriptor.factory:
                where, _, what = descriptor.factory.partition(":")
                getattr(importlib.import_module(where), what)(**descriptor.preset)


def test_auto_prefers_the_dedicated_accelerator() -> None:
    """Under ``auto`` a dedicated accelerator comes before the generic one, and the processor last."""
    order = sorted(ACCELERATORS, key=lambda name: -(ACCELERATORS[name].priority or 0))
    assert order == ["cuda", "mps", "accel", "cpu"]
    assert gpu.plugin.best_of == "gpu"
    assert [name for name, plugin in ACCELERATORS.items() if "gpu" in plugin.tags] == ["cuda", "mps", "accel"]


def test_accelerators_can_be_pickled() -> None:
    """An accelerator given as an object travels to started ranks."""
    for make in (CPU, CUDA, MPS, TorchAccelerator):
        assert type(pickle.loads(pickle.dumps(make()))) is make


class TestCPU:
    """The processor."""

    @pytest.fixture(autouse=True)
    def no_accelerator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """``torch.accelerator`` raises on a machine without one, so the processor must not ask it."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("torch.accelerator was asked")

        for name in torch.accelerator.__all__:
            monkeypatch.setattr(torch.accelerator, name, refuse)

    def test_devices(self) -> None:
        """Any number of processes shares the one device; ``auto`` is one process."""
        accelerator = CPU()
        assert accelerator.accelerator_is_available()
        assert accelerator.accelerator_parse_devices("auto") == (0,)
        assert len(accelerator.accelerator_parse_devices(7)) == 7
        assert accelerator.accelerator_device(3) == torch.device("cpu")
        with pytest.raises(SettingError, match=r"devices=\[0, 1\] does not fit accelerator 'cpu'"):
            accelerator.accelerator_parse_devices([0, 1])

    def test_hooks(self) -> None:
        """The other hooks answer for the processor, and a batch stays where and what it is."""
        accelerator, device = CPU(), torch.device("cpu")
        accelerator.accelerator_setup(context_of(device))
        batch = {"x": torch.ones(2)}
        assert accelerator.accelerator_move_batch(batch, device) is batch
        assert accelerator.accelerator_autocast_type() == "cpu"
        assert accelerator.accelerator_collective_backend() == "gloo"
        assert accelerator.accelerator_supports_dtype(torch.bfloat16, device)
        assert accelerator.accelerator_rng_state(device) is None
        accelerator.accelerator_synchronize(device)
        accelerator.accelerator_teardown()

    def test_memory(self) -> None:
        """Memory figures are bytes of this process, and the peak is never below what is in use."""
        stats = CPU().accelerator_memory_stats(torch.device("cpu"))
        assert 20 * 2**20 < stats["allocated_bytes"] <= stats["peak_allocated_bytes"] < 2**40

    def test_memory_without_proc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the resident size is not to be had, the peak stands for it."""
        monkeypatch.setattr("plugframe_builtins.cpu.accelerator._resident_bytes", lambda: None)
        stats = CPU().accelerator_memory_stats(torch.device("cpu"))
        assert stats["allocated_bytes"] == stats["peak_allocated_bytes"] > 20 * 2**20


class TestCUDA:
    """NVIDIA GPUs, simulated."""

    def test_availability_does_not_start_the_runtime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Availability and count come from the device count alone, which does not start CUDA here."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("this would start CUDA"))
        monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("this would start CUDA"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        accelerator = CUDA()
        assert accelerator.accelerator_is_available()
        assert accelerator.accelerator_parse_devices(-1) == (0, 1, 2, 3)
        assert accelerator.accelerator_device(2) == torch.device("cuda", 2)
        with pytest.raises(SettingError, match="a count from 1 to 4"):
            accelerator.accelerator_parse_devices(5)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert not accelerator.accelerator_is_available()

    def test_backend(self) -> None:
        """Tensors travel by NCCL, objects on the processor by gloo."""
        assert CUDA().accelerator_collective_backend() == "cpu:gloo,cuda:nccl"

    def test_bfloat16_is_asked_of_that_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """bfloat16 counts only if that very device computes in it; emulation does not."""
        current: list[torch.device] = []

        @contextmanager
        def device(of: torch.device) -> Iterator[None]:
            current.append(of)
            yield
            current.pop()

        def supported(including_emulation: bool = True) -> bool:
            return including_emulation or current[-1].index == 1

        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        accelerator = CUDA()
        assert not accelerator.accelerator_supports_dtype(torch.bfloat16, torch.device("cuda", 0))
        assert accelerator.accelerator_supports_dtype(torch.bfloat16, torch.device("cuda", 1))
        assert accelerator.accelerator_supports_dtype(torch.float16, torch.device("cuda", 0))

    def test_teardown_without_setup(self) -> None:
        """Tear-down after a set-up that never ran does nothing."""
        CUDA().accelerator_teardown()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="there is no CUDA device")
class TestRealCUDA:
    """NVIDIA GPUs, for real."""

    def test_a_fork_can_use_the_gpu_after_the_question(self, run_python: Callable[[str], str]) -> None:
        """After availability was asked, CUDA is not started, and a forked child can start it."""
        code = (
            "import os, torch\n"
            "from plugframe_builtins.cuda.accelerator import CUDA\n"
            "a = CUDA()\n"
            "assert a.accelerator_is_available() and a.accelerator_device_count() > 0\n"
            "assert not torch.cuda.is_initialized()\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    os._exit(0 if torch.ones(1, device='cuda').item() == 1 else 1)\n"
            "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        )
        assert run_python(code).strip() == "0"

    def test_setup_and_teardown(self) -> None:
        """Set-up makes the device current, tear-down goes back to the one before and frees cached memory."""
        last = torch.cuda.device_count() - 1
        accelerator, device, before = CUDA(), torch.device("cuda", last), torch.cuda.current_device()
        accelerator.accelerator_setup(context_of(device))
        assert torch.cuda.current_device() == last
        tensor = accelerator.accelerator_move_batch({"x": torch.ones(2**20).pin_memory()}, device)["x"]
        assert tensor.device == device
        stats = accelerator.accelerator_memory_stats(device)
        assert 2**22 <= stats["allocated_bytes"] <= stats["peak_allocated_bytes"] <= stats["total_bytes"]
        accelerator.accelerator_synchronize(device)
        del tensor
        accelerator.accelerator_teardown()
        assert torch.cuda.current_device() == before
        assert accelerator.accelerator_memory_stats(device)["reserved_bytes"] == torch.cuda.memory_reserved(device)

    def test_random_state(self) -> None:
        """What was drawn comes again after the state is put back, and after the same seed."""
        accelerator, device = CUDA(), torch.device("cuda", 0)
        state = accelerator.accelerator_rng_state(device)
        assert state is not None
        assert state.device.type == "cpu"
        first = torch.rand(4, device=device)
        accelerator.accelerator_set_rng_state(state, device)
        assert torch.equal(torch.rand(4, device=device), first)
        accelerator.accelerator_seed(5)
        first = torch.rand(4, device=device)
        accelerator.accelerator_seed(5)
        assert torch.equal(torch.rand(4, device=device), first)

    def test_the_generic_accelerator_serves_it(self) -> None:
        """The generic accelerator works on a GPU that has a dedicated one."""
        accelerator = TorchAccelerator()
        assert accelerator.accelerator_is_available()
        device = accelerator.accelerator_device(0)
        accelerator.accelerator_setup(context_of(device))
        tensor = torch.ones(2**20, device=device)
        assert accelerator.accelerator_memory_stats(device)["allocated_bytes"] >= 2**22
        assert accelerator.accelerator_supports_dtype(torch.float32, device)
        assert accelerator.accelerator_rng_state(device) is not None
        accelerator.accelerator_synchronize(device)
        assert accelerator.accelerator_collective_backend() == "cpu:gloo,cuda:nccl"
        del tensor
        accelerator.accelerator_teardown()


class TestMPS:
    """The GPU of a Mac, simulated."""

    def test_one_device_with_single_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is one device; it has no float64, and bfloat16 from macOS 14 on."""
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major < 14)
        accelerator, device = MPS(), torch.device("mps", 0)
        assert accelerator.accelerator_is_available()
        assert accelerator.accelerator_parse_devices("auto") == (0,)
        assert accelerator.accelerator_device(0) == device
        assert accelerator.accelerator_collective_backend() == "gloo"
        assert accelerator.accelerator_supports_dtype(torch.float16, device)
        assert not accelerator.accelerator_supports_dtype(torch.float64, device)
        assert not accelerator.accelerator_supports_dtype(torch.bfloat16, device)
        with pytest.raises(SettingError, match="devices=2 does not fit accelerator 'mps'"):
            accelerator.accelerator_parse_devices(2)

    def test_random_state_and_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The generator's state and the memory figures are those of Metal."""
        box = {"state": torch.arange(4, dtype=torch.uint8)}
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda: box["state"])
        monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: box.update(state=state))
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 5)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 9)
        accelerator, device = MPS(), torch.device("mps", 0)
        state = accelerator.accelerator_rng_state(device)
        assert state is not None
        accelerator.accelerator_set_rng_state(state + 1, device)
        assert torch.equal(box["state"], torch.arange(1, 5, dtype=torch.uint8))
        stats = accelerator.accelerator_memory_stats(device)
        assert stats == {"allocated_bytes": 5, "peak_allocated_bytes": 9}


class TestAccel:
    """Whatever torch.accelerator finds."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Simulate three devices of the type ``privateuseone`` and record what is asked of them."""
        calls: list[Any] = []

        @contextmanager
        def device_index(index: int) -> Iterator[None]:
            calls.append(f"enter {index}")
            yield
            calls.append(f"leave {index}")

        def figure(value: int) -> Callable[[Any], int]:
            return lambda device: value

        module = SimpleNamespace(
            get_rng_state=lambda device: torch.zeros(3, dtype=torch.uint8),
            set_rng_state=lambda state, device: calls.append(state.tolist()),
        )
        fakes = {
            "current_accelerator": lambda: torch.device("privateuseone"),
            "device_count": lambda: 3,
            "device_index": device_index,
            "empty_cache": lambda: calls.append("empty_cache"),
            "synchronize": calls.append,
            "memory_allocated": figure(1),
            "max_memory_allocated": figure(2),
            "memory_reserved": figure(3),
            "max_memory_reserved": figure(4),
            "get_device_capability": lambda device: {"supported_dtypes": {torch.float32}},
            "is_available": lambda: pytest.fail("this may start the device's runtime"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.accelerator, name, fake)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        return calls

    def test_not_available_without_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a machine with a processor alone it can be made, and says that there is no device."""
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
        accelerator = TorchAccelerator()
        assert not accelerator.accelerator_is_available()
        accelerator.accelerator_teardown()

    def test_devices(self, calls: list[Any]) -> None:
        """Type, count and dtypes are those torch reports of its accelerator."""
        accelerator = TorchAccelerator()
        assert accelerator.accelerator_is_available()
        assert accelerator.accelerator_parse_devices("auto") == (0, 1, 2)
        device = accelerator.accelerator_device(1)
        assert device == torch.device("privateuseone", 1)
        assert accelerator.accelerator_autocast_type() == "privateuseone"
        assert accelerator.accelerator_supports_dtype(torch.float32, device)
        assert not accelerator.accelerator_supports_dtype(torch.float64, device)
        assert calls == []

    def test_every_dtype_where_torch_does_not_know(self, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """In a torch that cannot be asked about dtypes, none is refused."""
        monkeypatch.delattr(torch.accelerator, "get_device_capability")
        assert TorchAccelerator().accelerator_supports_dtype(torch.float64, torch.device("privateuseone", 0))

    def test_current_device(self, calls: list[Any]) -> None:
        """Set-up makes the rank's device current; tear-down empties the cache and goes back, once."""
        accelerator = TorchAccelerator()
        device = accelerator.accelerator_device(2)
        accelerator.accelerator_setup(context_of(device))
        accelerator.accelerator_synchronize(device)
        accelerator.accelerator_teardown()
        accelerator.accelerator_teardown()
        assert calls == ["enter 2", device, "empty_cache", "leave 2"]

    def test_backend(self, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """The backend is the one registered for the device type, beside gloo; without one it is gloo."""
        backends = dict(torch.distributed.Backend.default_device_backend_map)
        monkeypatch.setattr(torch.distributed.Backend, "default_device_backend_map", backends)
        accelerator = TorchAccelerator()
        assert accelerator.accelerator_collective_backend() == "gloo"
        backends["privateuseone"] = "acme"
        assert accelerator.accelerator_collective_backend() == "cpu:gloo,privateuseone:acme"
        for device_type, backend in (("xpu", "cpu:gloo,xpu:xccl"), ("mps", "gloo")):
            accelerator.device_type = device_type
            assert accelerator.accelerator_collective_backend() == backend

    def test_random_state_and_memory(self, calls: list[Any]) -> None:
        """State and figures are the device module's; a function it does not have is left out."""
        accelerator, device = TorchAccelerator(), torch.device("privateuseone", 0)
        state = accelerator.accelerator_rng_state(device)
        assert state is not None
        accelerator.accelerator_set_rng_state(state + 1, device)
        accelerator.accelerator_seed(3)
        assert calls == [[1, 1, 1]]
        assert accelerator.accelerator_memory_stats(device) == {
            "allocated_bytes": 1,
            "peak_allocated_bytes": 2,
            "reserved_bytes": 3,
            "peak_reserved_bytes": 4,
        }
