"""The precision contract suite: dtypes, and correctly scaled gradients and steps."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from plugframe.core.registry.registry import Entry
from plugframe.errors import PlugframeError, UnsupportedError
from plugframe.hooks import Dtypes
from plugframe.hooks.context import Context
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.placed import accelerator_for, context_of
from plugframe.testing.contracts.running import broken, chosen, left, one_line, running, traces

DTYPES = "Dtypes (parameters are kept, and numbers computed, in the dtypes that precision_dtypes() says)"
IN_PLACE = "In place (a module that is converted is the user's own, and so are its parameters)"
UNTOUCHED = "Untouched (what is no floating-point tensor goes through as it is, and containers keep their types)"
RETURNED = "Returned (what a forward returns is in torch's default dtype, so that losses are computed in it)"
REFUSED = "Refused (a dtype the device does not compute in is an UnsupportedError, never another dtype)"
GRADIENTS = "Gradients (precision_unscale() leaves them true to size, however often it is called)"
STEPS = "Steps (a step is that of plain torch, as far as the dtypes allow)"
OVERFLOW = (
    "Overflow (a step with gradients that are not finite is skipped if precision_unscale() says so, and only then)"
)
CLOSURES = "Closures (a closure is evaluated as it should be, or refused with an UnsupportedError)"
STATE = "State (what precision_state() gives, precision_load_state() takes, and training goes on the same)"
APART = "Apart (two objects of it do not see each other)"
TRAINING = "Training (a run under Lite ends near the one in plain torch)"
CLEAN = "Law 9 (nothing is left behind)"


class _Pair(NamedTuple):
    value: Any
    label: str


@dataclasses.dataclass
class _Output:
    logits: Any
    note: str


class PrecisionContract(PluginContract):
    """Subclass it and set `spec`.

    Attributes:
        tolerance: how far a step may be from plain torch's, in parts of its length; by default a few times what the
            dtypes round.
    """

    kind = "precision"
    tolerance: ClassVar[float | None] = None

    # ------------------------------------------------------------------ a precision that is set up

    def context(self, **hooks: Any) -> Context:
        """Return what the plugin sees of a job on one rank."""
        entry, accelerator = self.accelerator
        device = accelerator.accelerator_device(index=0)
        names = {"accelerator": entry.name, self.kind: self.entry.name}
        return context_of(accelerator, device=device, names=names, **hooks)

    @functools.cached_property
    def accelerator(self) -> tuple[Entry, Any]:
        """Where the tests compute."""
        entry = accelerator_for(self.descriptor)
        return entry, self.registry.make(entry)

    @contextmanager
    def within(self) -> Iterator[Any]:
        """Give a plugin that is set up; where this device cannot compute so, the test is skipped."""
        plugin, context = self.make(), self.context()
        try:
            plugin.precision_setup(context=context)
        except UnsupportedError as error:
            pytest.skip(f"It is refused here: {error}")
        try:
            yield plugin
        finally:
            plugin.precision_teardown()

    @pytest.fixture
    def plugin(self) -> Iterator[Any]:
        """A plugin that is set up."""
        with self.within() as plugin:
            yield plugin

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the tests."""
        return self.context().device

    def allowed(self, plugin: Any) -> float:
        """Return how far a number may be from plain torch's, in parts of it."""
        if self.tolerance is not None:
            return self.tolerance
        dtypes = plugin.precision_dtypes()
        widest = max(torch.finfo(dtype).eps for dtype in (dtypes.parameter, dtypes.compute, torch.float32))
        return 32 * widest

    def model(self) -> nn.Module:
        """Return a module on the device of the tests, the same each time."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(self.device)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, the same each time."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 6, generator=generator)
        return x.to(self.device), torch.randn(16, 4, generator=generator).to(self.device)

    def loss(self, plugin: Any, module: nn.Module, factor: float = 1.0) -> Tensor:
        """Run a forward as `Lite` does, and return the loss."""
        x, y = self.data()
        x = plugin.precision_convert_input(data=x)
        with plugin.precision_forward_context():
            out = module(x)
        out = plugin.precision_convert_output(data=out)
        return nn.functional.mse_loss(out, y) * factor

    def plain_loss(self, module: nn.Module, factor: float = 1.0) -> Tensor:
        """Return the loss in plain torch."""
        x, y = self.data()
        return nn.functional.mse_loss(module(x), y) * factor

    # ------------------------------------------------------------------ dtypes

    def test_it_says_its_dtypes(self, plugin: Any) -> None:
        """precision_dtypes() gives two floating-point dtypes of torch."""
        dtypes = plugin.precision_dtypes()
        if not isinstance(dtypes, Dtypes):
            broken(DTYPES, f"precision_dtypes() gave {dtypes!r}, not plugframe.hooks.Dtypes")
        for name in ("parameter", "compute"):
            dtype = getattr(dtypes, name)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                broken(DTYPES, f"{name}={dtype!r} is no floating-point dtype of torch")

    def test_a_module_is_converted_in_place(self, plugin: Any) -> None:
        """The very module and parameters come back, in the parameters' dtype; whole and complex numbers stay."""
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(self.device)
        phase = nn.Parameter(torch.tensor([1 + 2j], device=self.device))
        module.register_parameter("phase", phase)
        before = dict(module.named_parameters())
        found = plugin.precision_convert_module(module=module)
        if found is not module:
            broken(IN_PLACE, f"precision_convert_module() gave another {type(found).__name__} than it was given")
        for name, parameter in module.named_parameters():
            if parameter is not before[name]:
                broken(IN_PLACE, f"{name} was replaced: an optimizer that was made before would update the old one")
            if parameter.is_floating_point() and parameter.dtype is not plugin.precision_dtypes().parameter:
                wanted = plugin.precision_dtypes().parameter
                broken(DTYPES, f"{name} of a converted module is {parameter.dtype}, and precision_dtypes says {wanted}")
        for name, tensor in (("num_batches_tracked", module.get_buffer("1.num_batches_tracked")), ("phase", phase)):
            if tensor.is_floating_point():
                broken(UNTOUCHED, f"{name} of a converted module became {tensor.dtype}")
        if phase.detach().cpu().to(torch.complex64).tolist() != [1 + 2j]:
            broken(UNTOUCHED, f"a complex parameter lost its imaginary part: {phase.tolist()}")

    @pytest.mark.parametrize("hook", ["precision_convert_input", "precision_convert_output"])
    def test_what_is_no_float_tensor_is_untouched(self, plugin: Any, hook: str) -> None:
        """Numbers, texts, whole-number tensors and containers of any kind go through as they are."""
        convert = getattr(plugin, hook)
        index, flag = torch.ones(2, dtype=torch.int64), torch.tensor([True])
        for value in (3, 2.5, "text", None, b"bytes", index, flag, object(), len):
            if convert(data=value) is not value:
                broken(UNTOUCHED, f"{hook} changed {value!r} into {convert(data=value)!r}")
        floats = torch.ones(2)
        data = {"a": (floats, index), "b": [floats, {"c": _Pair(floats, "x")}], "d": _Output(floats, "y"), "n": 3}
        found = convert(data=data)
        shown = (type(found), type(found["a"]), type(found["b"][1]["c"]), type(found["d"]), found["d"].note, found["n"])
        if shown != (dict, tuple, _Pair, _Output, "y", 3):
            broken(UNTOUCHED, f"{hook} changed containers: {shown}")
        if found["a"][1] is not index:
            broken(UNTOUCHED, f"{hook} changed a tensor of whole numbers inside a tuple")
        dtypes = {found["a"][0].dtype, found["b"][0].dtype, found["b"][1]["c"].value.dtype, found["d"].logits.dtype}
        if len(dtypes) > 1:
            broken(UNTOUCHED, f"{hook} converts tensors in some containers and not in others: {dtypes}")
        if dtypes == {torch.float32} and found is not data:
            broken(UNTOUCHED, f"{hook} gave another dict where nothing changes: it is in the hot path")
        if floats.dtype is not torch.float32 or data["a"][0] is not floats:  # type: ignore[index]
            broken(UNTOUCHED, f"{hook} wrote into what it was given")

    def test_a_forward_computes_in_the_dtype(self, plugin: Any) -> None:
        """A linear layer inside the forward context computes in the dtype; what it returns has the default one."""
        module = plugin.precision_convert_module(module=self.model())
        x = plugin.precision_convert_input(data=self.data()[0])
        for time in ("first", "second"):
            with plugin.precision_forward_context():
                out = module(x)
            compute = plugin.precision_dtypes().compute
            if torch.finfo(compute).bits >= 16 and out.dtype is not compute:
                broken(DTYPES, f"the {time} forward computed in {out.dtype}, and precision_dtypes says {compute}")
            found = plugin.precision_convert_output(data=out)
            if found.dtype is not torch.get_default_dtype():
                broken(
                    RETURNED, f"the {time} forward returned {found.dtype}, the default is {torch.get_default_dtype()}"
                )
        with plugin.precision_forward_context(), plugin.precision_forward_context():
            module(x)

    def test_a_module_is_built_in_the_dtype(self, plugin: Any) -> None:
        """Inside precision_init_context() parameters are made in their dtype, and afterwards as before."""
        wanted = plugin.precision_dtypes().parameter
        with plugin.precision_init_context():
            made = nn.Linear(1, 1).weight.dtype
        if made is not wanted:
            broken(DTYPES, f"a module built in precision_init_context() is {made}, and precision_dtypes says {wanted}")

    @pytest.mark.parametrize("hook", ["precision_init_context", "precision_forward_context"])
    def test_a_context_is_left_as_it_was_entered(self, plugin: Any, hook: str) -> None:
        """After it, also after an error in it, default dtype and autocast are what they were."""
        state = self._modes()
        for fails in (False, True):
            try:
                with getattr(plugin, hook)():
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            if self._modes() != state:
                after = "an error in it" if fails else "leaving it"
                broken(CLEAN, f"after {after}, {hook} leaves {self._modes()}; before there was {state}")

    def _modes(self) -> tuple[Any, ...]:
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) if torch.amp.is_autocast_available(kind) else None
        return torch.get_default_dtype(), autocast, torch.get_float32_matmul_precision()

    # ------------------------------------------------------------------ gradients and steps

    def test_gradients_are_true_to_size(self, plugin: Any) -> None:
        """After backward and unscaling they are plain torch's, with accumulation, and stay so when asked again."""
        module, plain = plugin.precision_convert_module(module=self.model()), self.model()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for count in (1, 2):
            plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
            self.plain_loss(plain).backward()  # type: ignore[no-untyped-call]
            for time in ("", ", asked a second time"):
                plugin.precision_unscale(optimizer=optimizer)
                self._near(GRADIENTS, plugin, _gradients(module), _gradients(plain), f"after {count} backwards{time}")

    def test_backward_takes_its_arguments(self, plugin: Any) -> None:
        """``retain_graph=True`` is handed on, so that one graph can be gone through twice."""
        module, plain = plugin.precision_convert_module(module=self.model()), self.model()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss, other = self.loss(plugin, module), self.plain_loss(plain)
        try:
            for _ in range(2):
                plugin.precision_backward(loss=loss, args=(), kwargs={"retain_graph": True})
                other.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            broken(GRADIENTS, f"backward(retain_graph=True) twice raised {one_line(error)}")
        plugin.precision_unscale(optimizer=optimizer)
        self._near(GRADIENTS, plugin, _gradients(module), _gradients(plain), "after one graph was gone through twice")

    def _step(self, plugin: Any, optimizer: torch.optim.Optimizer) -> Any:
        return plugin.precision_optimizer_step(optimizer=optimizer, step=optimizer.step, closure=None)

    @pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
    def test_steps_are_those_of_plain_torch(self, plugin: Any, clip: bool) -> None:
        """Some steps, with unscaling and clipping before them or without, lead where plain torch's lead."""
        module, plain = plugin.precision_convert_module(module=self.model()), self.model()
        optimizer, other = (torch.optim.SGD(each.parameters(), lr=0.5) for each in (module, plain))
        for _ in range(3):
            optimizer.zero_grad()
            other.zero_grad()
            plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
            self.plain_loss(plain).backward()  # type: ignore[no-untyped-call]
            if clip:
                plugin.precision_unscale(optimizer=optimizer)
                for each in (module, plain):
                    nn.utils.clip_grad_norm_(each.parameters(), 0.1)
            self._step(plugin, optimizer)
            other.step()
        self._near(STEPS, plugin, _moved(module, self.model()), _moved(plain, self.model()), "3 steps of SGD", few=8)

    def test_two_optimizers_take_their_own_steps(self, plugin: Any) -> None:
        """Two models with an optimizer each, backward and step in turns, move as in plain torch."""
        modules = [plugin.precision_convert_module(module=self.model()) for _ in range(2)]
        plains = [self.model() for _ in range(2)]
        optimizers, others = ([torch.optim.SGD(m.parameters(), lr=0.5) for m in each] for each in (modules, plains))
        for _ in range(2):
            for number, (module, plain) in enumerate(zip(modules, plains, strict=True), 1):
                plugin.precision_backward(loss=self.loss(plugin, module, number), args=(), kwargs={})
                self.plain_loss(plain, number).backward()  # type: ignore[no-untyped-call]
            for optimizer, other in zip(optimizers, others, strict=True):
                self._step(plugin, optimizer)
                other.step()
                optimizer.zero_grad()
                other.zero_grad()
        for module, plain in zip(modules, plains, strict=True):
            self._near(
                STEPS, plugin, _moved(module, self.model()), _moved(plain, self.model()), "two optimizers", few=8
            )

    def test_an_overflow_is_skipped_or_shown(self, plugin: Any) -> None:
        """Where unscaling promises it, a step on gradients that are not finite changes nothing; the next one does."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        before = copy.deepcopy(module.state_dict())
        plugin.precision_backward(loss=self.loss(plugin, module, float("inf")), args=(), kwargs={})
        skips = plugin.precision_unscale(optimizer=optimizer)
        if not isinstance(skips, bool):
            broken(OVERFLOW, f"precision_unscale() gave {skips!r}, not True or False")
        if all(grad.isfinite().all() for grad in _gradients(module)):
            broken(OVERFLOW, "a loss that is infinite left finite gradients: nobody would know of it")
        self._step(plugin, optimizer)
        changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
        if skips and changed:
            broken(OVERFLOW, f"precision_unscale() gave True, and the step changed {', '.join(changed)}")
        if not skips:
            if not changed:
                broken(OVERFLOW, "precision_unscale() gave False, and the step was skipped: clipping would have raised")
            return
        optimizer.zero_grad()
        plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
        self._step(plugin, optimizer)
        if all(torch.equal(value, before[name]) for name, value in module.state_dict().items()):
            broken(OVERFLOW, "after a step that was skipped the next one, on finite gradients, was skipped as well")

    def test_a_closure_is_evaluated_or_refused(self, plugin: Any) -> None:
        """What the step returns is what the closure gave; a precision that cannot do so says it."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        calls: list[float] = []

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.loss(plugin, module)
            plugin.precision_backward(loss=loss, args=(), kwargs={})
            calls.append(loss.item())
            return calls[-1]

        try:
            found = plugin.precision_optimizer_step(optimizer=optimizer, step=optimizer.step, closure=closure)
        except UnsupportedError:
            if calls:
                broken(CLOSURES, "it was evaluated, and then refused")
            return
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(CLOSURES, f"it raised {one_line(error)}")
        if len(calls) != 1 or found != calls[0]:
            broken(CLOSURES, f"it was evaluated {len(calls)} times, gave {calls}, and the step returned {found!r}")

    def test_a_step_without_gradients_does_nothing(self, plugin: Any) -> None:
        """Neither unscaling nor a step minds an optimizer whose parameters have no gradients."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        before = copy.deepcopy(module.state_dict())
        try:
            plugin.precision_unscale(optimizer=optimizer)
            self._step(plugin, optimizer)
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(STEPS, f"a step without any gradient raised {one_line(error)}")
        if any(not torch.equal(value, before[name]) for name, value in module.state_dict().items()):
            broken(STEPS, "a step without any gradient moved parameters")

    def _near(self, rule: str, plugin: Any, ours: list[Tensor], theirs: list[Tensor], what: str, few: int = 1) -> None:
        if len(ours) != len(theirs):
            broken(rule, f"{what}: {len(ours)} parameters have gradients, in plain torch {len(theirs)}")
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            size = float(other.double().norm())
            apart = float((one.double() - other.double()).norm())
            if not apart <= few * self.allowed(plugin) * size:
                broken(rule, f"{what}: parameter {number} is {apart:.3g} from plain torch's {size:.3g}")

    # ------------------------------------------------------------------ state

    def test_its_state_comes_back(self, plugin: Any) -> None:
        """A second object that takes the state goes on as the first; no state at all begins anew."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            plugin.precision_backward(loss=self.loss(plugin, module, factor), args=(), kwargs={})
            self._step(plugin, optimizer)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.nan_to_num_(nan=0.5)
        optimizer.zero_grad()
        state = plugin.precision_state()
        if not isinstance(state, dict):
            broken(STATE, f"precision_state() gave {state!r}, not a dict")
        for name, value in state.items():
            if not isinstance(value, (str, int, float, bool, Tensor, list, dict, type(None))):
                broken(STATE, f"precision_state()[{name!r}] is a {type(value).__name__}, which no checkpoint can hold")
        with self.within() as other:
            copied = copy.deepcopy(state)
            twin = other.precision_convert_module(module=self.model())
            twin.load_state_dict(module.state_dict())
            its = torch.optim.SGD(twin.parameters(), lr=0.1)
            other.precision_load_state(state=copied)
            if repr(other.precision_state()) != repr(state):
                broken(STATE, f"{state} was loaded, and precision_state() then gave {other.precision_state()}")
            for _ in range(3):
                for each, model, stepped in ((plugin, module, optimizer), (other, twin, its)):
                    stepped.zero_grad()
                    each.precision_backward(loss=self.loss(each, model), args=(), kwargs={})
                    self._step(each, stepped)
            for one, two in zip(module.parameters(), twin.parameters(), strict=True):
                if not torch.equal(one, two):
                    broken(STATE, "three steps after loading the parameters are not those of the run it was saved in")
            if repr(other.precision_state()) != repr(plugin.precision_state()):
                broken(
                    STATE, f"three steps after loading it is {other.precision_state()}, not {plugin.precision_state()}"
                )
            try:
                other.precision_load_state(state={})
            except Exception as error:  # noqa: BLE001 - reported as it is
                broken(STATE, f"the state of a run without any raised {one_line(error)}")

    def test_two_of_them_do_not_meddle(self, plugin: Any) -> None:
        """An overflow under one leaves the state of the other alone, and a new set-up begins anew."""
        fresh = repr(plugin.precision_state())
        with self.within() as other:
            module = other.precision_convert_module(module=self.model())
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            other.precision_backward(loss=self.loss(other, module, float("inf")), args=(), kwargs={})
            self._step(other, optimizer)
            other.precision_state()  # what the step found may be taken in as late as here
            if repr(plugin.precision_state()) != fresh:
                broken(APART, f"an overflow under one object made the other's state {plugin.precision_state()}")
            other.precision_teardown()
            other.precision_setup(context=self.context())
            if repr(other.precision_state()) != fresh:
                broken(CLEAN, f"set up again it begins with {other.precision_state()}, not {fresh}")

    # ------------------------------------------------------------------ set-up and tear-down

    def test_what_the_device_cannot_compute_is_refused(self) -> None:
        """On a device that computes in no dtype at all set-up is refused, naming the precision."""
        plugin = self.make()
        context = self.context(accelerator_supports_dtype=lambda dtype, device: False)
        try:
            plugin.precision_setup(context=context)
        except UnsupportedError as error:
            if self.entry.name not in str(error):
                broken(REFUSED, f"the message does not name precision {self.entry.name!r}: {error}")
            if "\n" in str(error).strip():
                broken(REFUSED, f"the message has {len(str(error).splitlines())} lines: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(REFUSED, f"set-up raised {one_line(error)}")
        else:
            broken(REFUSED, "the device supports none of its dtypes, and set-up said nothing")
        finally:
            plugin.precision_teardown()

    def test_set_up_and_tear_down_leave_nothing(self) -> None:
        """After each, and after a tear-down without a set-up, everything is as it was."""
        modes = self._modes()
        self.make().precision_teardown()
        with self.within():
            pass  # what torch sets up once in a process is there now
        before = traces()
        with self.within() as plugin:
            module = plugin.precision_convert_module(module=self.model())
            plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
        found = left(before, traces())
        if found or self._modes() != modes:
            broken(CLEAN, f"after tear-down {found or f'there is {self._modes()}, and was {modes}'}")

    # ------------------------------------------------------------------ a run

    def test_a_run_ends_near_plain_torch(self) -> None:
        """A regression under Lite, on one rank, gets as far as in plain torch, and its losses are in float32."""
        with self.within() as plugin:
            allowed = self.allowed(plugin)
        plain = self.model()
        first, last = self._train(plain, torch.optim.SGD(plain.parameters(), lr=0.2), lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        accelerator = self.accelerator[0].qualified
        precision = chosen(self.kind, self.spec, dict(self.options))
        try:
            with running(accelerator=accelerator, precision=precision) as (lite, _):
                model = self.model()
                model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.2))
                begun, ended = self._train(model, optimizer, lite.backward)
                state = lite._hooks.precision_state()
        except PlugframeError as error:
            broken(TRAINING, f"under Lite it raised {one_line(error)}")
        if begun.dtype is not torch.get_default_dtype():
            broken(RETURNED, f"under Lite a loss is {begun.dtype}, the default is {torch.get_default_dtype()}")
        way = float(first - last)
        if not abs(float(ended - last)) <= 16 * allowed * way + way / 10:
            broken(TRAINING, f"in plain torch the loss fell from {first:.4g} to {last:.4g}, under it to {ended:.4g}")
        if not isinstance(state, dict):
            broken(STATE, f"precision_state() gave {state!r} under Lite, not a dict")

    def _train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], Any]
    ) -> tuple[Tensor, Tensor]:
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = self.plain_loss(model)
            backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return losses[0], losses[-1]


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.detach().clone() for parameter in module.parameters() if parameter.grad is not None]


def _moved(module: nn.Module, begun: nn.Module) -> list[Tensor]:
    pairs = zip(module.parameters(), begun.parameters(), strict=True)
    return [one.detach().double() - other.detach().double() for one, other in pairs]
