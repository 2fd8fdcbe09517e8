"""The accelerator contract suite: availability, ``devices`` parsing, device properties and clean-up."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn

from plugframe.errors import PlugframeError, SettingError
from plugframe.hooks.context import Context
from plugframe.testing.contracts.accelerator_probe import answers
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.placed import context_of, is_here, takes
from plugframe.testing.contracts.running import broken, chosen, left, one_line, running, traces

ASKED = "Asked (availability and count work in any process and start nothing that a fork would break)"
DEVICES = "Devices (devices= is a count, -1, 'auto', a list of indices, or any of them as a string)"
REFUSED = "Refused (an invalid value of devices= is a SettingError with the value and what is allowed)"
DEVICE = "Device (each index is one device, of a type that its descriptor lists)"
DTYPES = "Dtypes (a supported dtype is computed in)"
AUTOCAST = "Autocast (torch.autocast accepts the type it returns, and casts on this device)"
BACKEND = "Backend (the backend it returns serves tensors on the device and objects on the CPU)"
MOVED = "Moved (a nested batch is moved to the device, and values other than tensors are unchanged)"
SEEDED = "Seeded (the same seed, or the same state of the generator, draws the same numbers)"
MEMORY = "Memory (figures are bytes, and the peak is never below what is in use)"
TRAINING = "Training (a run under Lite computes on the device that was asked for)"
CLEAN = "Law 9 (nothing is left behind)"


class _Pair(NamedTuple):
    value: Any
    label: str


@dataclasses.dataclass
class _Batch:
    x: Any
    note: str


class AcceleratorContract(PluginContract):
    """Subclass it and set `spec`. Most tests are skipped where the machine has no such device.

    Attributes:
        dtypes: those to test, as far as it supports them.
    """

    kind = "accelerator"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    @functools.cached_property
    def plugin(self) -> Any:
        """A plugin whose devices exist here; the test is skipped where there are none."""
        plugin = self.make()
        if not is_here(plugin):
            pytest.skip(f"This machine has no device of accelerator {self.entry.name!r}.")
        return plugin

    @property
    def device(self) -> torch.device:
        """The first device."""
        found: torch.device = self.plugin.accelerator_device(index=self.indices[0])
        return found

    @property
    def indices(self) -> tuple[int, ...]:
        """The indices of one device."""
        found: tuple[int, ...] = self.plugin.accelerator_parse_devices(devices=1)
        return found

    @property
    def count(self) -> int:
        """The number of devices."""
        found: int = self.plugin.accelerator_device_count()
        return found

    @property
    def shared(self) -> bool:
        """Whether more ranks than devices are accepted, as on a CPU."""
        return takes(self.plugin, self.count + 1)

    def context(self) -> Context:
        """Return the context of a job of one rank."""
        return context_of(self.plugin, device=self.device, names={self.kind: self.entry.name})

    # ------------------------------------------------------------------ before any process exists

    def test_it_can_be_asked_anywhere(self) -> None:
        """In a fresh process availability is a bool, and a fork of that process can use the device."""
        self.make()
        try:
            found = answers(self.spec, self.options)
        except RuntimeError as error:
            broken(ASKED, f"in a process that only asks, it ended with {error}")
        if found["type"] != "bool":
            broken(ASKED, f"accelerator_is_available() gave a {found['type']}, not True or False")
        if found["available"] and (not isinstance(found["count"], int) or found["count"] < 1):
            broken(ASKED, f"it is available, and accelerator_device_count() gave {found['count']!r}, not 1 or more")
        if found["fork"]:
            broken(ASKED, f"after it was asked, a forked process could not use the device: {found['fork']}")

    def test_asking_leaves_nothing(self) -> None:
        """Queries, and a tear-down without a set-up, do not change the process."""
        plugin = self.make()
        before = traces()
        is_here(plugin)
        try:
            plugin.accelerator_teardown()
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(CLEAN, f"tear-down without a set-up raised {one_line(error)}")
        found = left(before, traces())
        if found:
            broken(CLEAN, f"after it was asked, and torn down without a set-up, {found}")

    # ------------------------------------------------------------------ devices

    def test_devices_are_read(self) -> None:
        """1, "1", -1, "-1", "auto" and lists give the indices that they describe."""
        count = self.count
        everything = tuple(range(count))
        expected: dict[Any, tuple[int, ...] | None] = {1: None, "1": None, count: None, f"{count}": None}
        expected |= {-1: everything, "-1": everything, "auto": everything, " auto ": everything}
        for devices, wanted in expected.items():
            try:
                found = self.plugin.accelerator_parse_devices(devices=devices)
            except Exception as error:  # noqa: BLE001 - reported as it is
                broken(DEVICES, f"devices={devices!r} raised {one_line(error)}")
            if not isinstance(found, tuple) or not all(type(index) is int for index in found):
                broken(DEVICES, f"devices={devices!r} gave {found!r}, not a tuple of indices")
            size = int(devices) if wanted is None else count
            if len(found) != size or (wanted is not None and found != wanted):
                broken(DEVICES, f"devices={devices!r} gave {found!r} where there are {count} devices")
        for value, wanted in {(0,): (0,), (count - 1,): (count - 1,), everything[::-1]: everything[::-1]}.items():
            for devices in (list(value), value, ",".join(map(str, value)) + ","):
                try:
                    found = self.plugin.accelerator_parse_devices(devices=devices)
                except SettingError:
                    if self.shared:
                        continue  # devices that any number of ranks share need have no indices
                    broken(DEVICES, f"devices={devices!r} was refused where there are {count} devices")
                if found != wanted:
                    broken(DEVICES, f"devices={devices!r} gave {found!r}")

    @pytest.mark.parametrize(
        "devices",
        [0, -2, "0", "two", "", "1.5", 1.5, None, True, [], [0, 0], [-1], [0.0], ["0"], [True], "0,0", "0;1", {}],
        ids=repr,
    )
    def test_wrong_devices_are_refused(self, devices: Any) -> None:
        """A value that is neither a count nor a list of indices is a one-line SettingError that shows it."""
        self._refuses(devices)

    def test_more_devices_than_there_are_are_refused(self) -> None:
        """A count or an index beyond the last device is refused, unless ranks share devices."""
        if self.shared:
            pytest.skip("Any number of ranks shares its devices.")
        for devices in (self.count + 1, str(self.count + 1), [self.count], f"{self.count},"):
            self._refuses(devices)

    def _refuses(self, devices: Any) -> None:
        try:
            found = self.plugin.accelerator_parse_devices(devices=devices)
        except SettingError as error:
            if repr(devices) not in str(error):
                broken(REFUSED, f"devices={devices!r} was refused, and the message does not show it: {error}")
            if "\n" in str(error).strip():
                broken(REFUSED, f"devices={devices!r} was refused in several lines: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(REFUSED, f"devices={devices!r} raised {one_line(error)}")
        else:
            broken(REFUSED, f"devices={devices!r} was accepted, as {found!r}")

    def test_an_index_stands_for_a_device(self) -> None:
        """An index always gives the same device, of a type its descriptor lists; two indices give two devices."""
        indices = self.plugin.accelerator_parse_devices(devices="auto")
        devices = [self.plugin.accelerator_device(index=index) for index in indices]
        if not all(isinstance(device, torch.device) for device in devices):
            broken(DEVICE, f"accelerator_device() gave {devices!r}, not a torch.device")
        if devices != [self.plugin.accelerator_device(index=index) for index in indices]:
            broken(DEVICE, "the same index gave another device when asked again")
        listed = self.descriptor.devices
        for device in devices:
            if listed and device.type not in listed:
                broken(DEVICE, f"it gave {device}, and its descriptor says devices={listed!r}")
        if not self.shared and len(set(map(str, devices))) != len(devices):
            broken(DEVICE, f"{len(indices)} indices are the devices {sorted(set(map(str, devices)))}")

    # ------------------------------------------------------------------ properties of a device

    def test_dtypes_it_supports_are_computed_in(self) -> None:
        """float32 is supported, every result is a bool, and a matrix product in a supported dtype keeps it."""
        for dtype in self.dtypes:
            answer = self.plugin.accelerator_supports_dtype(dtype=dtype, device=self.device)
            if not isinstance(answer, bool):
                broken(DTYPES, f"accelerator_supports_dtype({dtype}) gave {answer!r}, not True or False")
            if dtype is torch.float32 and not answer:
                broken(DTYPES, "it does not support torch.float32, in which every script begins")
            if not answer:
                continue
            try:
                ones = torch.ones(4, 4, device=self.device).to(dtype)
                product = ones @ ones
            except Exception as error:  # noqa: BLE001 - reported as it is
                broken(DTYPES, f"it supports {dtype}, and a matrix product raised {one_line(error)}")
            if product.dtype is not dtype or product.float().cpu().sum().item() != 64.0:
                broken(DTYPES, f"it supports {dtype}, and a product of ones gave {product}")

    def test_autocast_knows_its_type(self) -> None:
        """torch.autocast accepts the type, and a linear layer inside it computes in the lower dtype."""
        kind = self.plugin.accelerator_autocast_type()
        if not isinstance(kind, str) or not _autocasts(kind):
            broken(AUTOCAST, f"accelerator_autocast_type() gave {kind!r}, which torch.autocast does not know")
        if not self.plugin.accelerator_supports_dtype(dtype=torch.bfloat16, device=self.device):
            pytest.skip("It does not compute in bfloat16.")
        layer, x = nn.Linear(2, 2).to(self.device), torch.ones(1, 2, device=self.device)
        with torch.autocast(kind, torch.bfloat16):
            out = layer(x)
        if out.dtype is not torch.bfloat16:
            broken(AUTOCAST, f"inside torch.autocast({kind!r}, torch.bfloat16) a layer computed in {out.dtype}")

    def test_its_backend_is_one(self) -> None:
        """The backend is one of torch.distributed, or a list of one per device type, the CPU's included."""
        backend = self.plugin.accelerator_collective_backend()
        if not isinstance(backend, str) or not backend:
            broken(BACKEND, f"accelerator_collective_backend() gave {backend!r}, not the name of a backend")
        by_type = dict.fromkeys(("cpu", self.device.type), backend)
        if ":" in backend:
            by_type = {part.partition(":")[0]: part.partition(":")[2] for part in backend.split(",")}
        for kind in ("cpu", self.device.type):
            if not by_type.get(kind):
                broken(BACKEND, f"{backend!r} has no backend for {kind}")
        unknown = [name for name in by_type.values() if name not in torch.distributed.Backend.backend_list]
        if unknown:
            broken(BACKEND, f"{backend!r} names {unknown[0]!r}, which torch.distributed does not know")

    def test_batches_are_moved(self) -> None:
        """Nested tensors are moved; containers keep their types; a tensor that is on the device is not copied."""
        move, index = self.plugin.accelerator_move_batch, torch.arange(3)
        other = object()
        batch = {
            "a": (torch.ones(2), "text"),
            "b": [index, {"c": _Pair(index, "x")}],
            "d": _Batch(index, "y"),
            "o": other,
        }
        found = move(batch=batch, device=self.device)
        tensors = (found["a"][0], found["b"][0], found["b"][1]["c"].value, found["d"].x)
        wrong = sorted({str(tensor.device) for tensor in tensors if tensor.device != self.device})
        if wrong:
            broken(MOVED, f"tensors of a batch are on {', '.join(wrong)}, and the device is {self.device}")
        shown = (type(found["a"]), type(found["b"][1]["c"]), type(found["d"]), found["d"].note, found["a"][1])
        if shown != (tuple, _Pair, _Batch, "y", "text") or found["o"] is not other:
            broken(MOVED, f"containers or values of a batch were changed: {shown}, {found['o']!r}")
        if tensors[1].dtype is not torch.int64 or tensors[1].tolist() != [0, 1, 2]:
            broken(MOVED, f"tensor([0, 1, 2]) arrived as {tensors[1]}")
        again = move(batch=found, device=self.device)
        if again["a"][0] is not found["a"][0]:
            broken(MOVED, "a tensor that was on the device already was copied: it is in the hot path")
        for value in (3, "text", None):
            if move(batch=value, device=self.device) is not value:
                broken(MOVED, f"a batch {value!r} was changed")

    def test_seeds_and_states_repeat_numbers(self) -> None:
        """The device draws the same numbers after the same seed, and after its generator state is restored."""
        plugin, device = self.plugin, self.device

        def seeded() -> list[float]:
            torch.manual_seed(7)
            plugin.accelerator_seed(seed=7)
            return self._drawn()

        if seeded() != seeded():
            broken(SEEDED, "after the same seed other numbers are drawn")
        state = plugin.accelerator_rng_state(device=device)
        if state is None:
            return  # the state of torch's CPU generator is saved without it
        if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8 or state.device.type != "cpu":
            broken(SEEDED, f"accelerator_rng_state() gave {type(state).__name__}, not a uint8 tensor on the CPU")
        kept = state.clone()
        first = self._drawn()
        if not torch.equal(state, kept):
            broken(SEEDED, "the state that accelerator_rng_state() gave changes while numbers are drawn: copy it")
        plugin.accelerator_set_rng_state(state=state, device=device)
        if self._drawn() != first:
            broken(SEEDED, "after the generator's state is restored other numbers are drawn")

    def _drawn(self) -> list[float]:
        drawn: list[float] = torch.rand(4, device=self.device).cpu().tolist()
        return drawn

    def test_memory_figures_are_bytes(self) -> None:
        """Both figures are non-negative integers, and the peak is not the smaller; synchronizing is allowed."""
        held = torch.ones(1 << 18, device=self.device)
        self.plugin.accelerator_synchronize(device=self.device)
        stats = self.plugin.accelerator_memory_stats(device=self.device)
        for name in ("allocated_bytes", "peak_allocated_bytes"):
            if type(stats.get(name)) is not int or stats[name] < 0:
                broken(MEMORY, f"accelerator_memory_stats()[{name!r}] is {stats.get(name)!r}, not a number of bytes")
        if stats["peak_allocated_bytes"] < stats["allocated_bytes"]:
            broken(MEMORY, f"the peak is below what is in use: {stats}")
        del held

    # ------------------------------------------------------------------ set-up, tear-down, a run

    def test_set_up_and_tear_down_leave_nothing(self) -> None:
        """Set-up and tear-down, twice on the last device, restore the current device and leave nothing."""
        index = self.plugin.accelerator_parse_devices(devices="auto")[-1]
        device = self.plugin.accelerator_device(index=index)
        torch.ones(1, device=self.device)  # what torch sets up once in a process is there now
        before = (traces(), _current())
        for time in ("first", "second"):
            context = context_of(self.plugin, device=device, names={self.kind: self.entry.name})
            try:
                self.plugin.accelerator_setup(context=context)
                if self._is_current(device):
                    broken(DEVICE, f"after set-up the current device is {_current()}, not {device}")
                torch.ones(1, device=device)
                self.plugin.accelerator_teardown()
            except PlugframeError as error:
                broken(CLEAN, f"the {time} set-up and tear-down raised {one_line(error)}")
            found = left(before[0], traces())
            if found or _current() != before[1]:
                broken(CLEAN, f"after the {time} tear-down {found or f'the current device is {_current()}'}")

    def _is_current(self, device: torch.device) -> bool:
        current = _current()
        return current is not None and current.type == device.type and current != device

    @pytest.mark.parametrize("given", ["by name", "as an object"])
    def test_a_run_computes_on_its_device(self, given: str) -> None:
        """Lite(accelerator=...) trains on its device: parameters, batches and new tensors are on it."""
        plugin = self.plugin if given == "as an object" else chosen(self.kind, self.spec, dict(self.options))
        before = (traces(), _current())
        device = self.device
        try:
            with running(accelerator=plugin) as (lite, _):
                torch.manual_seed(0)
                model = nn.Linear(4, 2)
                model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
                data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.ones(12, 2))
                loader = lite.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=4))
                with lite.init_tensor():
                    made = torch.zeros(1)
                losses: list[torch.Tensor] = []
                x = made
                for _ in range(4):
                    for x, y in loader:
                        optimizer.zero_grad()
                        losses.append((model(x) - y).square().mean())
                        lite.backward(losses[-1])
                        optimizer.step()
                result = lite.all_gather(losses[-1].detach())
                places = {"lite.device": lite.device, "a parameter": model.weight.device, "a batch": x.device}
                places |= {"init_tensor()": made.device, "a loss": losses[-1].device, "a result": result.device}
        except PlugframeError as error:
            broken(TRAINING, f"it raised {one_line(error)}")
        for what, place in places.items():
            if place != device:
                broken(TRAINING, f"{what} is on {place}, and devices=1 is {device}")
        first, last = losses[0].item(), losses[-1].item()
        if not last < first:
            broken(TRAINING, f"the loss went from {first:.4g} to {last:.4g}")
        found = left(before[0], traces())
        if found or _current() != before[1]:
            broken(CLEAN, f"after a run {found or f'the current device is {_current()}'}")


def _autocasts(kind: str) -> bool:
    """Return whether torch.autocast accepts a device type; torch raises for an unknown one."""
    try:
        return torch.amp.is_autocast_available(kind)
    except RuntimeError:
        return False


def _current() -> torch.device | None:
    """Return torch's current device, None where there is only the CPU."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or torch.accelerator.device_count() == 0:
        return None
    return torch.device(kind.type, torch.accelerator.current_device_index())
